"""Predictions, and the figures that follow from them."""
