"""Forms that a target LoRA may have while it is trained, one file each."""
