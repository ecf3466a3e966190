"""TPE against random search: on a toy objective, and on a small SSDIR that trains in seconds.

    python -m benchmarks.search toy
    python -m benchmarks.search model --out DIR --trials 20 --seeds 5

``model`` generates scenes and trains the detector once, then runs one study for each sampler and seed; interrupted, it
goes on when it is called again. Both print the mean difference of the best values found (random minus TPE: above 0,
TPE is better) and its 95% interval, a bootstrap over the seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssdir.evaluation.bootstrap import Estimate, Resamples

SAMPLERS = ("tpe", "random")


def toy(trial: Any) -> float:
    """A narrow valley in five settings, as losses have in learning rates and coefficients; its least value is 0.

    The sum of the squared distances, in decades, of a learning rate from 1e-3 and of a coefficient from that rate
    times 1,000; of a width from 128 in doublings, weighed 0.1; two settings hardly matter (0.01).
    """
    rate = math.log10(trial.suggest_float("rate", 1e-5, 1e-1, log=True))
    weight = math.log10(trial.suggest_float("weight", 1e-2, 1e2, log=True))
    width = math.log2(trial.suggest_categorical("width", [32, 64, 128, 256, 512]))
    rest = trial.suggest_float("sigma", 0.0, 1.0) - 0.5, trial.suggest_int("layers", 0, 4) - 2
    return (
        (rate + 3) ** 2 + (weight - rate - 3) ** 2 + 0.1 * (width - 7) ** 2 + 0.01 * sum(x * x for x in rest)
    )


def best_of_toy(sampler: str, seed: int, trials: int = 40) -> float:
    """Least value that a sampler finds."""
    from ssdir.search.database import optuna_module
    from ssdir.search.engine import make_sampler

    study = optuna_module().create_study(sampler=make_sampler(sampler, seed))
    study.optimize(toy, n_trials=trials)
    return float(study.best_value)


def best_of_model(out: Path, sampler: str, seed: int, trials: int) -> float:
    """Least per-object error of a small SSDIR (the val term ``objects``) that a sampler finds."""
    from ssdir.common.console import progress_bar
    from ssdir.config.presets import preset
    from ssdir.data.mnist.scenes import generate
    from ssdir.search.shared import made_once
    from ssdir.search.space import make_space
    from ssdir.search.tune import TuneConfig, tune
    from ssdir.training.start import train_detector

    chosen = preset("quickstart")
    assert chosen.scenes is not None
    scenes = dataclasses.replace(chosen.scenes, n_train=600, n_val=100, n_test=1)
    with progress_bar("generating scenes", 701) as progress:
        generate(scenes, out / "data", progress=progress)
    detector, folder = shortened(chosen.detector, 200), out / "detector"
    made_once(folder, lambda: train_detector(detector, out / "data", folder, resume=folder.exists()) and None)
    run = shortened(chosen.ssdir, 60)
    objective = dataclasses.replace(run.objective, image=1.0)
    model = dataclasses.replace(run.model, decoder_channels=(32, 32, 16, 16), glimpse_width=16)
    run = dataclasses.replace(run, objective=objective, model=model)
    study = tune(
        TuneConfig(
            preset="quickstart",
            run=run,
            data=out / "data",
            out=out / f"{sampler}-{seed}",
            space=make_space(run),
            trials=trials,
            objective="objects",
            sampler=sampler,
            pruner="none",
            detector=folder,
            seed=seed,
        )
    )
    return float(study.best_value)


def shortened(run: Any, steps: int) -> Any:
    """A run with so many steps, and batches of 16 images."""
    training = dataclasses.replace(run.training, steps=steps, batch_size=16, warmup_steps=steps // 10)
    return dataclasses.replace(run, training=training)


def difference(of_random: Sequence[float], of_tpe: Sequence[float]) -> Estimate:
    """Mean of random minus TPE over the seeds, with its interval."""
    values = np.asarray(of_random) - np.asarray(of_tpe)
    estimate = Resamples(len(values), 10_000).ratio(values, np.ones(len(values)))
    assert estimate is not None
    return estimate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("toy", "model"))
    parser.add_argument("--out", type=Path, default=Path("out/search"))
    parser.add_argument("--trials", type=int, default=None, help="of each study (default: toy 40, model 20)")
    parser.add_argument("--seeds", type=int, default=None, help="default: toy 20, model 5")
    asked = parser.parse_args()
    seeds = range(asked.seeds or (20 if asked.what == "toy" else 5))
    best: dict[str, list[float]] = {sampler: [] for sampler in SAMPLERS}
    for seed in seeds:
        for sampler in SAMPLERS:
            if asked.what == "toy":
                value = best_of_toy(sampler, seed, asked.trials or 40)
            else:
                value = best_of_model(asked.out, sampler, seed, asked.trials or 20)
            best[sampler].append(value)
            print(f"seed {seed}, {sampler}: {value:.5g}", flush=True)
    found = difference(best["random"], best["tpe"])
    medians = ", ".join(f"{sampler} {np.median(values):.5g}" for sampler, values in best.items())
    print(f"medians: {medians}")
    print(f"random minus TPE: {found.value:.5g} [{found.low:.5g}, {found.high:.5g}] over {len(seeds)} seeds")


if __name__ == "__main__":
    main()
