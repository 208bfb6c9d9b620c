"""Data-free merge rules: several updates in, one update out."""
