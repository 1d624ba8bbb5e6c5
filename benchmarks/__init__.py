"""Speed comparisons: ours, the plain Trainer recipe, timm's training loop, and a bare loop as the ceiling."""
