"""Recycle LoRA adapters: find, rank, merge and compare them, and say whether it helped."""

__version__ = "0.1.0"
