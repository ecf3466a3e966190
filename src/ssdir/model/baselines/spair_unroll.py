"""A scan over SPAIR's cells, unrolled: forward, and backward by hand.

The cells of a step see what earlier steps inferred, and each step is many small products and elementwise operations.
Recorded one by one by autograd they cost as much as the arithmetic itself: a node, an allocation and a copy each. Here
every layer has one buffer for the rows of all steps; what the next layer sees beside it lies in the same rows, so that
nothing is put together; gradients go back through the same layout, and each weight's is one product at the end.
Only the glimpses and their encoder are left to autograd, step by step.

Rows: step by step, in each image by image, cell by cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssdir.model.baselines.deferred import DeferredLinear, computing
from ssdir.model.baselines.glimpses import glimpses
from ssdir.model.baselines.spair_cells import CellNetworks, Head
from ssdir.model.baselines.spair_networks import LOGIT_LIMIT, clipped_sigmoid
from ssdir.model.baselines.spair_noise import Noise
from ssdir.model.baselines.spair_schedule import Schedule, tables


class Inferred(NamedTuple):
    """What was inferred for some cells."""

    boxes: Float[Tensor, "rows 4"]
    present: Float[Tensor, "rows 1"]
    z_depth: Float[Tensor, "rows 1"]
    z_what: Float[Tensor, "rows d"]
    where: Float[Tensor, "rows 8"]
    """Means and, before :func:`std_of`, standard deviations; likewise the next."""
    what: Float[Tensor, "rows e"]
    depth: Float[Tensor, "rows 2"]
    logits: Float[Tensor, "rows 1"]


_STEERED = ("boxes", "present", "z_depth", "where", "depth", "logits")
"""What has no gradient while training wheels are on."""


def unroll(
    networks: CellNetworks,
    schedule: Schedule,
    base: Float[Tensor, "m h"],
    images: Float[Tensor, "b 3 s s"],
    noise: Noise | None,
    wheels: bool,
) -> Inferred:
    """All cells, image by image in raster order, inferred in the schedule's order.

    Args:
        networks: what infers a cell.
        schedule: with the networks' neighbours (none for networks without context).
        base: what each cell's features give to the first layers of the four heads.
        images: in [0, 1]. No gradient reaches them.
        noise: None takes the means, and the probability of presence.
        wheels: no gradient reaches boxes, depth and presence.
    """
    run = _Unrolled(networks, schedule, images.detach(), noise, wheels, learn=torch.is_grad_enabled())
    edge = None if networks.edge is None else networks.edge_state()
    return Inferred(*_Scan.apply(run, base, edge, *run.parameters.values()))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: _Unrolled, base: Tensor, edge: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run = run
        found = run.forward(base, edge)
        if run.wheels:
            ctx.mark_non_differentiable(*(getattr(found, name) for name in _STEERED))
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, of_base, of_edge, *of_parameters = ctx.needs_input_grad
        base, edge, found = ctx.run.backward(Inferred(*grads))
        asked = zip(ctx.run.parameters, of_parameters, strict=True)
        return (
            None,
            base if of_base else None,
            edge if of_edge else None,
            *(found.get(name) if wanted else None for name, wanted in asked),
        )


class _Perceptron:
    """A head within a scan: its layers for all rows, forward and backward.

    Args:
        head: its parameters.
        first: its columns of the first layers' buffer, which holds what features and neighbours give.
        beside: numbers that the next head sees beside what this one hands on; columns kept for them after its own.
    """

    def __init__(self, head: Head, first: Float[Tensor, "rows h"], beside: int) -> None:
        self.head, self.first = head, first
        self.size = head.last.out_features
        self.second = torch.empty_like(first, memory_format=torch.contiguous_format)
        self.out = first.new_empty(len(first), self.size + beside)
        self.own_weight = None if head.own is None else computing(head.own.weight)
        self.second_weight, self.second_bias = computing(head.second.weight), computing(head.second.bias)
        self.last_weight, self.last_bias = computing(head.last.weight), computing(head.last.bias)

    def forward(self, rows: slice, own: Float[Tensor, "m i"] | None) -> None:
        first, second = self.first[rows], self.second[rows]
        if own is not None:
            assert self.own_weight is not None
            first.addmm_(own, self.own_weight.t())
        first.relu_()
        torch.addmm(self.second_bias, first, self.second_weight.t(), out=second)
        second.relu_()
        torch.addmm(self.last_bias, second, self.last_weight.t(), out=self.out[rows, : self.size])

    def begin_backward(self, first: Float[Tensor, "rows h"]) -> None:
        """With its columns of the gradient of the first layers' buffer."""
        self.of_first = first
        self.of_second = torch.empty_like(self.second)
        self.of_out = self.out.new_empty(len(self.out), self.size)

    def backward(self, rows: slice) -> Float[Tensor, "m i"] | None:
        """From the gradient of the outputs, set before, to that of what only this head sees."""
        of_first, of_second = self.of_first[rows], self.of_second[rows]
        torch.mm(self.of_out[rows], self.last_weight, out=of_second)
        _through_relu(of_second, self.second[rows])
        torch.mm(of_second, self.second_weight, out=of_first)
        _through_relu(of_first, self.first[rows])
        return None if self.own_weight is None else of_first @ self.own_weight

    def gradients(self, own: Float[Tensor, "rows i"] | None) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Of the parameters, once all rows have theirs."""
        head = self.head
        if own is not None:
            assert head.own is not None
            yield head.own.weight, self.of_first.t() @ own
        yield head.second.weight, self.of_second.t() @ self.first
        yield head.second.bias, self.of_second.sum(0, dtype=head.second.bias.dtype)
        yield head.last.weight, self.of_out.t() @ self.second
        yield head.last.bias, self.of_out.sum(0, dtype=head.last.bias.dtype)


class _Unrolled:
    """One scan: the buffers of all steps, and what each step does to them, forward and backward."""

    def __init__(
        self,
        networks: CellNetworks,
        schedule: Schedule,
        images: Float[Tensor, "b 3 s s"],
        noise: Noise | None,
        wheels: bool,
        learn: bool,
    ) -> None:
        self.networks, self.images, self.wheels, self.learn = networks, images, wheels, learn
        self.table = tables(schedule, len(images), images.device)
        order = self.table.order
        self.image_index = order.div(schedule.n_cells, rounding_mode="floor")
        self.origins = networks.origins.index_select(0, order.remainder(schedule.n_cells))
        self.noise = None if noise is None else Noise(*(part.flatten(0, 1)[order] for part in noise))
        ends = (0, *itertools.accumulate(self.table.sizes))
        self.steps = [slice(start, end) for start, end in itertools.pairwise(ends)]
        self.parameters = {
            name: parameter
            for name, parameter in networks.named_parameters()
            if name != "edge" and not name.startswith("features.")
        }
        self.encoder = [
            DeferredLinear(layer) if isinstance(layer, nn.Linear) else layer for layer in networks.encoder
        ]

    def forward(self, base: Float[Tensor, "rows h"], edge: Float[Tensor, " s"] | None) -> Inferred:
        """All steps."""
        networks, n = self.networks, len(base)
        hidden, d = networks.config.hidden, networks.config.z_what_size
        like = networks.origins
        self.first = base.index_select(0, self.table.order)
        self.heads = {
            name: _Perceptron(head, self.first[:, number * hidden : (number + 1) * hidden], beside)
            for number, ((name, head), beside) in enumerate(
                zip(networks.heads.items(), (d + 4, 4 + d, 4 + d + 1, 0), strict=True)
            )
        }
        self.found = Inferred(*(like.new_empty(n, size) for size in (4, 1, 1, d, 8, 2 * d, 2, 1)))
        self.drawn = like.new_empty(n, 4), like.new_empty(n, 1)
        self.local = like.new_empty(n, 4)
        self.unclipped = like.new_empty(n, 1)
        self.graphs: list[tuple[Tensor, Tensor]] = []
        if edge is not None:
            assert networks.context is not None
            self.states = self.first.new_empty(n + 1, networks.state_size)
            self.states[n] = edge
            self.around = self.first.new_empty(n, networks.context.in_features)
            self.context = computing(networks.context.weight)
        for step, rows in enumerate(self.steps):
            self._infer(step, rows)
        return Inferred(*(part.index_select(0, self.table.back) for part in self.found))

    def _infer(self, step: int, rows: slice) -> None:
        networks, found = self.networks, self.found
        d, passed = networks.config.z_what_size, networks.config.passthrough
        where, what, depth, present = self.heads.values()
        if networks.context is not None:
            around = self.around[rows]
            neighbours = self.table.neighbours[step]
            torch.index_select(self.states, 0, neighbours, out=around.view(-1, networks.state_size))
            self.first[rows].addmm_(around, self.context.t())

        where.forward(rows, None)
        parameters = found.where[rows].copy_(where.out[rows, :8])
        drawn = self.drawn[0][rows]
        _draw(parameters, self._normal(rows, 0, 4), drawn)
        local = self.local[rows]
        torch.addcmul(networks.local_shift, clipped_sigmoid(drawn), networks.local_scale, out=local)
        boxes = torch.addcmul(self.origins[rows], local, networks.box_scale, out=found.boxes[rows])
        torch.maximum(boxes, networks.smallest, out=boxes)

        where.out[rows, 8 + passed : 8 + passed + d] = self._encoded(boxes, self.image_index[rows])
        where.out[rows, -4:] = local
        what.forward(rows, where.out[rows, 8:])
        parameters = found.what[rows].copy_(what.out[rows, : 2 * d])
        z_what = found.z_what[rows]
        _draw(parameters, self._normal(rows, 4, 4 + d), z_what)

        for head, first in (what, 2 * d), (depth, 2):
            head.out[rows, first + passed : first + passed + 4] = local
            head.out[rows, first + passed + 4 : first + passed + 4 + d] = z_what
        depth.forward(rows, what.out[rows, 2 * d :])
        parameters = found.depth[rows].copy_(depth.out[rows, :2])
        drawn = self.drawn[1][rows]
        _draw(parameters, self._normal(rows, 4 + d, 5 + d), drawn)
        z_depth = found.z_depth[rows].copy_(clipped_sigmoid(drawn))

        depth.out[rows, -1:] = z_depth
        present.forward(rows, depth.out[rows, 2:])
        unclipped = self.unclipped[rows].copy_(present.out[rows])
        logits = torch.clamp(unclipped, -LOGIT_LIMIT, LOGIT_LIMIT, out=found.logits[rows])
        z_present = found.present[rows]
        relaxed = logits if self.noise is None else logits + self.noise.logistic[rows]
        torch.sigmoid(relaxed, out=z_present)
        if networks.context is not None:
            state = self.states[rows]
            state[:, :4], state[:, 4:-2], state[:, -2:-1], state[:, -1:] = local, z_what, z_depth, z_present

    def _normal(self, rows: slice, start: int, end: int) -> Float[Tensor, "m e"] | None:
        return None if self.noise is None else self.noise.normal[rows, start:end]

    def _encoded(self, boxes: Float[Tensor, "m 4"], image_index: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """The code of each box's glimpse; its graph, from the boxes on, is kept."""
        with torch.set_grad_enabled(self.learn):
            boxes = boxes.detach()
            if self.learn and not self.wheels:
                boxes = boxes.clone().requires_grad_()
            code = glimpses(self.images, boxes, image_index, self.networks.config.patch_size, "border")
            for layer in self.encoder:
                code = layer(code)
        if self.learn:
            self.graphs.append((boxes, code))
        return code.detach()

    def backward(
        self, grads: Inferred
    ) -> tuple[Float[Tensor, "rows h"], Float[Tensor, " s"] | None, dict[str, Tensor]]:
        """From the gradients of what was inferred to those of the features' share, the edge's state and parameters."""
        networks, hidden = self.networks, self.networks.config.hidden
        grads = Inferred(*(grad.index_select(0, self.table.order) for grad in grads))
        self.of_first = torch.zeros_like(self.first) if self.wheels else torch.empty_like(self.first)
        for number, head in enumerate(self.heads.values()):
            head.begin_backward(self.of_first[:, number * hidden : (number + 1) * hidden])
        if networks.context is not None:
            self.of_states = networks.origins.new_zeros(len(self.states), networks.state_size)
        self.of_encoder = {
            name: torch.zeros_like(parameter)
            for name, parameter in self.parameters.items()
            if name.startswith("encoder.") and parameter.requires_grad
        }
        for step in reversed(range(len(self.steps))):
            self._back(step, self.steps[step], grads)
        edge = None if networks.context is None else self.of_states[-1]
        return self.of_first.index_select(0, self.table.back), edge, self._gradients()

    def _back(self, step: int, rows: slice, grads: Inferred) -> None:
        networks, found = self.networks, self.found
        d, passed = networks.config.z_what_size, networks.config.passthrough
        where, what, depth, present = self.heads.values()
        # Gradients of the box in cells and anchors and of z_what, gathered from all that sees them.
        of_local = networks.origins.new_zeros(rows.stop - rows.start, 4)
        of_what = grads.z_what[rows]
        if networks.context is not None:
            of_state = self.of_states[rows]
            of_local, of_what = of_local + of_state[:, :4], of_what + of_state[:, 4:-2]

        if not self.wheels:
            of_present = grads.present[rows]
            of_depth = grads.z_depth[rows]
            if networks.context is not None:
                of_present, of_depth = of_present + of_state[:, -1:], of_depth + of_state[:, -2:-1]
            z_present, unclipped = found.present[rows], self.unclipped[rows]
            of_logits = torch.addcmul(grads.logits[rows], of_present, z_present * (1 - z_present))
            # At the clip gradients pass that lead back inside. The count prior begins at almost 1 and drives
            # presences there; without a gradient they would stay for good, whatever the prior becomes.
            inside = (unclipped.abs() <= LOGIT_LIMIT) | (of_logits * unclipped > 0)
            present.of_out[rows] = of_logits * inside
            own = present.backward(rows)
            assert own is not None
            depth.of_out[rows, 2:], also_local, also_what, also_depth = own.split([passed, 4, d, 1], 1)
            of_local, of_what, of_depth = of_local + also_local, of_what + also_what, of_depth + also_depth

            drawn = self.drawn[1][rows]
            of_drawn = _through_sigmoid(of_depth, found.z_depth[rows], drawn)
            depth.of_out[rows, :2] = grads.depth[rows] + _through_draw(
                of_drawn, found.depth[rows], self._normal(rows, 4 + d, 5 + d)
            )
            own = depth.backward(rows)
            assert own is not None
            what.of_out[rows, 2 * d :], also_local, also_what = own.split([passed, 4, d], 1)
            of_local, of_what = of_local + also_local, of_what + also_what
        else:
            what.of_out[rows, 2 * d :] = 0

        what.of_out[rows, : 2 * d] = grads.what[rows] + _through_draw(
            of_what, found.what[rows], self._normal(rows, 4, 4 + d)
        )
        own = what.backward(rows)
        assert own is not None
        where.of_out[rows, 8:], of_code, also_local = own.split([passed, d, 4], 1)
        of_boxes = self._back_to_boxes(step, of_code)

        if of_boxes is not None:
            of_local = torch.addcmul(of_local + also_local, of_boxes + grads.boxes[rows], networks.box_scale)
            drawn = self.drawn[0][rows]
            share = (self.local[rows] - networks.local_shift) / networks.local_scale
            of_drawn = _through_sigmoid(of_local * networks.local_scale, share, drawn)
            where.of_out[rows, :8] = grads.where[rows] + _through_draw(
                of_drawn, found.where[rows], self._normal(rows, 0, 4)
            )
        else:
            where.of_out[rows, :8] = 0
        where.backward(rows)
        if networks.context is not None:
            of_around = (self.of_first[rows] @ self.context).view(-1, networks.state_size)
            self.of_states.index_add_(0, self.table.neighbours[step], of_around.to(self.of_states.dtype))

    def _back_to_boxes(self, step: int, of_code: Float[Tensor, "m d"]) -> Float[Tensor, "m 4"] | None:
        """Through the encoder; the gradients of its parameters are added up, but for those that are deferred."""
        boxes, code = self.graphs[step]
        names = list(self.of_encoder)
        sources = [self.parameters[name] for name in names]
        if boxes.requires_grad:
            sources.append(boxes)
        if not sources:
            return None
        grads = torch.autograd.grad(
            code, sources, of_code.to(code.dtype), retain_graph=True, allow_unused=True
        )
        for name, grad in zip(names, grads, strict=False):
            if grad is not None:
                self.of_encoder[name] += grad
        return grads[-1] if boxes.requires_grad else None

    def _gradients(self) -> dict[str, Tensor]:
        """Of all parameters that have one, by name."""
        networks = self.networks
        d = networks.config.z_what_size
        where, what, depth, present = self.heads.values()
        found: dict[nn.Parameter, Tensor] = dict(where.gradients(None))
        found.update(what.gradients(where.out[:, 8:]))
        if not self.wheels:
            found.update(depth.gradients(what.out[:, 2 * d :]))
            found.update(present.gradients(depth.out[:, 2:]))
        if networks.context is not None:
            found[networks.context.weight] = self.of_first.t() @ self.around
        for layer in self.encoder:
            if isinstance(layer, DeferredLinear) and layer.layer.weight.requires_grad:
                found[layer.layer.weight], found[layer.layer.bias] = layer.gradients()
        named = {
            name: found[parameter].to(parameter.dtype)
            for name, parameter in self.parameters.items()
            if parameter in found
        }
        return {**self.of_encoder, **named}


