"""Export, prune, quantise and compare fine-tuned models, and classify large data with them."""
