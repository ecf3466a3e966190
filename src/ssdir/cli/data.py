"""The commands of ``ssdir data``: make, check and look at datasets."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ssdir.cli.tree import Node, Unprefixed, leaf, with_defaults
from ssdir.common.console import say
from ssdir.common.errors import ConfigError
from ssdir.config import ClevrLikeConfig, ScenesConfig
from ssdir.config.presets import scenes_presets
from ssdir.data.shards import Shard, parse_shard


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
    shard: str | None = None
    """Make only this share of the images, such as 3/8, so that several jobs that share a disk make the folder."""
    merge: bool = False
    """Verify and finish a folder whose shards are all made."""

    def run(self) -> int:
        from ssdir.common.console import progress_bar
        from ssdir.data.mnist.digits import download_mnist
        from ssdir.data.mnist.scenes import generate

        if self.download:
            if self.digits == "embedded":
                raise ConfigError("--download needs a folder to download into: --digits FOLDER --download")
            with progress_bar("downloading MNIST", 0) as tell:
                download_mnist(Path(self.digits), progress=lambda _, done, of: tell(done, of))
        total = self.scenes.n_train + self.scenes.n_val + self.scenes.n_test
        with progress_bar("generating scenes", total) as progress:
            generate(
                self.scenes,
                self.out,
                self.digits,
                self.workers,
                progress,
                _shard(self.shard, self.merge),
                self.merge,
            )
        say(_made(self.out, total, self.shard))
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
        from ssdir.common.console import progress_bar
        from ssdir.data.clevr.convert import convert

        shares = _shares(self.hold_out)
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
        say(f"scenes in {self.out}: {made} (ssdir data show {self.out})")
        return 0


@dataclass(frozen=True)
class ClevrLike:
    """Render scenes like CLEVR's, with exact boxes (needs the extra [render]).

    Scenes are placed by CLEVR's rules. The folder is a dataset and, with scenes/, one in CLEVR's own layout. A killed
    run continues where it stopped when the same command is given again.
    """

    out: Path
    """Folder of the dataset."""
    scenes: Unprefixed[ClevrLikeConfig] = dataclasses.field(default_factory=ClevrLikeConfig)
    workers: int | None = None
    """Processes (default: one per core); the bytes do not depend on it."""
    shard: str | None = None
    """Make only this share of the images, such as 3/8, so that several jobs that share a disk make the folder."""
    merge: bool = False
    """Verify and finish a folder whose shards are all made."""

    def run(self) -> int:
        from ssdir.common.console import progress_bar
        from ssdir.data.clevr.generate import generate

        total = self.scenes.n_train + self.scenes.n_val + self.scenes.n_test
        with progress_bar("rendering scenes", total) as progress:
            shard = _shard(self.shard, self.merge)
            generate(self.scenes, self.out, self.workers, progress, shard, self.merge)
        say(_made(self.out, total, self.shard))
        return 0


def _shard(text: str | None, merge: bool) -> Shard | None:
    """The shard to make, if any."""
    if text is not None and merge:
        raise ConfigError("--merge finishes what all shards have made; give it in a call without --shard")
    return None if text is None else parse_shard(text)


def _made(out: Path, total: int, shard: str | None) -> str:
    """What a command says at its end."""
    if shard is None:
        return f"{total:,} scenes in {out} (ssdir data show {out})"
    return f"shard {shard} of {total:,} scenes in {out} is made; when all are, --merge instead of --shard finishes it"


def _shares(texts: tuple[str, ...]) -> dict[str, float]:
    """Split -> share."""
    pairs = [_share(text) for text in texts]
    if len(dict(pairs)) < len(pairs):
        raise ConfigError(f"--hold-out {' '.join(texts)}: name each split once")
    return dict(pairs)


def _share(text: str) -> tuple[str, float]:
    split, _, share = text.partition("=")
    try:
        return split, float(share)
    except ValueError as error:
        raise ConfigError(f"--hold-out {text}: give a split and its share, such as val=0.1") from error


@dataclass(frozen=True, kw_only=True)
class WiderFace:
    """Make a dataset of WIDER FACE from its official archives.

    Left out: faces flagged invalid, boxes without size, and faces whose width is below --min-side-share of the
    image's width or whose height is below that share of its height; then images without any face left. How many, and
    why, is printed and written to dataset.json. JPEGs keep their bytes. A killed run continues where it stopped when
    the same command is given again.
    """

    root: Path
    """Folder with WIDER_train, WIDER_val and wider_face_split, each as .zip or unpacked."""
    out: Path
    """Folder of the dataset."""
    min_side_share: float = 0.04
    """Smallest share of the image's width, and of its height, that a face must have (sides, not areas)."""
    workers: int | None = None
    """Processes (default: one per core); the bytes do not depend on it."""

    def run(self) -> int:
        from ssdir.common.console import progress_bar
        from ssdir.data.wider.convert import make_wider_face

        counts = make_wider_face(self.root, self.out, self.min_side_share, self.workers, progress_bar)
        for split, count in counts.items():
            say(f"{split}: {count.describe(self.min_side_share)}")
        say(f"{self.out} (ssdir data show {self.out})")
        return 0


