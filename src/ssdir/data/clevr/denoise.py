"""A noise filter for rendered pictures, guided by what is free of noise: normals, colours, places.

An edge-avoiding à-trous wavelet filter (Dammertz et al., HPG 2010). Its tolerance for differences of colour is the
noise at each pixel, measured on two renders of half the samples (as in SVGF, Schied et al., HPG 2017).
"""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Float

_SCALES = (1, 2, 4, 8)
_KERNEL = (1 / 16, 1 / 4, 3 / 8, 1 / 4, 1 / 16)
_TOLERANCE = 4.0  # standard deviations of noise
_OUTLIER = 2.0  # times the neighbours' brightness
_FEATURE_TOLERANCE = 0.15  # of normals and colours


def denoise(
    halves: Float[np.ndarray, "2 h w 3"], features: Float[np.ndarray, "h w f"]
) -> Float[np.ndarray, "h w 3"]:
    """The mean of two renders of the same scene, without most of their noise.

    Pixels are averaged with those nearby whose ``features`` are alike, and whose colours do not differ by much more
    than the noise.
    """
    halves = _without_outliers(halves)
    image = halves.mean(0)
    noise = ((halves[0] - halves[1]) ** 2).mean(-1) / 4
    for step in _SCALES:
        image, noise = _smoothed(image, noise, features, step)
    return image


def _without_outliers(halves: Float[np.ndarray, "2 h w 3"]) -> Float[np.ndarray, "2 h w 3"]:
    """Pixels far brighter than both their neighbours and themselves in the other half are made darker."""
    brightness = halves.mean(-1) + np.float32(1e-6)
    darker = brightness.min(0)
    limit = np.maximum(_OUTLIER * _blurred(darker), 1.5 * darker)
    return halves * np.minimum(1, limit / brightness)[..., None]


def _blurred(values: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    height, width = values.shape
    padded = np.pad(values, 2, mode="edge")
    rows = np.sum([share * padded[k : k + height] for k, share in enumerate(_KERNEL)], axis=0)
    return np.sum([share * rows[:, k : k + width] for k, share in enumerate(_KERNEL)], axis=0)


def _smoothed(
    image: Float[np.ndarray, "h w 3"],
    noise: Float[np.ndarray, "h w"],
    features: Float[np.ndarray, "h w f"],
    step: int,
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """One scale: the average of 5 x 5 pixels, ``step`` apart, and its variance."""
    height, width = noise.shape
    reach = 2 * step
    around = ((reach, reach), (reach, reach), (0, 0))
    images, everything = np.pad(image, around, mode="edge"), np.pad(features, around, mode="edge")
    noises = np.pad(noise, reach, mode="edge")
    precision = 1 / (3 * _TOLERANCE**2 * _blurred(noise) + np.float32(1e-7))
    total, variance, colors = np.zeros_like(noise), np.zeros_like(noise), np.zeros_like(image)
    for row, column in itertools.product(range(5), repeat=2):
        window = slice(row * step, row * step + height), slice(column * step, column * step + width)
        difference = _squared(images[window] - image) * precision
        difference += _squared(everything[window] - features) * np.float32(_FEATURE_TOLERANCE**-2)
        weight = np.float32(_KERNEL[row] * _KERNEL[column]) * np.exp(-difference)
        total += weight
        colors += weight[..., None] * images[window]
        variance += weight**2 * noises[window]
    return colors / total[..., None], variance / total**2


def _squared(differences: Float[np.ndarray, "h w f"]) -> Float[np.ndarray, "h w"]:
    return np.einsum("ijk,ijk->ij", differences, differences)
