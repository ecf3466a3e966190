"""SPAIR's scan as its description reads: one cell after another, every perceptron on the whole of its input, all by
autograd.

The same parameters and noise give the same latents as :func:`ssdir.baselines.spair.scan.scan`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ssdir.baselines.glimpses import SMALLEST_SIDE
from ssdir.baselines.spair.cells import CellNetworks, CellPosterior, Noise
from ssdir.baselines.spair.scan import offsets

_NAMES = ("where", "what", "depth", "present")


def straightforward(
    networks: CellNetworks,
    features: Float[Tensor, "b f g g"],
    images: Float[Tensor, "b 3 s s"],
    noise: Noise | None,
    freeze_where: bool = False,
) -> CellPosterior:
    """Every cell in raster order."""
    n, found = features.shape[-1], {}
    seen = offsets(networks.config.lookback) if networks.config.lateral else []
    edge = networks.edge_state().expand(len(images), -1) if seen else None
    for row in range(n):
        for column in range(n):
            around = [
                found[row + i, column + j][1] if (row + i, column + j) in found else edge for i, j in seen
            ]
            base = torch.cat([features[:, :, row, column], *around], 1)
            cell = row * n + column
            sampled = None if noise is None else Noise(noise.normal[:, cell], noise.logistic[:, cell])
            found[row, column] = _cell(networks, base, images, row, column, sampled, freeze_where)
    parts = zip(*(posterior for posterior, _ in found.values()), strict=True)
    return CellPosterior(*(torch.stack(part, 1) for part in parts))


def _cell(
    networks: CellNetworks,
    base: Float[Tensor, "b i"],
    images: Float[Tensor, "b 3 s s"],
    row: int,
    column: int,
    noise: Noise | None,
    freeze_where: bool,
) -> tuple[CellPosterior, Float[Tensor, "b s"]]:
    """What is inferred for a cell, and its state for the neighbours."""
    config = networks.config
    d, side = config.z_what_size, config.image_size

    def steered(parameters: Tensor) -> Tensor:
        return parameters.detach() if freeze_where else parameters

    def sampled(mean: Tensor, std: Tensor, first: int, last: int) -> Tensor:
        return mean if noise is None else mean + std * noise.normal[:, first:last]

    out = _head(networks, "where", base)
    where_mean, where_std, handed = steered(out[:, :4]), steered(_std(out[:, 4:8])), out[:, 8:]
    where = sampled(where_mean, where_std, 0, 4).clamp(-10, 10).sigmoid()
    centre, extent = 2 * where[:, :2] - 0.5, where[:, 2:]
    corner = torch.tensor([column, row], device=base.device)
    sides = extent * config.anchor * config.size_range / side
    sides = sides + (SMALLEST_SIDE - sides).clamp_min(0).detach()
    box = torch.cat([(corner + centre) * config.cell / side, sides], 1)
    local = torch.cat([centre, extent], 1)

    code = networks.encoder(_glimpse(images, box, config.patch_size))
    out = _head(networks, "what", base, handed, code, local)
    what_mean, what_std, handed = out[:, :d], _std(out[:, d : 2 * d]), out[:, 2 * d :]
    what = sampled(what_mean, what_std, 4, 4 + d)

    out = _head(networks, "depth", base, handed, local, what)
    depth_mean, depth_std, handed = steered(out[:, :1]), steered(_std(out[:, 1:2])), out[:, 2:]
    depth = sampled(depth_mean, depth_std, 4 + d, 5 + d).clamp(-10, 10).sigmoid()

    logits = steered(_head(networks, "present", base, handed, local, what, depth)).clamp(-10, 10)
    present = (logits if noise is None else logits + noise.logistic).sigmoid()
    posterior = CellPosterior(
        box, present[:, 0], depth[:, 0], what, where_mean, where_std, what_mean, what_std, depth_mean[:, 0],
        depth_std[:, 0], logits[:, 0],
    )  # fmt: skip
    return posterior, torch.cat([local, what, depth, present], 1)


def _head(networks: CellNetworks, name: str, *inputs: Float[Tensor, "b _"]) -> Float[Tensor, "b o"]:
    """A perceptron on the concatenation of its inputs."""
    head, number, hidden = networks.heads[name], _NAMES.index(name), networks.config.hidden
    own = slice(number * hidden, (number + 1) * hidden)
    weights = [networks.features.weight[own]]
    if networks.context is not None:
        weights.append(networks.context.weight[own])
    if head.own is not None:
        weights.append(head.own.weight)
    first = functional.linear(torch.cat(inputs, 1), torch.cat(weights, 1), networks.features.bias[own])
    return head.last(head.second(first.relu()).relu())


def _glimpse(
    images: Float[Tensor, "b 3 s s"], box: Float[Tensor, "b 4"], size: int
) -> Float[Tensor, "b 3 p p"]:
    """A spatial transformer: one box an image."""
    x, y, w, h = box.unbind(1)
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([w, zero, 2 * x - 1], 1), torch.stack([zero, h, 2 * y - 1], 1)], 1)
    grid = functional.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _std(raw: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
    return 2 * raw.clamp(-10, 10).sigmoid()
