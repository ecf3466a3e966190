"""A scan over SPAIR's cells, unrolled: forward, and backward by hand.

The cells of a step see what earlier steps inferred, and each step is many small products and elementwise operations.
Recorded one by one by autograd they cost as much as the arithmetic itself: a node, an allocation and a copy each. Here
every layer has one buffer for the rows of all steps; what the next layer sees beside it lies in the same rows, so that
nothing is put together; gradients go back through the same layout, and each weight's is one product at the end.

Rows: step by step, in each image by image, cell by cell.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssdir.model.baselines.distributions import wide
from ssdir.model.baselines.glimpses import Glimpses
from ssdir.model.baselines.spair_cells import CellNetworks
from ssdir.model.baselines.spair_layers import (
    CalledEncoder,
    Layer,
    LayeredEncoder,
    LayeredHead,
    Parts,
    Weights,
)
from ssdir.model.baselines.spair_networks import LOGIT_LIMIT, clipped_sigmoid
from ssdir.model.baselines.spair_noise import Noise
from ssdir.model.baselines.spair_schedule import Schedule, tables


class Inferred(NamedTuple):
    """What was inferred for some cells."""

    boxes: Float[Tensor, "m 4"]
    present: Float[Tensor, "m 1"]
    z_depth: Float[Tensor, "m 1"]
    z_what: Float[Tensor, "m d"]
    where: Float[Tensor, "m 8"]
    """Means and, before :func:`std_of`, standard deviations; likewise the next."""
    what: Float[Tensor, "m e"]
    depth: Float[Tensor, "m 2"]
    logits: Float[Tensor, "m 1"]


_STEERED = ("boxes", "present", "z_depth", "where", "depth", "logits")
"""What has no gradient while training wheels are on."""


def unroll(
    networks: CellNetworks,
    schedule: Schedule,
    features: Float[Tensor, "m f"],
    images: Float[Tensor, "b 3 s s"],
    noise: Noise | None,
    wheels: bool,
) -> Inferred:
    """All cells, image by image in raster order, inferred in the schedule's order.

    Args:
        networks: what infers a cell.
        schedule: with the networks' neighbours (none for networks without context).
        features: of each cell.
        images: in [0, 1]. No gradient reaches them.
        noise: None takes the means, and the probability of presence.
        wheels: no gradient reaches boxes, depth and presence.

    Raises:
        RuntimeError: under ``torch.export``, which cannot see into kernels that write to buffers.
    """
    if torch.compiler.is_exporting():
        raise RuntimeError("SPAIR's scan cannot be exported; torch.compile goes around it")
    kind = features.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else networks.origins.dtype
    learn = torch.is_grad_enabled()
    run = _Unrolled(networks, schedule, images.detach(), noise, wheels, computed, learn)
    edge = None if networks.edge is None else networks.edge_state()
    return Inferred(*_Scan.apply(run, features, edge, *run.parameters))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: _Unrolled, features: Tensor, edge: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run = run
        # Not to be read: autograd frees them with the graph, and knows whether somebody has changed them since.
        ctx.save_for_backward(features, *parameters)
        with torch.autocast(features.device.type, enabled=False):
            found = run.forward(features, edge)
        if run.wheels:
            ctx.mark_non_differentiable(*(getattr(found, name) for name in _STEERED))
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, of_features, of_edge, *of_parameters = ctx.needs_input_grad
        _ = ctx.saved_tensors
        run: _Unrolled = ctx.run
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.run = None  # its buffers would live as long as the loss
        with torch.autocast(grads[0].device.type, enabled=False):
            features, edge = run.backward(Inferred(*grads))
            found = run.gradients()
        asked = zip(run.parameters, of_parameters, strict=True)
        return (
            None,
            features if of_features else None,
            edge if of_edge else None,
            *(found.get(parameter) if wanted else None for parameter, wanted in asked),
        )


class _Unrolled:
    """One scan: the buffers of all steps, and what each step does to them, forward and backward."""

    def __init__(
        self,
        networks: CellNetworks,
        schedule: Schedule,
        images: Float[Tensor, "b 3 s s"],
        noise: Noise | None,
        wheels: bool,
        computed: torch.dtype,
        learn: bool,
    ) -> None:
        self.networks, self.wheels, self.computed, self.learn = networks, wheels, computed, learn
        self.places = wide(networks.origins)  # boxes, and what kernels see, are in float32 or wider
        table = tables(schedule, len(images), images.device)
        self.table, self.sizes = table, table.sizes
        self.glimpses = Glimpses(images.to(self.places.dtype), networks.config.patch_size, "border")
        self.image_index = table.order.div(schedule.n_cells, rounding_mode="floor").split(table.sizes)
        cells = table.order.remainder(schedule.n_cells)
        self.origins = self.places.index_select(0, cells).split(table.sizes)
        self.doubled = self.logistics = None
        if noise is not None:
            normal, logistic = (part.flatten(0, 1).index_select(0, table.order) for part in noise)
            sides = [4, networks.config.z_what_size, 1]
            # Standard deviations are twice a sigmoid.
            self.doubled = [part.split(table.sizes) for part in (2 * normal).split(sides, 1)]
            self.logistics = logistic.split(table.sizes)
        # As the modules give them, whatever they make them of; an encoder that is called has its own.
        called = [] if networks.config.patch_networks == "mlp" else list(networks.encoder.modules())
        linears = [part for part in networks.modules() if isinstance(part, nn.Linear) and part not in called]
        self.weights: dict[nn.Module, Weights] = {part: (part.weight, part.bias) for part in linears}
        self.parameters = [part for pair in self.weights.values() for part in pair if part is not None]
        self.parameters += [parameter for part in called[:1] for parameter in part.parameters()]

    def forward(self, features: Float[Tensor, "m f"], edge: Float[Tensor, " s"] | None) -> Inferred:
        """All steps."""
        networks, sizes, n = self.networks, self.sizes, len(features)
        config, like, weights = networks.config, self.places, self.weights
        d, passed = config.z_what_size, config.passthrough
        rows = features.index_select(0, self.table.order).to(self.computed)
        self.all_first = rows.new_empty(n, networks.features.out_features)
        self.features = Layer(weights[networks.features], rows, self.all_first, (n,))
        self.features.forward(0)
        columns = self.all_first.split(config.hidden, 1)
        where = LayeredHead(networks.where, weights, columns[0], None, (4, 4), (d, 4), sizes)
        what = LayeredHead(networks.what, weights, columns[1], where, (d, d), (4, d), sizes)
        depth = LayeredHead(networks.depth, weights, columns[2], what, (1, 1), (4, d, 1), sizes)
        present = LayeredHead(networks.present, weights, columns[3], depth, (1,), (), sizes)
        self.heads = where, what, depth, present
        glimpses = rows.new_empty(n, 3 * config.patch_size**2)
        codes = where.all_out[:, 8 + passed : -4]
        self.encoder: LayeredEncoder | CalledEncoder
        if config.patch_networks == "mlp":
            own = [weights[layer] for layer in networks.encoder if layer in weights]
            self.encoder = LayeredEncoder(own, glimpses, codes, sizes)
        else:
            self.encoder = CalledEncoder(networks.encoder, glimpses, codes, sizes, self.learn)
        self.seen = glimpses.split(sizes)
        found = [like.new_empty(n, size) for size in (4, 1, 1, d)]
        self.boxes, self.present, self.z_depth, self.z_what = (part.split(sizes) for part in found)
        # What a cell tells its neighbours: the box in cells and anchors, z_what, depth, presence; the last row is what
        # they see beyond the edge.
        self.states = self.all_first.new_empty(n + 1, networks.state_size)
        self.state = self._of_state(self.states[:n])
        self.local = like.new_empty(n, 4).split(sizes)
        self.drawn_where, self.drawn_depth = (like.new_empty(n, size).split(sizes) for size in (4, 1))
        self.context = None
        if networks.context is not None:
            assert edge is not None
            self.states[n] = edge
            around = self.all_first.new_empty(n, networks.context.in_features)
            self.context = Layer(weights[networks.context], around, self.all_first, sizes)
        for step in range(len(sizes)):
            self._infer(step)
        found += [wide(head.all_out[:, : head.n_parameters]) for head in self.heads]
        back = Inferred(*(part.index_select(0, self.table.back) for part in found))
        return back._replace(logits=back.logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT))

    def _of_state(self, states: Float[Tensor, "n s"]) -> Parts:
        """Box, z_what, depth and presence in cells' states, each step by step."""
        sides = [4, self.networks.config.z_what_size, 1, 1]
        return [part.split(self.sizes) for part in states.split(sides, 1)]

    def _infer(self, step: int) -> None:
        networks = self.networks
        where, what, depth, present = self.heads
        local, z_what, z_depth = self.local[step], self.z_what[step], self.z_depth[step]
        if self.context is not None:
            around = self.context.inputs[step].view(-1, networks.state_size)
            torch.index_select(self.states, 0, self.table.neighbours[step], out=around)
            self.context.forward(step)

        where.forward(step)
        drawn = self.drawn_where[step]
        self._draw(0, step, drawn)
        torch.addcmul(networks.local_shift, clipped_sigmoid(drawn), networks.local_scale, out=local)
        boxes = torch.addcmul(self.origins[step], local, networks.box_scale, out=self.boxes[step])
        torch.maximum(boxes, networks.smallest, out=boxes)
        self.glimpses.read(boxes, self.image_index[step], self.seen[step])
        self.encoder.forward(step)
        for place in (where.beside[1], what.beside[0], depth.beside[0], self.state[0]):
            place[step].copy_(local)

        what.forward(step)
        self._draw(1, step, z_what)
        for place in (what.beside[1], depth.beside[1], self.state[1]):
            place[step].copy_(z_what)

        depth.forward(step)
        drawn = self.drawn_depth[step]
        self._draw(2, step, drawn)
        z_depth.copy_(clipped_sigmoid(drawn))
        for place in (depth.beside[2], self.state[2]):
            place[step].copy_(z_depth)

        present.forward(step)
        logits = wide(present.parameters[0][step]).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        relaxed = logits if self.logistics is None else logits + self.logistics[step]
        self.state[3][step].copy_(torch.sigmoid(relaxed, out=self.present[step]))

    def _draw(self, head: int, step: int, out: Float[Tensor, "m d"]) -> None:
        """Samples of where (0), z_what (1) or depth (2); without noise the means."""
        mean, raw = (wide(part[step]) for part in self.heads[head].parameters)
        if self.doubled is None:
            out.copy_(mean)
        else:
            torch.addcmul(mean, clipped_sigmoid(raw), self.doubled[head][step], out=out)

    def backward(self, grads: Inferred) -> tuple[Float[Tensor, "m f"], Float[Tensor, " s"] | None]:
        """From the gradients of what was inferred to those of the features and the edge's state."""
        networks, table = self.networks, self.table
        steps = [
            Inferred(*parts)
            for parts in zip(
                *(grad.index_select(0, table.order).split(self.sizes) for grad in grads), strict=True
            )
        ]
        # Under training wheels not every column is reached.
        room = torch.zeros_like if self.wheels else torch.empty_like
        of_first = room(self.all_first)
        for head, columns in zip(self.heads, of_first.split(networks.config.hidden, 1), strict=True):
            head.begin_backward(columns, room(head.all_out))
        where = self.heads[0]
        self.encoder.begin_backward(
            where.of_all_out[:, where.n_parameters + networks.config.passthrough : -4]
        )
        self.of_states = self.places.new_zeros(self.states.shape)
        self.of_state = self._of_state(self.of_states[:-1])
        if self.context is not None:
            of_around = torch.empty_like(self.context.all_inputs)
            self.context.begin_backward(of_first, of_around.split(self.sizes))
        for step in reversed(range(len(self.sizes))):
            self._back(step, steps[step])
        edge = None if self.context is None else self.of_states[-1]
        self.features.begin_backward(of_first, [torch.empty_like(self.features.all_inputs)])
        return wide(self.features.backward(0)).index_select(0, table.back), edge

    def _back(self, step: int, grads: Inferred) -> None:
        networks = self.networks
        where, what, depth, present = self.heads
        of_local, of_z_what, of_z_depth, of_present = (part[step] for part in self.of_state)
        if not self.wheels:
            # At the clip gradients pass that lead back inside. The count prior begins at almost 1 and drives
            # presences there; without a gradient they would stay for good, whatever the prior becomes.
            logits = wide(present.parameters[0][step])
            through = torch.ops.aten.sigmoid_backward(grads.present + of_present, self.present[step])
            of_logits = grads.logits + through
            inside = (logits.abs() <= LOGIT_LIMIT) | (of_logits * logits > 0)
            torch.mul(of_logits, inside, out=present.of_parameters[0][step])
            present.backward(step)
            of_depth = grads.z_depth + of_z_depth + depth.of_beside[2][step]
            of_drawn = _through_sigmoid(of_depth, self.z_depth[step], self.drawn_depth[step])
            self._back_to(2, step, of_drawn, grads.depth)
            depth.backward(step)

        of_what = grads.z_what + of_z_what + what.of_beside[1][step]
        of_what += depth.of_beside[1][step]
        self._back_to(1, step, of_what, grads.what)
        what.backward(step)
        of_glimpses = self.encoder.backward(step, not self.wheels)

        if of_glimpses is not None:
            of_boxes = self.glimpses.pull(of_glimpses, self.boxes[step], self.image_index[step])
            for head, part in ((where, 1), (what, 0), (depth, 0)):
                of_local += head.of_beside[part][step]
            of_local.addcmul_(of_boxes + grads.boxes, networks.box_scale)
            share = (self.local[step] - networks.local_shift) / networks.local_scale
            of_drawn = _through_sigmoid(of_local * networks.local_scale, share, self.drawn_where[step])
            self._back_to(0, step, of_drawn, grads.where)
        where.backward(step)
        if self.context is not None:
            of_around = self.context.backward(step).view(-1, networks.state_size)
            self.of_states.index_add_(0, self.table.neighbours[step], wide(of_around))

    def _back_to(
        self, head: int, step: int, of_drawn: Float[Tensor, "m d"], of_parameters: Float[Tensor, "m e"]
    ) -> None:
        """The gradient of the parameters of where (0), z_what (1) or depth (2), from that of what was drawn and what
        else they get."""
        of_mean, of_raw = of_parameters.chunk(2, 1)
        to_mean, to_raw = (part[step] for part in self.heads[head].of_parameters)
        torch.add(of_mean, of_drawn, out=to_mean)
        if self.doubled is None:
            to_raw.copy_(of_raw)
        else:
            raw = wide(self.heads[head].parameters[1][step])
            through = _through_sigmoid(of_drawn * self.doubled[head][step], clipped_sigmoid(raw), raw)
            torch.add(of_raw, through, out=to_raw)

    def gradients(self) -> dict[Tensor, Tensor]:
        """Of the parameters that have one, after :meth:`backward`."""
        where, what, depth, present = self.heads
        heads = (where, what) if self.wheels else (where, what, depth, present)
        layers = [self.features, *(layer for head in heads for layer in head.layers)]
        if self.context is not None:
            layers.append(self.context)
        found: dict[Tensor, Tensor] = {}
        for part in (self.encoder, *layers):
            for parameter, grad in part.gradients():  # layers may share one
                found[parameter] = found[parameter] + grad if parameter in found else grad
        return {parameter: grad.to(parameter.dtype) for parameter, grad in found.items()}


def std_of(raw: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Standard deviations in (0, 2) from a network's output."""
    return 2 * clipped_sigmoid(raw)


def _through_sigmoid(
    grad: Float[Tensor, "m d"], value: Float[Tensor, "m d"], logits: Float[Tensor, "m d"]
) -> Float[Tensor, "m d"]:
    """The gradient of a clipped sigmoid, from its value."""
    grad = torch.ops.aten.sigmoid_backward(grad, value)
    return torch.ops.aten.hardtanh_backward(grad, logits, -LOGIT_LIMIT, LOGIT_LIMIT)
