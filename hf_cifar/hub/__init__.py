"""The Hugging Face Hub: reached, read from, named as an origin, pushed to."""
