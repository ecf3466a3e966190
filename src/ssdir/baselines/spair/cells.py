"""The latents that SPAIR infers for a cell, and the networks that infer them, shared by all cells."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssdir.baselines.distributions import wide
from ssdir.baselines.glimpses import SMALLEST_SIDE, glimpses
from ssdir.baselines.spair.networks import LOGIT_LIMIT, clipped_sigmoid, glimpse_encoder
from ssdir.config.spair import SPAIRConfig

_CLOSEST = 1e-7
"""Uniform noise keeps this distance from 0 and 1."""


class Noise(NamedTuple):
    """The noise of all samples, in raster order, so that no schedule changes it. Batches: "b n"; rows: "m"."""

    normal: Float[Tensor, "*batch e"]
    """Standard normal: four of where, then z_what, then one of depth."""
    logistic: Float[Tensor, "*batch 1"]
    """Logit of a uniform number."""


def draw_noise(config: SPAIRConfig, n_images: int, like: Tensor, generator: torch.Generator) -> Noise:
    """Noise for a batch, sampled on the generator's device, of the type of ``like`` and on its device."""
    n = config.grid**2
    dtype, device = wide(like).dtype, generator.device
    normal = torch.randn(n_images, n, config.z_what_size + 5, generator=generator, device=device, dtype=dtype)
    uniform = torch.rand(n_images, n, 1, generator=generator, device=device, dtype=dtype)
    uniform = uniform.clamp(_CLOSEST, 1 - _CLOSEST)
    logistic = uniform.log() - (-uniform).log1p()
    return Noise(normal.to(like.device), logistic.to(like.device))


class CellPosterior(NamedTuple):
    """What was inferred for cells. Batches, in raster order: "b n"; rows: "m". ``where`` is x, y, width, height."""

    boxes: Float[Tensor, "*batch 4"]
    """cxcywh in shares of the image; they may leave it."""
    present: Float[Tensor, "*batch"]
    """The relaxed sample of presence in [0, 1]; without noise the probability."""
    depth: Float[Tensor, "*batch"]
    """In (0, 1); bigger is nearer."""
    what: Float[Tensor, "*batch d"]
    """The sample of z_what; without noise its mean."""
    where_mean: Float[Tensor, "*batch 4"]
    """Of the logits of the boxes' places and sides."""
    where_std: Float[Tensor, "*batch 4"]
    what_mean: Float[Tensor, "*batch d"]
    what_std: Float[Tensor, "*batch d"]
    depth_mean: Float[Tensor, "*batch"]
    """Of the logit of depth."""
    depth_std: Float[Tensor, "*batch"]
    logits: Float[Tensor, "*batch"]
    """Log-odds of presence."""


class Head(nn.Module):
    """A perceptron with two hidden layers, whose first has seen the input that all heads share already.

    Args:
        own: numbers that only this head sees.
        hidden: units of each hidden layer.
        out: numbers that it gives.
    """

    def __init__(self, own: int, hidden: int, out: int) -> None:
        super().__init__()
        self.own = nn.Linear(own, hidden, bias=False) if own else None
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, out)

    def forward(self, shared: Float[Tensor, "m h"], *own: Float[Tensor, "m _"]) -> Float[Tensor, "m o"]:
        """From the first layer's outputs for the shared input, and what only this head sees."""
        if self.own is not None:
            shared = torch.addmm(shared, _joined(own, shared.dtype), self.own.weight.t())
        outputs: Tensor = self.last(self.second(shared.relu()).relu())
        return outputs


