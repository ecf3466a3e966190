"""The table of baselines: their settings, presets and classes. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssdir.common.errors import ConfigError
from ssdir.config import did_you_mean
from ssdir.config.crop_vae import CropVAERun
from ssdir.config.presets import (
    CROP_VAE_PRESETS,
    SLOT_ATTENTION_PRESETS,
    SPACE_PRESETS,
    SPAIR_PRESETS,
    BaselinePreset,
)
from ssdir.config.slot_attention import SlotAttentionRun
from ssdir.config.space import SpaceRun
from ssdir.config.spair import SPAIRRun

if TYPE_CHECKING:
    from ssdir.baselines.base import Baseline


@dataclass(frozen=True)
class BaselineKind:
    """One kind of baseline."""

    about: str
    """One line for the command line."""
    run: type[Any]
    """The dataclass of all settings of a training."""
    presets: Mapping[str, BaselinePreset[Any]]
    module: str
    """Where its class is."""
    class_name: str
    needs_detector: bool = False
    """Whether it stands on a trained, frozen detector: its class is then built from that and the settings."""

    def load_class(self) -> type[Baseline]:
        """The model's class (imports torch)."""
        found: type[Baseline] = getattr(importlib.import_module(self.module), self.class_name)
        return found


BASELINES: dict[str, BaselineKind] = {
    "space": BaselineKind(
        "SPACE, which finds objects in all cells of a grid at once and mixes components behind them",
        SpaceRun,
        SPACE_PRESETS,
        "ssdir.baselines.space.model",
        "SPACE",
    ),
    "spair": BaselineKind(
        "SPAIR, which goes from cell to cell of a grid and knows its neighbours",
        SPAIRRun,
        SPAIR_PRESETS,
        "ssdir.baselines.spair.model",
        "SPAIR",
    ),
    "slot-attention": BaselineKind(
        "a Slot Attention autoencoder, whose slots compete for pixels and are boxed by their masks",
        SlotAttentionRun,
        SLOT_ATTENTION_PRESETS,
        "ssdir.baselines.slot_attention.model",
        "SlotAttentionAutoencoder",
    ),
    "crop-vae": BaselineKind(
        "a VAE of the crops that a trained, frozen detector finds: SSDIR without joint decoding",
        CropVAERun,
        CROP_VAE_PRESETS,
        "ssdir.baselines.crop_vae",
        "CropVAE",
        needs_detector=True,
    ),
}
"""By the name that ``ssdir train`` and ``config.json`` use."""


def baseline(kind: str) -> BaselineKind:
    """The baseline of that name.

    Raises:
        ConfigError: there is none.
    """
    if kind not in BASELINES:
        raise ConfigError(f"there is no baseline {kind!r}{did_you_mean(kind, BASELINES)}")
    return BASELINES[kind]
