"""What a run tells people: its report, as facts and as a page, and its model card."""
