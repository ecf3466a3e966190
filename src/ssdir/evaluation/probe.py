"""A linear classifier of an object's attribute from its z_what."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ssdir.common.extras import how_to_install

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse regularisation strengths C among which cross-validation chooses."""


@dataclass(frozen=True)
class Probe:
    """A multinomial logistic regression on standardised inputs."""

    mean: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]
    classifier: Any
    """The fitted scikit-learn estimator."""
    strength: float
    """The inverse regularisation strength C that cross-validation chose."""
    n_train: int
    """Objects it was fitted on."""

    def predict(self, what: Float[np.ndarray, "m d"]) -> Int[np.ndarray, " m"]:
        """The most probable label of each row."""
        if len(what) == 0:
            return np.zeros(0, np.int64)
        return self.classifier.predict((what - self.mean) / self.scale)


def fit_probe(
    what: Float[np.ndarray, "m d"],
    labels: Int[np.ndarray, " m"],
    *,
    strengths: Sequence[float] = STRENGTHS,
    folds: int = 3,
    search_objects: int = 4_000,
    max_iterations: int = 500,
    seed: int = 0,
) -> Probe:
    """Fit a multinomial logistic regression; the regularisation is chosen by cross-validation on the same rows.

    Inputs are standardised (constant dimensions stay as they are). The strength C that gives the best mean
    accuracy over the folds wins, the stronger regularisation in a tie, and the classifier is then fitted on all
    rows. The result is a pure function of the arguments.

    Args:
        what: z_what means of training objects.
        labels: their classes, any integers.
        strengths: candidates for C.
        folds: of the cross-validation.
        search_objects: rows, drawn at random, that the cross-validation uses at most.
        max_iterations: of L-BFGS.

    Raises:
        ValueError: when the labels hold fewer than two classes.
        ModuleNotFoundError: without scikit-learn (extra ``eval``).

    >>> what = np.array([[0.0], [0.1], [0.2], [1.0], [1.1], [1.2]])
    >>> fit_probe(what, np.array([3, 3, 3, 7, 7, 7])).predict(np.array([[-1.0], [2.0]]))
    array([3, 7])
    """
    if len(np.unique(labels)) < 2:
        raise ValueError("a probe needs objects of at least two classes")
    mean, scale = what.mean(axis=0, dtype=np.float64), what.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)
    inputs = ((what - mean) / scale).astype(np.float64)
    order = np.random.default_rng(seed).permutation(len(inputs))[:search_objects]
    with _one_thread():
        scores = _cross_validate(inputs[order], labels[order], sorted(strengths), folds, max_iterations)
        strength = sorted(strengths)[int(np.argmax(scores))]
        classifier = _fit(inputs, labels, strength, max_iterations)
    return Probe(mean, scale, classifier, strength, len(inputs))


def classification_scores(
    predicted: Int[np.ndarray, " k"], truth: Int[np.ndarray, " k"], n_truth: int
) -> dict[str, float | None]:
    """How well the labels of matched objects are told.

    Args:
        predicted: the probe's label for each matched object.
        truth: the label of the true object it is matched with.
        n_truth: all true objects, matched or not.

    Returns:
        ``matched_accuracy`` and ``matched_macro_f1`` (mean F1 over the classes that occur, on matched objects; None
        when nothing is matched), ``matched_share`` and ``end_to_end_accuracy`` (right / all true objects; None when
        there is no true object).

    >>> scores = classification_scores(np.array([1, 2, 2]), np.array([1, 2, 1]), n_truth=4)
    >>> scores["matched_share"], scores["end_to_end_accuracy"], round(scores["matched_macro_f1"], 4)
    (0.75, 0.5, 0.6667)
    """
    right = int((predicted == truth).sum())
    return {
        "matched_accuracy": right / len(truth) if len(truth) else None,
        "matched_macro_f1": _macro_f1(predicted, truth) if len(truth) else None,
        "matched_share": len(truth) / n_truth if n_truth else None,
        "end_to_end_accuracy": right / n_truth if n_truth else None,
    }


def _macro_f1(predicted: Int[np.ndarray, " k"], truth: Int[np.ndarray, " k"]) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) of each class that is predicted or true, averaged."""
    values = []
    for label in np.union1d(predicted, truth):
        hits = np.count_nonzero((predicted == label) & (truth == label))
        values.append(2 * hits / (np.count_nonzero(predicted == label) + np.count_nonzero(truth == label)))
    return float(np.mean(values))


def _one_thread() -> AbstractContextManager[Any]:
    """One thread for BLAS: the probe's products are small, and threads that spin on a busy machine made it 100 times
    slower. Looking for the libraries takes longer than a small fit, so all fits of a probe share one limit."""
    try:
        import sklearn.linear_model  # noqa: F401
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the probe needs scikit-learn: {how_to_install('eval')}", name=error.name
        ) from error
    limits: AbstractContextManager[Any] = threadpool_limits(1)
    return limits


def _fit(inputs: np.ndarray, labels: np.ndarray, strength: float, max_iterations: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # A weakly regularised fit may stop at the iteration limit, a little short of its optimum; it is judged as it
        # is by the cross-validation.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # Few objects of many classes are what was found; the figures say how little that teaches.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than")
        return LogisticRegression(C=strength, max_iter=max_iterations).fit(inputs, labels)


def _cross_validate(
    inputs: np.ndarray, labels: np.ndarray, strengths: list[float], folds: int, max_iterations: int
) -> list[float]:
    """Mean accuracy of each strength over ``folds`` interleaved folds that share the classes out evenly."""
    # Rows come shuffled; sorting them by label and dealing them out in turn stratifies any class sizes.
    fold = np.empty(len(labels), np.int64)
    fold[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % folds
    totals = np.zeros(len(strengths))
    for k in range(folds):
        train, held_out = fold != k, fold == k
        if len(np.unique(labels[train])) < 2 or not held_out.any():
            continue
        for i, strength in enumerate(strengths):
            classifier = _fit(inputs[train], labels[train], strength, max_iterations)
            totals[i] += (classifier.predict(inputs[held_out]) == labels[held_out]).mean()
    return (totals / folds).tolist()