def std_of(raw: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Standard deviations in (0, 2) from a network's output."""
    return 2 * clipped_sigmoid(raw)


def _draw(
    parameters: Float[Tensor, "m e"], noise: Float[Tensor, "m d"] | None, out: Float[Tensor, "m d"]
) -> None:
    """Samples of normals, whose means come first; without noise the means."""
    mean, raw = parameters.chunk(2, 1)
    if noise is None:
        out.copy_(mean)
    else:
        torch.addcmul(mean, std_of(raw), noise, out=out)


def _through_draw(
    grad: Float[Tensor, "m d"], parameters: Float[Tensor, "m e"], noise: Float[Tensor, "m d"] | None
) -> Float[Tensor, "m e"]:
    """The gradient of :func:`_draw`."""
    if noise is None:
        return torch.cat([grad, torch.zeros_like(grad)], 1)
    raw = parameters.chunk(2, 1)[1]
    return torch.cat([grad, _through_sigmoid(grad * noise * 2, clipped_sigmoid(raw), raw)], 1)


def _through_sigmoid(
    grad: Float[Tensor, "m d"], value: Float[Tensor, "m d"], logits: Float[Tensor, "m d"]
) -> Float[Tensor, "m d"]:
    """The gradient of a clipped sigmoid, from its value."""
    return grad * value * (1 - value) * (logits.abs() <= LOGIT_LIMIT)


def _through_relu(grad: Float[Tensor, "m h"], value: Float[Tensor, "m h"]) -> None:
    """The gradient of a rectifier, in place, from its value."""
    torch.ops.aten.threshold_backward.grad_input(grad, value, 0, grad_input=grad)
