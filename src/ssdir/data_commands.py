"""The commands of ``ssdir data``: make, check and look at datasets."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ssdir.command_tree import Node, Unprefixed, leaf, with_defaults
from ssdir.config import ConfigError, ScenesConfig
from ssdir.presets import scenes_presets


@dataclass(frozen=True)
class MnistScenes:
    """Generate a Multi-scale scattered MNIST dataset (COCO annotations, PNG images).

    Every image is a pure function of (seed, split, index). A killed run continues where it stopped when the same
    command is given again.
    """

    out: Path
    """Folder of the dataset."""
    scenes: Unprefixed[ScenesConfig]
    digits: str = "embedded"
    """"embedded" (6,000 train and 1,000 test digits inside the package) or a folder with MNIST's four IDX files."""
    download: bool = False
    """Download MNIST (12 MB) into the folder named by --digits first, if it is not there."""
    workers: int | None = None
    """Processes (default: one per core); the bytes do not depend on it."""

    def run(self) -> int:
        from ssdir.console import progress_bar
        from ssdir.data.digits import download_mnist
        from ssdir.data.multiscale_mnist import generate

        if self.download:
            if self.digits == "embedded":
                raise ConfigError("--download needs a folder to download into: --digits FOLDER --download")
            with progress_bar("downloading MNIST", 0) as tell:
                download_mnist(Path(self.digits), progress=lambda _, done, of: tell(done, of))
        total = self.scenes.n_train + self.scenes.n_val + self.scenes.n_test
        with progress_bar("generating scenes", total) as progress:
            generate(self.scenes, self.out, digits=self.digits, workers=self.workers, progress=progress)
        print(f"{total:,} scenes in {self.out} (ssdir data show {self.out})")
        return 0


@dataclass(frozen=True)
class Clevr:
    """Make a dataset of CLEVR's official folder, with exact boxes.

    Cameras are recovered from the scenes; boxes, visible boxes and masks follow from the objects' true shapes.
    Images are copied as they are. A killed run continues where it stopped when the same command is given again.
    """

    root: Path
    """The unpacked archive (CLEVR_v1.0): images/{split}/ and scenes/CLEVR_{split}_scenes.json."""
    out: Path
    """Folder of the dataset."""
    splits: tuple[str, ...] = ()
    """Which splits (default: all that have scenes; the official test split has none)."""
    masks: bool = False
    """Write masks/{split}/NAME.png too: which object each pixel shows."""
    hold_out: tuple[str, ...] = ()
    """Make splits out of the train scenes, by share: --hold-out val=0.1 test=0.1."""
    skip_missing: bool = False
    """Leave out scenes whose image is not there (of a partly unpacked archive)."""
    skip_unfit: bool = False
    """Leave out scenes that fit no camera, instead of stopping."""
    workers: int | None = None
    """Processes (default: one per core); the bytes do not depend on it."""

    def run(self) -> int:
        from ssdir.console import progress_bar
        from ssdir.data.clevr import convert

        shares = dict(map(_share, self.hold_out))
        counts = convert(
            self.root,
            self.out,
            self.splits,
            masks=self.masks,
            hold_out=shares,
            skip_missing=self.skip_missing,
            skip_unfit=self.skip_unfit,
            workers=self.workers,
            progress=progress_bar,
        )
        made = ", ".join(f"{split} {number:,}" for split, number in counts.items())
        print(f"scenes in {self.out}: {made} (ssdir data show {self.out})")
        return 0


def _share(text: str) -> tuple[str, float]:
    split, _, share = text.partition("=")
    try:
        return split, float(share)
    except ValueError as error:
        raise ConfigError(f"--hold-out {text}: give a split and its share, such as val=0.1") from error


@dataclass(frozen=True)
class DataCheck:
    """Tell what is wrong in a dataset folder, file by file; exit code 1 when something is."""

    folder: Positional[Path]
    """images/{train,val,test} beside annotations/{train,val,test}.json."""
    json: bool = False
    """Print the problems as JSON."""

    def run(self) -> int:
        from ssdir.console import progress_bar
        from ssdir.data.check import check
        from ssdir.data.folder import open_split, splits

        with progress_bar("checking images", 0) as progress:
            problems = check(self.folder, progress)
        errors = [problem for problem in problems if problem.severity == "error"]
        if self.json:
            print(json.dumps([dataclasses.asdict(problem) for problem in problems], default=str, indent=2))
        else:
            for problem in problems:
                named = problem.message.startswith(str(problem.file))
                print(f"{problem.severity}: {'' if named else f'{problem.file}: '}{problem.message}")
            if not errors:
                for name in splits(self.folder):
                    split = open_split(self.folder, name)
                    print(f"{name}: {len(split.images):,} images, {len(split.labels):,} objects")
            print(f"{self.folder}: errors: {len(errors)}, warnings: {len(problems) - len(errors)}")
        return 1 if errors else 0


@dataclass(frozen=True)
class DataShow:
    """Draw images of a dataset with their boxes and classes."""

    folder: Positional[Path]
    """The dataset."""
    out: Path = Path("out/show.png")
    """The picture to write."""
    split: str | None = None
    """Which split (default: the first of test, val, train that exists)."""
    first: int = 0
    """Index of the first image shown."""
    count: int = 12
    """How many images."""

    def run(self) -> int:
        from ssdir.figures.dataset import show_dataset

        print(show_dataset(self.folder, self.out, self.split, self.first, self.count))
        return 0


def data_commands() -> dict[str, Node]:
    """The words after ``ssdir data``."""
    scenes = {
        name: Node(text, command=with_defaults(MnistScenes, scenes=config))
        for name, (text, config) in scenes_presets().items()
    }
    return {
        "mnist-scenes": Node(
            "Generate Multi-scale scattered MNIST; name a preset.", words=scenes, noun="preset"
        ),
        "clevr": leaf(Clevr),
        "check": leaf(DataCheck),
        "show": leaf(DataShow),
    }
