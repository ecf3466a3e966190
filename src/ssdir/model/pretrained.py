"""Model folders: ``config.json`` says what the model is, ``model.safetensors`` holds its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssdir.common.errors import ConfigError, DataError, shown
from ssdir.common.storage import (
    atomic_folder,
    load_tensors,
    read_json,
    save_tensors,
    tensors_fingerprint,
    whole_folder,
    write_json,
)
from ssdir.config import DetectorConfig, from_dict, to_dict
from ssdir.detector.ssd import Detector

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHIPPED = Path(__file__).resolve().parents[1] / "weights"
"""Where the weights that come with the package lie, one folder a model, which its name stands for."""


class ModelFolder(NamedTuple):
    """A model folder whose ``config.json`` is read."""

    path: Path
    config: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.config["kind"])

    @property
    def categories(self) -> tuple[str, ...] | None:
        """Names of the classes that the model was trained with, where they are known."""
        names = self.config.get("categories")
        return None if names is None else tuple(names)


def save_folder(path: str | Path, config: Mapping[str, Any], module: nn.Module) -> None:
    """Write a model folder, whole or not at all.

    Args:
        path: the folder; a model of ours that is there is replaced, and anything else is an error.
        config: JSON values; must hold ``kind``.
        module: whose ``state_dict`` is written.

    Raises:
        DataError: a weight that is not finite; or the folder cannot be written.
    """
    require_finite(
        module.state_dict(),
        f"the model is not written to {path}",
        "train it again with a lower training.learning_rate, or go on from a checkpoint before",
    )
    with atomic_folder(path, "model") as folder:
        write_json(folder / CONFIG, {"format": FORMAT, **config})
        save_tensors(folder / WEIGHTS, module.state_dict())


def shipped_names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(item.name for item in SHIPPED.iterdir()) if SHIPPED.is_dir() else []


def find_folder(path: str | Path) -> Path:
    """The model folder that ``path`` means: itself, ``path/model`` of a run, or weights that ship with the package.

    Raises:
        DataError: there is none; or a folder has the name of weights that ship.
    """
    if str(path) in shipped_names():
        if Path(path).exists():
            raise DataError(
                f"{path} is the name of weights that ship with ssdir, and of a folder here; for the folder write "
                f"{Path(path).absolute()}, for the weights rename it"
            )
        return SHIPPED / path
    path = Path(path)
    for folder in (whole_folder(path), whole_folder(path / "model")):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if not path.exists():
        names = "".join(f", or {name}" for name in shipped_names())
        raise DataError(f"{path} does not exist; give the folder of a run or of a saved model{names}")
    raise DataError(
        f"{path} holds no model: neither it nor its subfolder 'model' has both {CONFIG} and {WEIGHTS}; "
        "give the folder of a finished run, or one checkpoint of an unfinished one"
    )


def read_folder(path: str | Path, kind: str | None = None) -> ModelFolder:
    """The model folder that ``path`` means (see :func:`find_folder`), with its ``config.json``.

    Raises:
        DataError: the folder or file is absent or damaged, or the model is not of ``kind``.
    """
    folder = find_folder(path)
    file = folder / CONFIG
    config = read_json(file)
    if not isinstance(config, dict) or "kind" not in config:
        raise DataError(f"{file} does not say which kind of model this is; it was not written by ssdir")
    for key, wanted in (("kind", str), ("format", int)):
        if not isinstance(config.get(key, FORMAT), wanted):
            raise DataError(f"{file} is damaged: {key} is {shown(config[key])}; copy the model again")
    if config.get("format", FORMAT) > FORMAT:
        raise DataError(f"{file} was written by a newer version of ssdir; upgrade with pip install -U ssdir")
    if kind is not None and config["kind"] != kind:
        raise DataError(
            f"{file} describes a model of kind {shown(config['kind'])}, but {kind!r} is needed here; give the folder "
            f"of a run or model of that kind (ssdir train {kind} makes one)"
        )
    return ModelFolder(folder, config)


def read_config(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """``config.json`` of the model folder that ``path`` means; errors as of :func:`read_folder`."""
    return read_folder(path, kind).config


def weights_fingerprint(path: str | Path) -> str:
    """The hash of the weights in ``path`` (see :func:`find_folder`).

    Raises:
        DataError: there are none, or they are damaged.
    """
    return tensors_fingerprint(load_tensors(find_folder(path) / WEIGHTS))


def config_part(kind: type[Any], config: Mapping[str, Any], key: str, file: Path) -> Any:
    """A configuration dataclass out of ``config.json``; errors name the file."""
    try:
        return from_dict(kind, config[key])
    except KeyError as error:
        raise DataError(f"{file} has no entry {key!r}; it was not written by ssdir, or is damaged") from error
    except ConfigError as error:
        raise DataError(f"{file}: {error}") from error


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fill ``module`` from the folder's weights, every tensor and no other (half precision becomes its type).

    Raises:
        DataError: the file is truncated, belongs to another architecture, or holds a weight that is not finite.
    """
    file = folder / WEIGHTS
    source = f"{file} does not fit the model that {folder / CONFIG} describes"
    tensors = load_tensors(file)
    require_finite(tensors, f"{file} cannot be used", "give another model, or train this one again")
    fill(module, tensors, source, "take both files from the same run")


