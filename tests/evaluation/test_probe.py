from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ssdir.evaluation.probe import classification_scores, fit_probe


def clusters(n: int, n_classes: int = 4, size: int = 8, spread: float = 1.0, seed: int = 0):
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(n_classes, size)) * 3
    labels = generator.integers(0, n_classes, n)
    what = centres[labels] + spread * generator.normal(size=(n, size))
    return (what * 50 + 7).astype(np.float32), labels  # an odd scale, which standardising must undo


def test_a_code_of_the_label_is_read_perfectly():
    what, labels = clusters(300, spread=0.01)
    test, truth = clusters(100, spread=0.01, seed=1)
    predicted = fit_probe(what, labels).predict(test)
    scores = classification_scores(predicted, truth, n_truth=len(truth))
    assert scores == {
        "matched_accuracy": 1.0, "matched_macro_f1": 1.0, "matched_share": 1.0, "end_to_end_accuracy": 1.0,
    }  # fmt: skip


def test_equals_a_plain_pipeline_at_the_chosen_strength():
    what, labels = clusters(400, spread=3.0)
    test, _ = clusters(200, spread=3.0, seed=1)
    probe = fit_probe(what, labels)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=probe.strength, max_iter=500))
    assert (plain.fit(what, labels).predict(test) == probe.predict(test)).mean() >= 0.99


def test_noise_stays_at_chance():
    generator = np.random.default_rng(0)
    what, labels = generator.normal(size=(600, 40)), generator.integers(0, 4, 600)
    test, truth = generator.normal(size=(600, 40)), generator.integers(0, 4, 600)
    assert abs((fit_probe(what, labels).predict(test) == truth).mean() - 0.25) < 0.06


def test_cross_validation_chooses_the_strength_that_generalises():
    generator = np.random.default_rng(0)
    labels = (generator.random(300) < 0.2).astype(np.int64)
    what = labels[:, None] + 0.3 * generator.normal(size=(300, 5))
    # With next to no weight allowed, every row gets the larger class: 80 % right instead of nearly all.
    assert fit_probe(what, labels, strengths=(1e-9, 1.0)).strength == 1.0
    # A tie goes to the stronger regularisation.
    assert fit_probe(labels[:, None] * 9.0, labels, strengths=(1.0, 10.0, 100.0)).strength == 1.0


def test_is_deterministic():
    what, labels = clusters(500, spread=4.0)
    first, second = (fit_probe(what, labels, search_objects=200) for _ in range(2))
    assert first.strength == second.strength
    assert np.array_equal(first.classifier.coef_, second.classifier.coef_)


def test_constant_dimensions_and_early_stops_leave_no_warning_behind():
    what, labels = clusters(200, spread=2.0)
    what[:, 0] = 5.0
    assert np.isfinite(fit_probe(what, labels, max_iterations=1, strengths=(1e6,)).classifier.coef_).all()


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (50, 1), (1, 1, 1)])
def test_tiny_training_sets_fit(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    what = labels[:, None] * 10.0 + np.arange(3.0)
    assert set(fit_probe(what, labels).predict(what)) <= set(labels)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="two classes"):
        fit_probe(np.ones((5, 2)), np.zeros(5, np.int64))


def test_scores_equal_scikit_learn():
    generator = np.random.default_rng(1)
    predicted, truth = generator.integers(0, 6, 80), generator.integers(0, 5, 80)
    scores = classification_scores(predicted, truth, n_truth=100)
    assert scores["matched_accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert scores["matched_macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert scores["matched_share"] == 0.8
    assert scores["end_to_end_accuracy"] == pytest.approx((predicted == truth).sum() / 100)


def test_scores_of_nothing():
    none = np.zeros(0, np.int64)
    assert classification_scores(none, none, n_truth=0) == dict.fromkeys(
        ("matched_accuracy", "matched_macro_f1", "matched_share", "end_to_end_accuracy")
    )
    missed = classification_scores(none, none, n_truth=5)
    assert missed["matched_share"] == missed["end_to_end_accuracy"] == 0.0
    what, labels = clusters(50)
    assert len(fit_probe(what, labels).predict(what[:0])) == 0
