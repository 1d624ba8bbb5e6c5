"""The report of a run, as JSON and as a page, and its model card."""
