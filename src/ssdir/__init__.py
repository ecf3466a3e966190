"""Learning one vector per object of an image: SSDIR (Zieliński and Kajdanowicz, ICCS 2022).

The names here are the public ones. Each is imported when it is first used, since most need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssdir.common.errors import ConfigError, DataError, UserError
    from ssdir.config.presets import preset
    from ssdir.data.mnist.scenes import generate
    from ssdir.detector.ssd import Detector
    from ssdir.evaluation.protocol import evaluate
    from ssdir.inference.predict import predict
    from ssdir.model.latents import Objects
    from ssdir.model.ssdir import SSDIR
    from ssdir.registry import load_model
    from ssdir.training.start import train_baseline, train_detector, train_ssdir

    __version__: str

_HOMES = {
    "SSDIR": "model.ssdir",
    "Detector": "detector.ssd",
    "Objects": "model.latents",
    "UserError": "common.errors",
    "ConfigError": "common.errors",
    "DataError": "common.errors",
    "preset": "config.presets",
    "generate": "data.mnist.scenes",
    "train_detector": "training.start",
    "train_ssdir": "training.start",
    "train_baseline": "training.start",
    "load_model": "registry",
    "evaluate": "evaluation.protocol",
    "predict": "inference.predict",
}
"""The module of each public name."""

__all__ = [
    "SSDIR",
    "ConfigError",
    "DataError",
    "Detector",
    "Objects",
    "UserError",
    "evaluate",
    "generate",
    "load_model",
    "predict",
    "preset",
    "train_baseline",
    "train_detector",
    "train_ssdir",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ssdir.{_HOMES[name]}"), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("ssdir")
        except PackageNotFoundError:  # run from its source folder, not installed
            return "unknown"
    raise AttributeError(f"module 'ssdir' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
