"""How the rank of a target LoRA is shared out among modules, one file an allocation."""
