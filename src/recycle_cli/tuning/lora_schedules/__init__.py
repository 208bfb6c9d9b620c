"""What of a target LoRA is trained when, one file a schedule."""
