"""SPAIR's inference: cell after cell; each sees its features, its glimpse and what was inferred for its neighbours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ssdir.model.baselines.distributions import wide
from ssdir.model.baselines.glimpses import SMALLEST_SIDE, glimpses
from ssdir.model.baselines.spair_config import SPAIRConfig
from ssdir.model.baselines.spair_networks import LOGIT_LIMIT, clipped_sigmoid, glimpse_encoder
from ssdir.model.baselines.spair_schedule import Schedule, offsets, tables
from ssdir.model.baselines.unrolled import UnrolledLinear, UnrolledRows

_CLOSEST = 1e-7
"""Uniform noise keeps this distance from 0 and 1."""


class CellPosterior(NamedTuple):
    """What was inferred for every cell, in raster order. ``where`` is x, y, width, height."""

    boxes: Float[Tensor, "b n 4"]
    """cxcywh in shares of the image; they may leave it."""
    present: Float[Tensor, "b n"]
    """The relaxed sample of presence in [0, 1]; without noise the probability."""
    depth: Float[Tensor, "b n"]
    """In (0, 1); bigger is nearer."""
    what: Float[Tensor, "b n d"]
    """The sample of z_what; without noise its mean."""
    where_mean: Float[Tensor, "b n 4"]
    """Of the logits of the boxes' places and sides."""
    where_std: Float[Tensor, "b n 4"]
    what_mean: Float[Tensor, "b n d"]
    what_std: Float[Tensor, "b n d"]
    depth_mean: Float[Tensor, "b n"]
    """Of the logit of depth."""
    depth_std: Float[Tensor, "b n"]
    logits: Float[Tensor, "b n"]
    """Log-odds of presence."""


class Noise(NamedTuple):
    """All that is random in a scan, in raster order, so that no schedule changes it."""

    normal: Float[Tensor, "b n e"]
    """Standard normal: four of where, then z_what, then one of depth."""
    logistic: Float[Tensor, "b n 1"]
    """Logit of a uniform number."""


def draw_noise(config: SPAIRConfig, n_images: int, like: Tensor, generator: torch.Generator) -> Noise:
    """Noise for a batch, drawn on the generator's device, of the type of ``like`` and on its device."""
    n = config.grid**2
    dtype, device = wide(like).dtype, generator.device
    normal = torch.randn(n_images, n, config.z_what_size + 5, generator=generator, device=device, dtype=dtype)
    uniform = torch.rand(n_images, n, 1, generator=generator, device=device, dtype=dtype)
    uniform = uniform.clamp(_CLOSEST, 1 - _CLOSEST)
    logistic = uniform.log() - (-uniform).log1p()
    return Noise(normal.to(like.device), logistic.to(like.device))


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
        n_neighbours = len(offsets(config.lookback)) if config.lateral else 0
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


class Inferred(NamedTuple):
    """Some cells."""

    boxes: Float[Tensor, "m 4"]
    state: Float[Tensor, "m s"]
    """What their neighbours see: the box in cells and anchors, z_what, depth, presence."""
    where: Float[Tensor, "m 8"]
    """Means and, before :func:`std_of`, standard deviations; likewise the next."""
    what: Float[Tensor, "m e"]
    depth: Float[Tensor, "m 2"]
    logits: Float[Tensor, "m 1"]