@dataclass(frozen=True, kw_only=True)
class DataConvert:
    """Make a copy of a dataset in another format: COCO, YOLO or Hugging Face's imagefolder.

    Reads COCO and YOLO; the classes and their names are found there. Image files are copied byte for byte. A killed
    run continues where it stopped when the same command is given again.
    """

    source: Positional[Path]
    """Dataset folder (COCO or YOLO), one COCO .json, or a data.yaml."""
    to: Literal["coco", "yolo", "hf"]
    """coco: images/ and annotations/; yolo: data.yaml, images/ and labels/; hf: {split}/metadata.jsonl."""
    out: Path
    """Folder to make."""
    images: Path | None = None
    """Folder of the images that a COCO file names (default: the usual places are looked through)."""
    split: str | None = None
    """Name of the split of a single COCO file (default: what its name speaks of, else train)."""
    skip_missing: bool = False
    """Leave out images that are listed but not on the disk; without it they are an error that lists them."""
    hold_out: tuple[str, ...] = ()
    """Make splits out of the train images, by share: --hold-out val=0.1 test=0.1."""
    workers: int | None = None
    """Processes (default: one per core); the bytes do not depend on it."""

    def run(self) -> int:
        from ssdir.common.console import progress_bar
        from ssdir.data.convert import convert

        done = convert(
            self.source,
            self.to,
            self.out,
            self.images,
            self.split,
            self.skip_missing,
            _shares(self.hold_out),
            self.workers,
            progress_bar,
        )
        for split, result in done.items():
            left_out = [f"{number:,} objects: {reason}" for reason, number in result.dropped.items()]
            left_out += [f"{result.missing:,} images: not on the disk"] if result.missing else []
            say(
                f"{split}: {result.images:,} images, {result.objects:,} objects"
                f"{'; left out: ' if left_out else ''}{', '.join(left_out)}"
            )
            for note in result.notes:
                say(f"note: {note}")
        say(str(self.out))
        return 0


@dataclass(frozen=True)
class DataCheck:
    """Tell what is wrong in a dataset folder, file by file; exit code 1 when something is."""

    folder: Positional[Path]
    """A dataset folder: COCO (images/{train,val,test} beside annotations/{train,val,test}.json) or YOLO (data.yaml)."""
    json: bool = False
    """Print the problems as JSON."""

    def run(self) -> int:
        from ssdir.common.console import progress_bar
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
                where = "" if named else f"{problem.file}: "
                say(f"{problem.severity}: {where}{problem.message}")
            if not errors:
                for name in splits(self.folder):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of what is listed above
                        split = open_split(self.folder, name)
                    say(f"{name}: {len(split.images):,} images, {len(split.labels):,} objects")
            odd = sum(problem.severity == "warning" for problem in problems)
            say(f"{self.folder}: errors: {len(errors)}, warnings: {odd}")
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
    augment: str | None = None
    """Show them as this preset's detector is trained on them: each as it is, and three variants."""

    def run(self) -> int:
        from ssdir.plots.dataset import show_augmented, show_dataset

        if self.augment is None:
            say(str(show_dataset(self.folder, self.out, self.split, self.first, self.count)))
        else:
            say(str(show_augmented(self.folder, self.out, self.augment, self.split, self.first, self.count)))
        return 0


def data_commands() -> dict[str, Node]:
    """The words after ``ssdir data``."""
    scenes = {
        name: Node(
            text,
            command=with_defaults(MnistScenes, scenes=config),
            listed=not name.startswith("ablation-"),
        )
        for name, (text, config) in scenes_presets().items()
    }
    return {
        "mnist-scenes": Node(
            "Generate Multi-scale scattered MNIST; name a preset (the ablation study's are ablation-GRIDS-MIN-MAX, "
            "such as ablation-2to6-96-384).",
            words=scenes,
            noun="preset",
        ),
        "clevr": leaf(Clevr),
        "clevr-like": leaf(ClevrLike),
        "wider-face": leaf(WiderFace),
        "convert": leaf(DataConvert),
        "check": leaf(DataCheck),
        "show": leaf(DataShow),
    }
