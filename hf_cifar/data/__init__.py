"""Sources, splits, pixels and transforms."""
