"""A model with glimpses as the teacher of one with cells, which learns to give its z_what in a single shot."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ssdir.common.distributed import normalizer
from ssdir.common.errors import ConfigError
from ssdir.config import ModelConfig
from ssdir.model.latents import Objects
from ssdir.model.ssdir import SSDIR

FITTING = ("z_what_size", "decoder", "decoder_channels", "decoder_norm", "opacity")
"""Settings of the model that a teacher and its student must share."""


def load_teacher(path: Path, model: ModelConfig) -> SSDIR:
    """The teacher saved at ``path`` (a run folder), frozen and in eval mode.

    Args:
        path: run folder of an SSDIR with glimpses.
        model: the model to teach; its z_what and decoder must be the teacher's.

    Raises:
        DataError: the folder or a file is absent, damaged, of another kind or of another architecture.
        ConfigError: it has no glimpses, the student has some, or z_what or decoder do not fit.
    """
    teacher = SSDIR.from_pretrained(path)
    if not teacher.by_glimpses or model.what_encoder != "cells":
        raise ConfigError(
            f"a teacher is an SSDIR with model.what_encoder glimpses, and its student has cells; {path} has "
            f"{teacher.config.what_encoder}, and what is to be trained has {model.what_encoder}"
        )
    for name in FITTING:
        own, wanted = getattr(teacher.config, name), getattr(model, name)
        if own != wanted:
            raise ConfigError(
                f"the teacher in {path} was trained with model.{name} {own}, not {wanted}; train another, or take its "
                "setting"
            )
    return teacher.requires_grad_(False)


def distance_to_teacher(
    teacher: SSDIR, objects: Objects, images: Float[Tensor, "b c s s"]
) -> Float[Tensor, ""]:
    """Mean squared distance of the objects' z_what to the teacher's of the same boxes; 0 without objects."""
    with torch.no_grad():
        target = teacher.what_of(objects, images)
    what = objects.require("what").float()
    return (what - target).square().sum() / normalizer(what.new_full((), what.numel()))
