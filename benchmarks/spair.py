"""SPAIR's scan: the wavefront against raster order, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.inputs import Setup
from benchmarks.machine import Limits
from benchmarks.results import Row, compared
from benchmarks.straightforward_spair import straightforward
from benchmarks.timing import timed
from ssdir.baselines.spair.cells import CellNetworks, CellPosterior, draw_noise
from ssdir.baselines.spair.scan import raster, scan, wavefront
from ssdir.common.machine import computes_in_bf16, keep_freed_memory
from ssdir.common.randomness import seeded
from ssdir.config.spair import SPAIRConfig


def cells(setup: Setup, limits: Limits) -> list[Row]:
    """The scan over all cells, against raster order in two forms: the straightforward program (a loop over cells, with
    whole perceptrons and a spatial transformer each); and the wavefront's own cells, one after another, which tells
    what the order alone brings. Where the processor computes in bf16, that too, each form against its like."""
    if setup.device.type == "cpu":
        keep_freed_memory()  # as the loop does
    scans = Scans(setup.spair, setup.spair_batch, setup.device)
    precisions = [torch.float32, *([torch.bfloat16] if computes_in_bf16("auto") else [])]
    return [row for precision in precisions for row in _compared(scans, setup, precision)]


def _compared(scans: Scans, setup: Setup, precision: torch.dtype) -> list[Row]:
    times = timed(
        {name: scans.step(name, precision) for name in ("wavefront", "raster", "straightforward")},
        setup.device,
        setup.repetitions,
        setup.budget,
    )
    n = setup.spair.grid
    shapes: dict[str, int | str] = {
        "batch": setup.spair_batch,
        "side": setup.spair.image_size,
        "cells": n * n,
    }
    of = "" if precision == torch.float32 else ", bf16"
    name = f"SPAIR scan of {n} x {n} cells forward + backward{of}, wavefront"
    return [
        compared(
            f"{name} against raster order", times["wavefront"], times["straightforward"], shapes, target=1
        ),
        compared(
            f"{name} against raster order of the same cells", times["wavefront"], times["raster"], shapes
        ),
    ]


class Scans:
    """The scans on the same networks, features, images and noise."""

    def __init__(self, config: SPAIRConfig, batch: int, device: torch.device) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(0)
        n, side = config.grid, config.image_size
        with seeded(0):
            self.networks = CellNetworks(config).to(device)
        self.features = torch.randn(batch, config.features, n, n, generator=generator).to(device)
        self.features.requires_grad_()
        self.images = torch.rand(batch, 3, side, side, generator=generator).to(device)
        self.noise = draw_noise(config, batch, self.images, generator)

    def run(self, name: str) -> CellPosterior:
        """What is inferred: by ``wavefront``, ``raster`` or ``straightforward``."""
        n = self.config.grid
        if name == "straightforward":
            return straightforward(self.networks, self.features, self.images, self.noise)
        order = {"wavefront": wavefront, "raster": raster}[name](n, n, self.config.lookback)
        return scan(self.networks, order, self.features, self.images, self.noise)

    def step(self, name: str, precision: torch.dtype = torch.float32) -> Callable[[], None]:
        """Forward, and backward from all that is inferred to the features and all parameters."""
        kind = self.images.device.type

        def step() -> None:
            self.networks.zero_grad()
            self.features.grad = None
            with torch.autocast(kind, precision, enabled=precision != torch.float32):
                found = self.run(name)
            torch.stack([part.square().mean() for part in found]).sum().backward()

        return step
