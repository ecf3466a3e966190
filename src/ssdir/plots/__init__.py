"""Figures good enough for a paper, and boxes drawn on images."""
