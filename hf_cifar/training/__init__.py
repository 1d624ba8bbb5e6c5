"""Training: the Trainer, its optimiser and checkpoints, features, and the compute setting."""
