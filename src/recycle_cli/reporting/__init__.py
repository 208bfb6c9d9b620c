"""A study's report: pages, plots and tables from its document, and nothing else."""
