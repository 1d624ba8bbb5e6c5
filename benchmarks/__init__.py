"""Speed side by side: ours, the plain Trainer recipe, timm's pattern, and a bare loop as the ceiling."""
