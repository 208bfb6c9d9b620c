"""The report's plots, one file a kind, as SVG that takes its colours from the page."""
