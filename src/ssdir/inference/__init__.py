"""From image files to objects on disk."""
