"""TPE is better than random search on the toy objective."""

from __future__ import annotations

import optuna
from benchmarks.search import best_of_toy, difference, toy


def test_the_toy_has_its_least_value_where_it_says() -> None:
    best = {"rate": 1e-3, "weight": 1.0, "width": 128, "sigma": 0.5, "layers": 2}
    assert abs(toy(optuna.trial.FixedTrial(best))) < 1e-20
    assert abs(toy(optuna.trial.FixedTrial(best | {"rate": 1e-2})) - 2.0) < 1e-12


def test_tpe_beats_random_search() -> None:
    best = {name: [best_of_toy(name, seed, trials=40) for seed in range(20)] for name in ("tpe", "random")}
    found = difference(best["random"], best["tpe"])
    assert 0.05 < found.low < found.value
