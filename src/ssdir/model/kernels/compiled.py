"""The operators on the CPU."""

from ssdir.model.kernels.plain import covered, covered_backward, crop, crop_backward, paste, paste_backward

__all__ = ["covered", "covered_backward", "crop", "crop_backward", "paste", "paste_backward"]
