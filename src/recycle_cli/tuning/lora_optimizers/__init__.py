"""How the factors of a target LoRA are moved, one file an optimizer."""
