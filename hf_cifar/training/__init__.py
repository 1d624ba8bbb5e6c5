"""Training: the Trainer, its optimiser and checkpoints, features, and the setting it computes in."""
