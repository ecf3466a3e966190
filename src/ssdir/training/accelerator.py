"""The accelerator of a training: its device, its precision, and the processes that share it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from ssdir.common.distributed import shares_training, without_ranks
from ssdir.common.errors import ConfigError
from ssdir.common.machine import choose_device, computes_in_bf16
from ssdir.config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(settings: TrainingConfig, device: str = "auto") -> Accelerator:
    """Accelerate's accelerator on the device, of the precision that the settings ask for.

    Args:
        settings: precision, batch size and accumulation.
        device: as in :class:`~ssdir.training.loop.LoopOptions`.

    Raises:
        ConfigError: a device that is not here, or a batch that the processes cannot share.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    shared = shares_training()
    named = _named_device(device, shared)
    # Accelerate's state outlives a run and pins its precision and device; the next run in this process may have others.
    # Processes that share a training keep theirs, which holds the connection between them.
    AcceleratorState._reset_state(reset_partial_state=not shared)
    named_by = {} if named is None else {"ACCELERATE_TORCH_DEVICE": named}
    with nullcontext() if shared else without_ranks(), patch_environment(**named_by):
        accelerator = Accelerator(
            # Without a GPU, Accelerate connects the processes that torchrun starts only if cpu is set.
            cpu=device == "cpu" or (shared and not torch.accelerator.is_available()),
            mixed_precision="bf16" if computes_in_bf16(settings.precision, device) else "no",
            gradient_accumulation_steps=settings.accumulate,
        )
    parts = accelerator.num_processes * settings.accumulate
    if settings.batch_size % parts:
        raise ConfigError(
            f"training.batch_size {settings.batch_size} cannot be shared by {accelerator.num_processes} processes with "
            f"training.accumulate {settings.accumulate}; take a multiple of {parts}"
        )
    return accelerator


def _named_device(device: str, shared: bool) -> str | None:
    """The device for Accelerate to take, or None where it chooses; ``shared``: processes share the training.

    Raises:
        ConfigError: it is not here; or one device is named, and several processes would all take it.
    """
    if device == "auto":
        return None
    if shared:
        if device not in ("cpu", "cuda"):
            raise ConfigError(
                f"--device {device} names one device, and every process of a training takes its own; give cpu or cuda, "
                "and choose among GPUs by CUDA_VISIBLE_DEVICES"
            )
        if device == "cuda" and not torch.cuda.is_available():
            choose_device(device)
        return None
    chosen = choose_device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # where kernels are launched
    return device
