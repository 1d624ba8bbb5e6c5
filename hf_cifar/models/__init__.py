"""Building classifiers, and choosing what of them trains."""
