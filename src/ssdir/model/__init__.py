"""SSDIR: from the detector's feature maps to one vector per object, and back to an image."""
