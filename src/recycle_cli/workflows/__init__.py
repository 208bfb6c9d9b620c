"""One file per command: its steps in order. No printing, no SQL, no mathematics."""
