"""Build classifiers and choose which of their parameters train."""
