"""The report of an evaluation: its text and its HTML."""