class CellNetworks(nn.Module):
    """What infers cells (section 2.3 of Crawford and Pineau's appendix): the same for all of them.

    The first layers of the four heads see the same features and neighbours. They are one layer: of the features,
    for all cells at once before the scan; of the neighbours, one matrix product a step.
    """

    origins: Tensor
    local_scale: Tensor
    local_shift: Tensor
    box_scale: Tensor
    smallest: Tensor

    def __init__(self, config: SPAIRConfig) -> None:
        super().__init__()
        self.config = config
        hidden, handed, d = config.hidden, config.passthrough, config.z_what_size
        self.state_size = d + 6
        # Half of the square of cells around a cell: those before it in raster order.
        n_neighbours = (2 * config.lookback + 1) ** 2 // 2 if config.lateral else 0
        self.features = nn.Linear(config.features, 4 * hidden)
        self.context = (
            nn.Linear(n_neighbours * self.state_size, 4 * hidden, bias=False) if n_neighbours else None
        )
        self.edge = nn.Parameter(torch.zeros(self.state_size)) if n_neighbours else None
        self.encoder = glimpse_encoder(config)
        self.where = Head(0, hidden, 8 + handed)
        self.what = Head(handed + d + 4, hidden, 2 * d + handed)
        self.depth = Head(handed + 4 + d, hidden, 2 + handed)
        self.present = Head(handed + 4 + d + 1, hidden, 1)
        self._buffers_of_boxes(config)

    @property
    def heads(self) -> dict[str, Head]:
        """In the order of their columns in the first layers' outputs."""
        return {"where": self.where, "what": self.what, "depth": self.depth, "present": self.present}

    def _buffers_of_boxes(self, config: SPAIRConfig) -> None:
        """Centres move by -0.5 to 1.5 cells from their cell's corner; sides reach ``size_range`` anchors."""
        step, side = config.cell / config.image_size, config.anchor * config.size_range / config.image_size
        line = torch.arange(config.grid, dtype=torch.float64) * step
        y, x = torch.meshgrid(line, line, indexing="ij")
        zero = torch.zeros_like(x)
        for name, values in (
            ("origins", torch.stack([x, y, zero, zero], -1).flatten(0, 1)),
            ("local_scale", torch.tensor([2.0, 2.0, 1.0, 1.0])),
            ("local_shift", torch.tensor([-0.5, -0.5, 0.0, 0.0])),
            ("box_scale", torch.tensor([step, step, side, side], dtype=torch.float64)),
            ("smallest", torch.tensor([-torch.inf, -torch.inf, SMALLEST_SIDE, SMALLEST_SIDE])),
        ):
            self.register_buffer(name, values.to(torch.get_default_dtype()), persistent=False)

    def edge_state(self) -> Float[Tensor, " s"]:
        """What cells see where the grid has ended: learned, with a box and a presence in (0, 1)."""
        assert self.edge is not None
        return torch.cat([self.edge[:4].sigmoid(), self.edge[4:-1], self.edge[-1:].sigmoid()])

    def forward(
        self,
        shared: Float[Tensor, "m h4"],
        images: Float[Tensor, "b 3 s s"],
        image_index: Int[Tensor, " m"],
        origins: Float[Tensor, "m 4"],
        noise: Noise | None,
        freeze_where: bool,
    ) -> tuple[CellPosterior, Float[Tensor, "m e"]]:
        """Infer cells that do not see each other.

        Args:
            shared: the first layers' outputs for features and neighbours.
            images: in [0, 1], in float32 or wider.
            image_index: the image of each cell.
            origins: the upper left corner of each cell, in shares of the image, and two zeros.
            noise: of each cell; None takes the means, and the probability of presence.
            wheels: no gradient reaches boxes, depth and presence.

        Returns:
            what is inferred, and what later cells see of it: the box in cells and anchors, z_what, depth, presence.
        """
        passed, d = self.config.passthrough, self.config.z_what_size
        of_where, of_what, of_depth, of_present = shared.chunk(4, 1)
        normal = (None, None, None) if noise is None else noise.normal.split([4, d, 1], 1)

        parameters, handed = self.where(of_where).split([8, passed], 1)
        where, where_mean, where_std = _normal(parameters, normal[0], freeze_where)
        local = self.local_shift + clipped_sigmoid(where) * self.local_scale
        boxes = origins + local * self.box_scale
        boxes = boxes + (self.smallest - boxes).relu().detach()  # the gradient passes below the floor too
        seen = glimpses(images, boxes, image_index, self.config.patch_size, "border")
        code = self.encoder(seen.to(shared.dtype))

        parameters, handed = self.what(of_what, handed, code, local).split([2 * d, passed], 1)
        what, what_mean, what_std = _normal(parameters, normal[1], False)

        parameters, handed = self.depth(of_depth, handed, local, what).split([2, passed], 1)
        depth, depth_mean, depth_std = _normal(parameters, normal[2], freeze_where)
        depth = clipped_sigmoid(depth)

        logits = wide(self.present(of_present, handed, local, what, depth))
        logits = _ClampedLogits.apply(logits.detach() if freeze_where else logits)
        present = (logits if noise is None else logits + noise.logistic).sigmoid()
        posterior = CellPosterior(
            boxes, present[:, 0], depth[:, 0], what, where_mean, where_std, what_mean, what_std,
            depth_mean[:, 0], depth_std[:, 0], logits[:, 0],
        )  # fmt: skip
        return posterior, _joined((local, what, depth, present), shared.dtype)


class _ClampedLogits(torch.autograd.Function):
    """Logits of presence clipped to -10 .. 10. Beyond, gradients pass that lead back inside.

    The count prior begins at almost 1 and drives presences to the clip; without a gradient they would stay for good,
    whatever the prior becomes.
    """

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "m 1"]) -> Float[Tensor, "m 1"]:
        ctx.save_for_backward(logits)
        return logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    @staticmethod
    def backward(ctx: Any, *grads: Float[Tensor, "m 1"]) -> Float[Tensor, "m 1"]:
        (logits,), (grad,) = ctx.saved_tensors, grads
        return grad * ((logits.abs() <= LOGIT_LIMIT) | (grad * logits > 0))


def _normal(
    parameters: Float[Tensor, "m e"], noise: Float[Tensor, "m d"] | None, fixed: bool
) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m d"], Float[Tensor, "m d"]]:
    """A sample (without noise the mean), mean and standard deviation in (0, 2); without gradient where ``fixed``."""
    mean, raw = wide(parameters.detach() if fixed else parameters).chunk(2, 1)
    std = 2 * clipped_sigmoid(raw)
    return mean if noise is None else torch.addcmul(mean, std, noise), mean, std


def _joined(parts: tuple[Float[Tensor, "m _"], ...], dtype: torch.dtype) -> Float[Tensor, "m e"]:
    """Side by side, in one type."""
    return torch.cat([part.to(dtype) for part in parts], 1)
