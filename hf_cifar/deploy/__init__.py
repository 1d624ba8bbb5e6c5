"""Export, prune, quantise and compare fine-tuned models."""
