"""What can be trained: a network and its loss as one module."""
