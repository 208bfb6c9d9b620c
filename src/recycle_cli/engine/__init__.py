"""The one door to the accelerator: device, base model, forward passes and the training loop."""