class Unrolled:
    """The networks within one scan: a step applies them to some cells, of which none is another's neighbour.

    Args:
        networks: what infers a cell.
        base: what the features of all cells give to the first layers of the four heads, step by step.
        sizes: cells of each step.
        images: in [0, 1].
        wheels: no gradient reaches boxes, depth and presence.
    """

    def __init__(
        self,
        networks: CellNetworks,
        base: Float[Tensor, "rows h"],
        sizes: tuple[int, ...],
        images: Float[Tensor, "b 3 s s"],
        wheels: bool,
    ) -> None:
        self.networks, self.images, self.wheels = networks, images, wheels
        first: dict[str, tuple[Tensor, slice]] = {}
        if networks.context is not None:
            first["context"] = networks.context.weight, slice(None)
        hidden = networks.config.hidden
        for number, (name, head) in enumerate(networks.heads.items()):
            if head.own is not None:
                first[name] = head.own.weight, slice(number * hidden, (number + 1) * hidden)
        self.base = UnrolledRows(base, sizes, first)
        self.second = {name: UnrolledLinear(head.second, sizes) for name, head in networks.heads.items()}
        self.last = {name: UnrolledLinear(head.last, sizes) for name, head in networks.heads.items()}
        self.encoder = [
            UnrolledLinear(layer, sizes) if isinstance(layer, nn.Linear) else layer
            for layer in networks.encoder
        ]

    def seen(self, step: int, around: Float[Tensor, "m c"] | None) -> Float[Tensor, "m h"]:
        """What features and neighbours give to the first layers of the four heads."""
        base = self.base.steps[step]
        return base if around is None else self.base.add("context", base, around)

    def head(
        self, name: str, step: int, base: Float[Tensor, "m h"], *own: Float[Tensor, "m _"]
    ) -> Float[Tensor, "m o"]:
        """The output of a head."""
        if own:
            base = self.base.add(name, base, torch.cat(own, 1))
        return self.last[name](step, functional.relu(self.second[name](step, functional.relu(base))))

    def encoded(self, step: int, boxes: Float[Tensor, "m 4"], image_index: Int[Tensor, " m"]) -> Tensor:
        """The code of each box's glimpse."""
        code = glimpses(self.images, boxes, image_index, self.networks.config.patch_size, "border")
        for layer in self.encoder:
            code = layer(step, code) if isinstance(layer, UnrolledLinear) else layer(code)
        return code

    def infer(
        self,
        step: int,
        around: Float[Tensor, "m c"] | None,
        image_index: Int[Tensor, " m"],
        origins: Float[Tensor, "m 4"],
        noise: tuple[Float[Tensor, "m e"], Float[Tensor, "m 1"]] | None,
    ) -> Inferred:
        """The cells of a step.

        Args:
            step: its number.
            around: what was inferred for the neighbours; None without them.
            image_index: the image of each cell.
            origins: corner of each cell, then two zeros.
            noise: normal and logistic; None takes the means, and the probability of presence.
        """
        d, wheels, networks = self.networks.config.z_what_size, self.wheels, self.networks
        passed = networks.config.passthrough
        of_where, of_what, of_depth, of_present = self.seen(step, around).chunk(4, 1)
        normal, logistic = noise if noise is not None else (None, None)

        where, handed = self.head("where", step, of_where).split([8, passed], 1)
        where = _steered(where, wheels)
        drawn = _drawn(where, None if normal is None else normal[:, :4])
        local = torch.addcmul(networks.local_shift, clipped_sigmoid(drawn), networks.local_scale)
        boxes = torch.addcmul(origins, local, networks.box_scale)
        # The floor of the sides lets the gradient pass, so that a box that became too small can grow again.
        boxes = boxes + functional.relu(networks.smallest - boxes.detach())

        code = self.encoded(step, boxes, image_index)
        what, handed = self.head("what", step, of_what, handed, code, local).split([2 * d, passed], 1)
        what = wide(what)
        z_what = _drawn(what, None if normal is None else normal[:, 4:-1])

        depth, handed = self.head("depth", step, of_depth, handed, local, z_what).split([2, passed], 1)
        depth = _steered(depth, wheels)
        z_depth = clipped_sigmoid(_drawn(depth, None if normal is None else normal[:, -1:]))

        present = self.head("present", step, of_present, handed, local, z_what, z_depth)
        logits: Tensor = _Clip.apply(_steered(present, wheels))
        z_present = (logits if logistic is None else logits + logistic).sigmoid()
        return Inferred(boxes, torch.cat([local, z_what, z_depth, z_present], 1), where, what, depth, logits)


