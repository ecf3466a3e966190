"""The commands ``ssdir tune`` and ``ssdir ablate``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from ssdir.cli.tree import Node, Unprefixed, preset_choice, with_defaults
from ssdir.common.console import say
from ssdir.common.errors import ConfigError
from ssdir.common.ownership import claim
from ssdir.config import SSDIRRun
from ssdir.config.presets import PRESETS
from ssdir.search.ablate import Scale
from ssdir.search.database import GRACE_PERIOD, existing_study, outage_told
from ssdir.search.tune import Objective, Pruner, Sampler, TuneConfig


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Search for settings of SSDIR.

    Give the same command to any number of processes that see OUT: they share one study (on several machines with a
    database server, --storage). It ends when it has --trials finished trials; given again with more, it goes on. The
    trial of a worker that is killed is marked failed and tried once more.
    """

    out: Path
    """The study's folder: detector, trials, database, report."""
    data: Path | None = None
    """Dataset folder with a train split, and a val split on which trials are measured. Only --report goes without."""
    trials: int = 50
    """Finished trials (complete or pruned) of the whole study."""
    space: tuple[str, ...] = ()
    """Changes to the search space: NAME=LOW:HIGH, NAME=log:LOW:HIGH, NAME=A,B,C or NAME=off, such as
    objective.what=log:0.1:10 model.z_what_size=64,128 model.n_hidden=off."""
    objective: Objective = "object_mse"
    """Of the val split. A validation's: loss (weighed as in the preset), image, objects, what, depth, image_mse. An
    evaluation's, at the end of a trial: object_mse, probe_accuracy, end_to_end; these prune by objects."""
    sampler: Sampler = "tpe"
    """What proposes settings: tpe, gp (Gaussian process), random."""
    pruner: Pruner = "hyperband"
    """What ends hopeless trials: hyperband, median, none."""
    study: str = "tune"
    """Name of the study."""
    storage: str | None = None
    """The database: an SQLite file (default: OUT/study.db) for the workers of one machine,
    postgresql://USER:PASSWORD@HOST/DATABASE or mysql://... for many machines."""
    detector: Path | None = None
    """Run folder of a detector (default: the preset's is trained once, by one worker)."""
    teacher: Path | None = None
    """Run folder of a teacher (default: the preset's, where objective.teacher is above 0)."""
    seed: int = 0
    """Of the proposals."""
    grace_period: Annotated[int, tyro.conf.arg(aliases=("--patience",))] = GRACE_PERIOD
    """Seconds without a heartbeat after which a worker counts as dead."""
    report: bool = False
    """Run nothing; draw history, importance and slices of the study so far into OUT/report."""
    run_config: Unprefixed[SSDIRRun] = field(default_factory=SSDIRRun)
    preset: ClassVar[str]

    def run(self) -> int:
        from ssdir.search.space import make_space
        from ssdir.search.tune import tune

        if self.report:
            return self._told(existing_study(self.storage, self.out, self.study))
        if self.data is None:
            raise ConfigError("trials are trained and measured on a data set; give --data DIR")
        config = TuneConfig(
            preset=self.preset,
            run=self.run_config,
            data=self.data,
            out=self.out,
            space=make_space(self.run_config, self.space),
            trials=self.trials,
            objective=self.objective,
            sampler=self.sampler,
            pruner=self.pruner,
            study=self.study,
            storage=self.storage,
            detector=self.detector,
            teacher=self.teacher,
            seed=self.seed,
            grace_period=self.grace_period,
        )
        return self._told(tune(config))

    @outage_told()
    def _told(self, study: Any) -> int:
        from ssdir.search.report import write_study_report
        from ssdir.search.tune import best_command

        claim(self.out / "report", "tune")
        say(str(write_study_report(study, self.out / "report")))
        say(best_command(study))
        return 0


def tune_commands() -> Node:
    """``ssdir tune`` and the words after it."""
    presets = {
        name: Node(f"settings about those of the preset {name}", command=_tune(name, item.ssdir))
        for name, item in PRESETS.items()
    }
    return preset_choice("Search for settings of SSDIR; name a preset.", presets)


def _tune(name: str, run: SSDIRRun) -> Callable[[], Any]:
    """The command of one preset."""

    def build() -> Any:
        return dataclasses.make_dataclass(
            "Tune",
            [],
            bases=(with_defaults(Tune, run_config=run)(),),
            frozen=True,
            kw_only=True,
            namespace={"__doc__": Tune.__doc__, "preset": name},
        )

    return build


@dataclass(frozen=True, kw_only=True)
class Ablate:
    """The ablation study over grids and digit sizes: 45 datasets, each with its detector, SSDIR and evaluation.

    Give the same command to any number of processes that see both folders; killed, it goes on when given again. One
    table (ablation.md, .csv) and one figure (.png) are written to OUT.
    """

    data_root: Path
    """Folder of the datasets, one folder for each combination."""
    out: Path | None = None
    """Folder for runs, table and figure (default: DATA_ROOT/study)."""
    grids: tuple[str, ...] = ("*",)
    """Patterns of grids: 2to5 2to6 3to5 3to6 4to6, or 2to*."""
    minimum: tuple[str, ...] = ("*",)
    """Patterns of smallest digit sizes: 96 128 160."""
    maximum: tuple[str, ...] = ("*",)
    """Patterns of largest digit sizes: 256 320 384."""
    scale: Scale = "full"
    """full: the paper's, for GPUs. small: 128 px, few scenes, short trainings; all 45 in hours on two cores."""
    storage: str | None = None
    """The study's database: an SQLite file (default: OUT/study.db), or a URL as for ssdir tune."""
    workers: int | None = None
    """Processes that generate scenes (default: one per core)."""
    grace_period: Annotated[int, tyro.conf.arg(aliases=("--patience",))] = GRACE_PERIOD
    """Seconds without a heartbeat after which a worker counts as dead."""

    def run(self) -> int:
        from ssdir.search.ablate import AblationConfig, ablate, combinations

        out = self.out or self.data_root / "study"
        config = AblationConfig(
            data_root=self.data_root,
            out=out,
            chosen=combinations(self.grids, self.minimum, self.maximum),
            scale=self.scale,
            storage=self.storage,
            workers=self.workers,
            grace_period=self.grace_period,
        )
        rows = ablate(config)
        done = {row["combination"] for row in rows}
        missing = [item.name for item in config.chosen if item.name not in done]
        if rows:
            say(f"{len(rows)} of 45 combinations in {out / 'ablation.md'}; look at {out / 'ablation.png'}")
        if missing:
            print(f"error: {', '.join(missing)} failed; give the command again to try again", file=sys.stderr)
        return 1 if missing else 0
