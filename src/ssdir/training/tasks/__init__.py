"""Tasks: a network and its loss as one module."""
