"""A worker on a study whose trials train nothing; started as a process by the tests.

Arguments: storage, folder, number of trials, seconds that a trial takes, number of a trial that never ends (or -1).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ssdir.common.errors import UserError
from ssdir.search.database import open_storage
from ssdir.search.engine import fewer_than, make_sampler, open_study, work


def main() -> None:
    storage, folder, trials, seconds, stuck = sys.argv[1:]
    out = Path(folder)
    study = open_study(open_storage(storage, out, grace_period=3), "toy", False, make_sampler("random", 0))

    def objective(trial: Any) -> float:
        x = trial.suggest_float("x", -1.0, 1.0)
        if trial.number == int(stuck):
            (out / "stuck").write_text(str(trial.number))
            time.sleep(600)
        time.sleep(float(seconds))
        return float(x * x)

    work(study, objective, fewer_than(int(trials)), out / "lock")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
