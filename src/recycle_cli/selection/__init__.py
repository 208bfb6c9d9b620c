"""Scores that rank the adapters of a pool for a task."""
