"""Slot Attention."""
