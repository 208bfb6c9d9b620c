"""Tasks, metrics, paired statistics, the verdict, and lm-eval as the reference scorer."""
