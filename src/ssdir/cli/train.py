"""The commands of ``ssdir train``: one for each kind of model, each with its presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from ssdir.baselines.kinds import BASELINES, BaselineKind
from ssdir.cli.resuming import began_with_imagenet, given_path, goes_on
from ssdir.cli.tree import Node, Unprefixed, preset_choice, with_defaults
from ssdir.common.errors import ConfigError
from ssdir.config import DetectorRun, SSDIRRun
from ssdir.config.presets import PRESETS, named_scenes

Tracker = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True)
class _Train:
    """The options of every training."""

    out: Path
    """Run folder to make."""
    data: Path | None = None
    """Dataset folder: images/{train,val} and annotations/{train,val}.json. Beside --scenes: the folder whose val split
    validates (default: val scenes on the fly)."""
    scenes: tuple[str, ...] = ()
    """Train on scenes generated on the fly, without files: a preset of ssdir data mnist-scenes, then perhaps
    parameters, such as: main seed=3 grids=[[2,2],[3,3]]."""
    digits: str = "embedded"
    """Of the scenes: "embedded" or a folder with MNIST's four IDX files."""
    resume: bool = False
    """Continue the run in OUT exactly where its last checkpoint stands, with its settings, data and detector; no preset
    is needed then."""
    allow_changed: tuple[str, ...] = ()
    """Settings that may differ from the run that is resumed, e.g. training.steps."""
    track: tuple[Tracker, ...] = ()
    """Also log to these (metrics.csv is always written)."""
    device: str = "auto"
    """Where to train: auto (a GPU where there is one, else the CPU), cpu, cuda, cuda:1, mps. Processes of torchrun take
    a GPU each (auto, cuda), or the CPU (cpu). A checkpoint's training.json tells which kind it was."""

    def loop_options(self) -> dict[str, Any]:
        """The options of :func:`ssdir.training.start.train` itself."""
        options = {
            "resume": self.resume,
            "allow_changed": self.allow_changed,
            "track": self.track,
            "device": self.device,
        }
        return options | ({"validation": self.data} if self.scenes else {})

    def images(self) -> Any:
        """What :func:`ssdir.training.start.train` trains on: the dataset folder, or scenes on the fly."""
        if self.scenes:
            from ssdir.data.mnist.streaming import StreamedScenes

            return StreamedScenes(named_scenes(*self.scenes), digits=self.digits)
        if self.data is None:
            raise ConfigError(
                "there is nothing to train on: name a dataset folder (--data DIR) or scenes (--scenes main)"
            )
        if self.digits != "embedded":
            raise ConfigError("--digits is for scenes generated on the fly; name them, too: --scenes main")
        return self.data


