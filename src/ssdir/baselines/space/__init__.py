"""SPACE."""
