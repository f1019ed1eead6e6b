"""What happens on one model: the backbone, its adapter, the training loop."""
