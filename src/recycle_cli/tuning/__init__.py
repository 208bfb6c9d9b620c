"""What is trained: a target LoRA from scratch, or a mixture of adapters."""
