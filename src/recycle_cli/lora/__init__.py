"""One low-rank update and its algebra: PEFT's format in and out, norms, sums, truncation."""
