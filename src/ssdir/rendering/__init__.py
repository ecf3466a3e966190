"""Rendering: patches pasted into images and boxes cropped out of them, one warp and its inverse."""
