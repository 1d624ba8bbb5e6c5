"""The report of a run, as facts and as a page, and its model card."""
