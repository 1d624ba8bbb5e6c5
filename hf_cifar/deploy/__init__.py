"""A fine-tuned model outside Python: export, and the proof that it gives the same answers."""
