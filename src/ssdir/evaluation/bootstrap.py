"""Confidence intervals by the bootstrap over images: objects of one image are not independent, images are.

Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7 (1979); percentile intervals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Num

from ssdir.evaluation.average_precision import ScoredBoxes, precision_of

LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its confidence interval."""

    value: float
    low: float
    high: float


class Resamples:
    """Resamples of the images of a split, the same for every model that is measured on it.

    Args:
        n_images: of the split.
        n_resamples: how many.
        seed: of the random numbers; the intervals are a pure function of it and the figures.
    """

    def __init__(self, n_images: int, n_resamples: int = 1_000, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.n_images = n_images
        self.counts = np.stack(
            [
                np.bincount(random.integers(n_images, size=n_images), minlength=n_images)
                for _ in range(n_resamples)
            ]
        ).astype(np.float64)
        """How often each image occurs in each resample."""

    def ratio(self, numerator: Num[np.ndarray, " n"], denominator: Num[np.ndarray, " n"]) -> Estimate | None:
        """Sum of the one over sum of the other, each given image by image; None where the second sum is 0.

        >>> Resamples(4, seed=1).ratio(np.ones(4), np.full(4, 2.0))
        Estimate(value=0.5, low=0.5, high=0.5)
        """
        whole = float(denominator.sum())
        if whole == 0:
            return None
        below = self.counts @ denominator
        drawn = below > 0
        return _estimate(float(numerator.sum()) / whole, (self.counts @ numerator)[drawn] / below[drawn])

    def mean(self, values: Num[np.ndarray, " m"], image: Int[np.ndarray, " m"]) -> Estimate | None:
        """Mean of values of objects, each of which lies in an image; NaN is left out; None where nothing is left."""
        known = ~np.isnan(values)
        sums = np.bincount(image[known], values[known], self.n_images)
        return self.ratio(sums, np.bincount(image[known], minlength=self.n_images))

    def macro_f1(
        self, told: Int[np.ndarray, " k"], truth: Int[np.ndarray, " k"], image: Int[np.ndarray, " k"]
    ) -> Estimate | None:
        """F1 of each class that is told or true, averaged; None where nothing is told."""
        if len(told) == 0:
            return None
        double_hits, sums = [], []
        for label in np.union1d(told, truth):
            is_told, is_true = told == label, truth == label
            double_hits.append(2.0 * np.bincount(image[is_told & is_true], minlength=self.n_images))
            sums.append(
                np.bincount(image[is_told], minlength=self.n_images)
                + np.bincount(image[is_true], minlength=self.n_images)
            )
        above, below = np.stack(double_hits, 1), np.stack(sums, 1).astype(np.float64)
        whole = above.sum(0) / below.sum(0)
        scores = _divided(self.counts @ above, self.counts @ below)
        drawn = ~np.isnan(scores).all(1)
        return _estimate(float(whole.mean()), np.nanmean(scores[drawn], axis=1))

    def precision(self, boxes: ScoredBoxes, true_counts: Num[np.ndarray, " n"]) -> Precision | None:
        """Average precision, recomputed from the matches on every resample; None where there is no true box."""
        if true_counts.sum() == 0:
            return None
        counts = true_counts.astype(np.float64)
        whole = precision_of(boxes, counts, np.ones((1, self.n_images)))[0]
        drawn = precision_of(boxes, counts, self.counts)
        drawn = drawn[~np.isnan(drawn[:, 0])]
        return Precision(
            AP=_estimate(float(whole.mean()), drawn.mean(1)), AP50=_estimate(float(whole[0]), drawn[:, 0])
        )


@dataclass(frozen=True)
class Precision:
    """Average precision over IoU 0.50 to 0.95, and at 0.5."""

    AP: Estimate
    AP50: Estimate


def _estimate(value: float, drawn: Float[np.ndarray, " r"]) -> Estimate:
    if len(drawn) == 0:
        return Estimate(value, value, value)
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(value, float(low), float(high))


def _divided(a: Float[np.ndarray, "r c"], b: Float[np.ndarray, "r c"]) -> Float[np.ndarray, "r c"]:
    return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)
