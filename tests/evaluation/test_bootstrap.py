from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from ssdir.evaluation.average_precision import ScoredBoxes
from ssdir.evaluation.bootstrap import Estimate, Resamples


def test_intervals_of_a_mean_are_those_of_scipy():
    values = np.random.default_rng(0).exponential(size=80)
    ours = Resamples(80, 6_000, seed=1).ratio(values, np.ones(80))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=6_000, method="percentile", rng=2)
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)


def test_intervals_of_a_ratio_are_those_of_scipy():
    """Objects are many or few in an image: the ratio of sums, not the mean of ratios."""
    random = np.random.default_rng(3)
    below = random.integers(0, 9, 60).astype(float)
    above = random.binomial(below.astype(int), 0.7).astype(float)
    ours = Resamples(60, 6_000, seed=1).ratio(above, below)
    theirs = stats.bootstrap(
        (above, below), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, n_resamples=6_000,
        method="percentile", rng=2, vectorized=True,
    )  # fmt: skip
    assert ours.value == above.sum() / below.sum()
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.006)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.006)


def test_means_of_objects_leave_out_what_is_undefined():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    image = np.array([0, 0, 1, 1])
    estimate = Resamples(3, 500).mean(values, image)
    assert estimate.value == 3.0
    assert (estimate.low, estimate.high) == (1.0, 4.0)  # of either image alone
    assert Resamples(3, 10).mean(np.full(4, np.nan), image) is None


def test_macro_f1_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    truth, image = random.integers(4, size=90), np.sort(random.integers(20, size=90))
    told = np.where(random.random(90) < 0.6, truth, random.integers(4, size=90))
    resamples = Resamples(20, 300, seed=5)
    estimate = resamples.macro_f1(told, truth, image)
    assert estimate.value == pytest.approx(f1_score(truth, told, average="macro"))
    drawn = []
    for counts in resamples.counts.astype(int):
        rows = np.repeat(np.arange(90), counts[image])
        drawn.append(f1_score(truth[rows], told[rows], average="macro"))
    assert estimate.low == pytest.approx(np.percentile(drawn, 2.5))
    assert estimate.high == pytest.approx(np.percentile(drawn, 97.5))
    none = np.zeros(0, np.int64)
    assert resamples.macro_f1(none, none, none) is None


def test_average_precision_of_images_that_are_all_alike_has_no_spread():
    n = 12
    hits = np.tile(np.array([True, False]), (10, n))
    boxes = ScoredBoxes(np.tile([0.9, 0.5], n), np.arange(n).repeat(2), hits)
    precision = Resamples(n, 50).precision(boxes, np.ones(n))
    assert precision.AP == precision.AP50 == Estimate(1.0, 1.0, 1.0)
    assert Resamples(n, 50).precision(boxes, np.zeros(n)) is None


def test_average_precision_spreads_with_the_images():
    """Half the images have their one object found: recall, and with it AP50, is the share of those drawn."""
    n = 40
    found = np.arange(0, n, 2)
    boxes = ScoredBoxes(np.linspace(0.9, 0.5, len(found)), found, np.ones((10, len(found)), bool))
    resamples = Resamples(n, 2_000, seed=0)
    precision = resamples.precision(boxes, np.ones(n))
    assert precision.AP50.value == pytest.approx(51 / 101)
    expected = resamples.ratio((np.arange(n) % 2 == 0).astype(float), np.ones(n))
    assert precision.AP50.low == pytest.approx(expected.low, abs=0.011)
    assert precision.AP50.high == pytest.approx(expected.high, abs=0.011)


def test_resamples_are_a_function_of_the_seed():
    first, again, other = (Resamples(9, 20, seed).counts for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert (first.sum(1) == 9).all()
