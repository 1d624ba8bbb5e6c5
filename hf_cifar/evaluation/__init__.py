"""Predictions, and the metrics that follow from them."""
