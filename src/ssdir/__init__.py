"""Learning one vector per object of an image."""