@dataclass(frozen=True, kw_only=True)
class TrainDetector(_Train):
    """Train an SSD detector on a dataset folder."""

    run_config: Unprefixed[DetectorRun] = field(default_factory=DetectorRun)
    imagenet: Path | None = None
    """Official ImageNet weights of VGG11-BN (vgg11_bn-6002323d.pth) to start from."""
    imagenet_download: bool = False
    """Download those weights (507 MiB) into the cache, checked by hash."""

    def run(self) -> int:
        from ssdir.training.start import train_detector

        train_detector(
            self.run_config,
            self.images(),
            self.out,
            **self.loop_options(),
            imagenet=self.imagenet,
            imagenet_download=self.imagenet_download or (self.resume and began_with_imagenet(self.out)),
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class TrainSSDIR(_Train):
    """Train SSDIR on a trained, frozen detector, or on boxes. No class label is used."""

    detector: Path | None = None
    """Run folder of the detector."""
    boxes: Path | None = None
    """A file of boxes in a detector's place: COCO results (image_id, bbox, score) of any detector, or annotations."""
    run_config: Unprefixed[SSDIRRun] = field(default_factory=SSDIRRun)
    teacher: Path | None = None
    """Run folder of an SSDIR with glimpses that teaches this one, which has cells (quickstart-cells wants one)."""

    def run(self) -> int:
        from ssdir.training.start import train_ssdir

        train_ssdir(
            self.run_config,
            self.detector,
            self.images(),
            self.out,
            teacher=self.teacher,
            boxes=self.boxes,
            **self.loop_options(),
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class TrainBaseline(_Train):
    """The options of a baseline's training; each kind has its own settings, ``run_config``."""

    kind: ClassVar[str]
    run_config: Any = None

    def detector_run(self) -> Path | None:
        """The detector that the kind stands on, where it does."""
        return None

    def run(self) -> int:
        from ssdir.training.start import train_baseline

        train_baseline(
            self.kind,
            self.run_config,
            self.images(),
            self.out,
            detector=self.detector_run(),
            **self.loop_options(),
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class TrainOnDetector(TrainBaseline):
    """A baseline that stands on a detector."""

    detector: Path
    """Run folder of the detector, which stays frozen."""

    def detector_run(self) -> Path | None:
        return self.detector


def train_commands() -> dict[str, Node]:
    """The words after ``ssdir train``."""
    about = {
        "mnist": "the paper's MNIST column, 300 px; wants a GPU",
        "clevr": "the paper's CLEVR column, 300 px; wants a GPU",
        "wider": "the paper's WIDER column, 300 px; wants a GPU",
        "quickstart": "digits at 128 px, for a CPU",
        "quickstart-cells": "the same with the paper's single-shot encoder, for a CPU",
        "scenes": "objects before a background, such as CLEVR's, at 192 px, for a CPU",
        "small": "your own photographs at 192 px, for a laptop; the detector tells their classes",
    }
    detectors = {
        name: Node(about[name], command=with_defaults(TrainDetector, run_config=item.detector))
        for name, item in PRESETS.items()
    }
    models = {
        name: Node(about[name], command=with_defaults(TrainSSDIR, run_config=item.ssdir))
        for name, item in PRESETS.items()
    }
    return {
        "detector": preset_choice(
            "Train an SSD detector; name a preset.",
            detectors,
            partial(goes_on, "detector", TrainDetector, detectors),
        ),
        "ssdir": preset_choice(
            "Train SSDIR on a trained detector; name a preset.",
            models,
            partial(goes_on, "ssdir", TrainSSDIR, models),
        ),
        **{name: _baseline(name, kind) for name, kind in BASELINES.items()},
    }


def suggested_preset(words: Sequence[str], presets: Iterable[str]) -> str:
    """The preset to name as an example: ``small`` for data of one's own, else the first.

    >>> suggested_preset(["--data", "D"], ["quickstart", "small"]), suggested_preset([], ["quickstart", "small"])
    ('small', 'quickstart')
    """
    names, data = list(presets), given_path(words, "--data")
    if data is None or "small" not in names:
        return names[0]
    from ssdir.common.storage import read_json
    from ssdir.data.making import MANIFEST

    manifest = read_json(data / MANIFEST) if (data / MANIFEST).is_file() else None
    ours = isinstance(manifest, dict) and manifest.get("kind") == "multiscale-mnist"
    return names[0] if ours else "small"


def _baseline(name: str, kind: BaselineKind) -> Node:
    presets = {
        key: Node(item.help, command=_baseline_command(name, kind, item.run))
        for key, item in kind.presets.items()
    }
    return preset_choice(
        f"Train {kind.about}; name a preset.",
        presets,
        lambda words: goes_on(name, _baseline_command(name, kind, kind.run())(), presets, words),
    )


def _baseline_command(name: str, kind: BaselineKind, run: Any) -> Callable[[], Any]:
    """The command of one preset: its class has the settings of its kind as options."""

    def build() -> Any:
        unprefixed: Any = Unprefixed  # of a type that is only known here
        settings = ("run_config", unprefixed[kind.run], field(default=run))
        return dataclasses.make_dataclass(
            "TrainBaseline",
            [settings],
            bases=(TrainOnDetector if kind.needs_detector else TrainBaseline,),
            frozen=True,
            kw_only=True,
            namespace={"__doc__": f"Train {kind.about}.", "kind": name},
        )

    return build