def scan(
    networks: CellNetworks,
    schedule: Schedule,
    features: Float[Tensor, "b f g g"],
    images: Float[Tensor, "b 3 s s"],
    noise: Noise | None,
    wheels: bool = False,
) -> CellPosterior:
    """Infer all cells, in the schedule's order, which changes nothing but the time it takes.

    Nothing is written in place: a step gathers its neighbours out of the few steps that have them.

    Args:
        networks: what infers a cell.
        schedule: with the networks' neighbours (none for networks without context).
        features: of each cell.
        images: in [0, 1]; glimpses are taken from them.
        noise: None for evaluation.
        wheels: no gradient reaches boxes, depth and presence.
    """
    n_images, n_cells = len(images), schedule.n_cells
    table = tables(schedule, n_images, images.device)

    def in_steps(rows: Tensor) -> tuple[Tensor, ...]:
        return rows.index_select(0, table.order).split(table.sizes)

    base = networks.features(features.flatten(2).transpose(1, 2)).flatten(0, 1).index_select(0, table.order)
    unrolled = Unrolled(networks, base, table.sizes, images, wheels)
    origins = in_steps(networks.origins.repeat(n_images, 1))
    index = table.order.div(n_cells, rounding_mode="floor").split(table.sizes)
    noises = None if noise is None else [in_steps(part.flatten(0, 1)) for part in noise]
    edge = None if networks.edge is None else networks.edge_state().expand(n_images, 1, -1)
    found: list[Inferred] = []
    for now, step in enumerate(schedule.steps):
        around = None
        if edge is not None:
            states = [
                found[source].state.unflatten(0, (n_images, len(schedule.steps[source].cells)))
                for source in step.sources
            ]
            around = torch.cat([edge, *states], 1).index_select(1, table.neighbours[now])
            around = around.reshape(table.sizes[now], schedule.n_neighbours * networks.state_size)
        drawn = None if noises is None else (noises[0][now], noises[1][now])
        found.append(unrolled.infer(now, around, index[now], origins[now], drawn))
    parts = [
        torch.cat(rows).index_select(0, table.back).unflatten(0, (n_images, n_cells))
        for rows in zip(*found, strict=True)
    ]
    return _posterior(networks.config, Inferred(*parts))


def _posterior(config: SPAIRConfig, cells: Inferred) -> CellPosterior:
    d = config.z_what_size
    state = cells.state
    return CellPosterior(
        boxes=cells.boxes,
        present=state[..., -1],
        depth=state[..., -2],
        what=state[..., 4:-2],
        where_mean=cells.where[..., :4],
        where_std=std_of(cells.where[..., 4:]),
        what_mean=cells.what[..., :d],
        what_std=std_of(cells.what[..., d:]),
        depth_mean=cells.depth[..., 0],
        depth_std=std_of(cells.depth[..., 1]),
        logits=cells.logits[..., 0],
    )


class _Clip(torch.autograd.Function):
    """Clips logits to -10 .. 10, but lets gradients pass that lead back inside.

    The count prior begins at almost 1 and drives presences to the clip. Without a gradient there they stay for good:
    every cell of every image holds an object, whatever the prior becomes.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return grad * ((logits.abs() <= LOGIT_LIMIT) | (grad * logits > 0))


def std_of(raw: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Standard deviations in (0, 2) from a network's output."""
    return 2 * clipped_sigmoid(raw)


def _drawn(parameters: Float[Tensor, "m e"], noise: Float[Tensor, "m d"] | None) -> Float[Tensor, "m d"]:
    """Samples of normals, whose means come first; without noise the means."""
    mean, raw = parameters.chunk(2, 1)
    return mean if noise is None else torch.addcmul(mean, std_of(raw), noise)


def _steered(parameters: Float[Tensor, "m e"], wheels: bool) -> Float[Tensor, "m e"]:
    """In float32 or wider; without their gradient while training wheels are on."""
    return wide(parameters.detach() if wheels else parameters)
