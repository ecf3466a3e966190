"""A worker on a study whose trials train nothing; started as a process by the tests.

Arguments: storage, folder, number of trials, seconds that a trial takes, number of a trial that never ends (or -1).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ssdir.study.engine import Pace, make_sampler, open_storage, open_study, top_up, work


def main() -> None:
    storage, folder, trials, seconds, stuck = sys.argv[1:]
    out = Path(folder)
    study = open_study(open_storage(storage, out), "toy", False, make_sampler("random", 0))

    def objective(trial: Any) -> float:
        x = trial.suggest_float("x", -1.0, 1.0)
        if trial.number == int(stuck):
            (out / "stuck").write_text(str(trial.number))
            time.sleep(600)
        time.sleep(float(seconds))
        return float(x * x)

    work(study, objective, top_up(int(trials)), out / "lock", Pace(0.3, 2.5))


if __name__ == "__main__":
    main()