def require_finite(tensors: Mapping[str, Tensor], fault: str, remedy: str) -> None:
    """Refuse named tensors of which one holds NaN or infinity.

    Raises:
        DataError: ``fault``, the first of them, ``remedy``.
    """
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise DataError(f"{fault}: {name} holds NaN or infinity. To mend it, {remedy}")


def fill(module: nn.Module, tensors: Mapping[str, Tensor], fault: str, remedy: str) -> None:
    """Copy tensors into a module's parameters and buffers, every one and no other, keeping their types and memory
    formats.

    Raises:
        DataError: names or shapes that are not the module's: ``fault``, the first of them, ``remedy``.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is not part of the model" for name in tensors if name not in own]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model's has {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(f"{fault}: {'; '.join(problems[:5])}{more}. To mend it, {remedy}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def save_detector(detector: Detector, path: str | Path, categories: Sequence[str] | None = None) -> None:
    """Write a detector's folder: kind "detector", its configuration, its weights."""
    config: dict[str, Any] = {"kind": "detector", "detector": to_dict(detector.config)}
    if categories is not None:
        config["categories"] = list(categories)
    if detector.suggested_present_threshold is not None:
        config["suggested_present_threshold"] = detector.suggested_present_threshold
    save_folder(path, config, detector)


def suggested_threshold(config: Mapping[str, Any], file: Path) -> float | None:
    """The presence with the best F1 that a detector's ``config.json`` keeps; None: it was not measured.

    Raises:
        DataError: it is no number between 0 and 1; the message names ``file``.
    """
    value = config.get("suggested_present_threshold")
    if value is not None and not (isinstance(value, float) and 0 < value < 1):
        raise DataError(
            f"{file}: suggested_present_threshold is {value!r}; it must lie between 0 and 1, or be left out"
        )
    return value


def load_detector(path: str | Path) -> Detector:
    """The detector saved at ``path`` (a model folder or a run), in eval mode.

    Raises:
        DataError: the folder or a file is absent, damaged, of another kind or of another architecture.
    """
    return detector_of(read_folder(path, "detector"))


def detector_of(folder: ModelFolder) -> Detector:
    """As :func:`load_detector`, of a folder that is open."""
    # Initial values are overwritten; leave the global generator alone.
    with torch.random.fork_rng(devices=[]):
        detector = built_detector(folder.config, folder.path / CONFIG)
    load_weights(detector, folder.path)
    detector.categories = folder.categories
    detector.suggested_present_threshold = suggested_threshold(folder.config, folder.path / CONFIG)
    return detector.eval()


def built_detector(config: Mapping[str, Any], file: Path) -> Detector:
    """An untrained detector as ``config.json`` (``file``) describes it; DataError where it does not."""
    return Detector(config_part(DetectorConfig, config, "detector", file))
