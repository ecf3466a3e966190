"""A scan over SPAIR's cells, unrolled: forward, and backward by hand.

The cells of a step see what earlier steps inferred, and each step is many small products and elementwise operations.
Recorded one by one by autograd they cost as much as the arithmetic itself: a node, an allocation and a copy each. Here
every layer has one buffer for the rows of all steps; what the next layer sees beside it lies in the same rows, so that
nothing is put together; gradients go back through the same layout, and each weight's is one product at the end.

Rows: step by step, in each image by image, cell by cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssdir.model.baselines.distributions import wide
from ssdir.model.baselines.glimpses import Glimpses
from ssdir.model.baselines.spair_cells import CellNetworks, Head
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


_Weights = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer, as its module gives them."""


class _Layer:
    """A linear layer within a scan, between columns of two buffers with the rows of all steps.

    Args:
        weights: of the layer.
        inputs: what it sees.
        outputs: what it gives; a layer without a bias adds to what is there.
        sizes: rows of each step.
    """

    def __init__(
        self,
        weights: _Weights,
        inputs: Float[Tensor, "rows i"],
        outputs: Float[Tensor, "rows o"],
        sizes: tuple[int, ...],
    ) -> None:
        self.parameters, self.all_inputs, self.sizes = weights, inputs, sizes
        self.inputs, self.outputs = inputs.split(sizes), outputs.split(sizes)
        self.weight, self.bias = (_constant(parameter, outputs) for parameter in weights)
        self.transposed = self.weight.t()

    def forward(self, step: int) -> Float[Tensor, "m o"]:
        outputs = self.outputs[step]
        if self.bias is None:
            return outputs.addmm_(self.inputs[step], self.transposed)
        return torch.addmm(self.bias, self.inputs[step], self.transposed, out=outputs)

    def begin_backward(
        self, of_outputs: Float[Tensor, "rows o"], of_inputs: Sequence[Float[Tensor, "_ i"]]
    ) -> None:
        """With the gradients' buffers, the latter step by step."""
        self.of_all_outputs = of_outputs
        self.of_outputs, self.of_inputs = of_outputs.split(self.sizes), of_inputs

    def backward(self, step: int) -> Float[Tensor, "m i"]:
        return torch.mm(self.of_outputs[step], self.weight, out=self.of_inputs[step])

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the parameters, once all steps have gone back."""
        weight, bias = self.parameters
        yield weight, self.of_all_outputs.t() @ self.all_inputs
        if bias is not None:
            yield bias, self.of_all_outputs.sum(0)


_Parts = list[tuple[Tensor, ...]]
"""Columns of a buffer with the rows of all steps, step by step."""


class _Head:
    """A head within a scan.

    Args:
        head: its layers.
        weights: of all linear layers.
        first: its columns of the first layers' buffer, which holds what features and neighbours give.
        before: the head of which this one sees what it hands on, and what lies beside it.
        parameters: columns of each parameter of its posterior, which come first; all others are handed on.
        beside: columns of what the next head sees beside what this one hands on; they are kept after its own.
        sizes: rows of each step.
    """

    def __init__(
        self,
        head: Head,
        weights: Mapping[nn.Module, _Weights],
        first: Float[Tensor, "rows h"],
        before: _Head | None,
        parameters: tuple[int, ...],
        beside: tuple[int, ...],
        sizes: tuple[int, ...],
    ) -> None:
        self.sizes, self.before = sizes, before
        self.n_outputs, self.n_parameters = head.last.out_features, sum(parameters)
        self.columns = parameters, self.n_outputs - self.n_parameters, beside
        self.all_out = first.new_empty(len(first), self.n_outputs + sum(beside))
        self.parameters, self.beside = self.of_columns(self.all_out)
        self.all_second = torch.empty_like(first, memory_format=torch.contiguous_format)
        self.first, self.second = first.split(sizes), self.all_second.split(sizes)
        self.layers = [
            _Layer(weights[head.second], first, self.all_second, sizes),
            _Layer(weights[head.last], self.all_second, self.all_out[:, : self.n_outputs], sizes),
        ]
        if before is not None:
            assert head.own is not None
            self.layers.append(
                _Layer(weights[head.own], before.all_out[:, before.n_parameters :], first, sizes)
            )

    def of_columns(self, outputs: Float[Tensor, "rows o"]) -> tuple[_Parts, _Parts]:
        """The parameters, and what lies beside what is handed on, each step by step."""
        parameters, handed, beside = self.columns
        parts = [part.split(self.sizes) for part in outputs.split([*parameters, handed, *beside], 1)]
        return parts[: len(parameters)], parts[len(parameters) + 1 :]

    def forward(self, step: int) -> None:
        second, last, *own = self.layers
        for layer in own:
            layer.forward(step)
        self.first[step].relu_()
        second.forward(step).relu_()
        last.forward(step)

    def begin_backward(self, of_first: Float[Tensor, "rows h"], of_out: Float[Tensor, "rows o"]) -> None:
        """With the gradients' buffers; after the head before it."""
        self.of_all_out = of_out
        self.of_parameters, self.of_beside = self.of_columns(of_out)
        of_second = torch.empty_like(self.all_second)
        second, last, *own = self.layers
        second.begin_backward(of_second, of_first.split(self.sizes))
        last.begin_backward(of_out[:, : self.n_outputs], of_second.split(self.sizes))
        for layer in own:
            assert self.before is not None
            of_seen = self.before.of_all_out[:, self.before.n_parameters :]
            layer.begin_backward(of_first, of_seen.split(self.sizes))

    def backward(self, step: int) -> None:
        """From the gradient of the outputs to that of what only this head sees."""
        second, last, *own = self.layers
        _through_relu(last.backward(step), self.second[step])
        _through_relu(second.backward(step), self.first[step])
        for layer in own:
            layer.backward(step)


class _Perceptron:
    """The encoder of glimpses, linear layers with rectifiers between them, within a scan.

    Args:
        weights: of its layers.
        glimpses: what it sees, each a line.
        codes: what it gives.
        sizes: rows of each step.
    """

    def __init__(
        self,
        weights: Sequence[_Weights],
        glimpses: Float[Tensor, "rows k"],
        codes: Float[Tensor, "rows d"],
        sizes: tuple[int, ...],
    ) -> None:
        self.hidden = [codes.new_empty(len(codes), len(weight)) for weight, _ in weights[:-1]]
        between = zip(weights, [glimpses, *self.hidden], [*self.hidden, codes], strict=True)
        self.layers = [_Layer(*places, sizes) for places in between]
        self.sizes = sizes

    def forward(self, step: int) -> None:
        *others, last = self.layers
        for layer in others:
            layer.forward(step).relu_()
        last.forward(step)

    def begin_backward(self, of_codes: Float[Tensor, "rows d"]) -> None:
        of_hidden = [torch.empty_like(hidden) for hidden in self.hidden]
        # The gradient of glimpses is used at once: each step's takes the place of the last one's.
        glimpses = self.layers[0].all_inputs
        room = glimpses.new_empty(max(self.sizes), glimpses.shape[1])
        of_glimpses = [room[:size] for size in self.sizes]
        of_inputs = [of_glimpses, *(hidden.split(self.sizes) for hidden in of_hidden)]
        for layer, of_outputs, of_input in zip(self.layers, [*of_hidden, of_codes], of_inputs, strict=True):
            layer.begin_backward(of_outputs, of_input)

    def backward(self, step: int, of_glimpses: bool) -> Float[Tensor, "m k"] | None:
        """From the gradient of the codes to that of the glimpses, where it is asked for."""
        first, *others = self.layers
        for layer in reversed(others):
            _through_relu(layer.backward(step), layer.inputs[step])
        return first.backward(step) if of_glimpses else None

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the parameters, once all steps have gone back."""
        for layer in self.layers:
            yield from layer.gradients()


class _Network:
    """Any other encoder of glimpses within a scan: autograd, step by step.

    Args:
        encoder: what it is.
        glimpses, codes, sizes: as for :class:`_Perceptron`.
        learn: gradients will be asked for.
    """

    def __init__(
        self,
        encoder: nn.Sequential,
        glimpses: Float[Tensor, "rows k"],
        codes: Float[Tensor, "rows d"],
        sizes: tuple[int, ...],
        learn: bool,
    ) -> None:
        self.encoder, self.sizes, self.learn = encoder, sizes, learn
        self.parameters = list(encoder.parameters())
        self.glimpses, self.codes = glimpses.split(sizes), codes.split(sizes)
        self.side = math.isqrt(glimpses.shape[1] // 3)
        self.graphs: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, step: int) -> None:
        kind, device = self.codes[step].dtype, self.codes[step].device.type
        half = kind not in (torch.float32, torch.float64)
        with torch.set_grad_enabled(self.learn), torch.autocast(device, kind, enabled=half):
            glimpses = self.glimpses[step].clone().requires_grad_(self.learn)
            code = self.encoder(glimpses.view(-1, 3, self.side, self.side))
        self.codes[step].copy_(code.detach())
        if self.learn:
            self.graphs[step] = glimpses, code

    def begin_backward(self, of_codes: Float[Tensor, "rows d"]) -> None:
        self.of_codes = of_codes.split(self.sizes)
        self.found = {parameter: torch.zeros_like(parameter) for parameter in self.parameters}

    def backward(self, step: int, of_glimpses: bool) -> Float[Tensor, "m k"] | None:
        """From the gradient of the codes to that of the glimpses, where it is asked for."""
        glimpses, code = self.graphs[step]
        asked = [parameter for parameter in self.found if parameter.requires_grad]
        sources = [*asked, glimpses] if of_glimpses else asked
        if not sources:
            return None
        grads = torch.autograd.grad(code, sources, self.of_codes[step].to(code.dtype), retain_graph=True)
        for parameter, grad in zip(asked, grads, strict=False):
            self.found[parameter] += grad
        return grads[-1] if of_glimpses else None

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the parameters, once all steps have gone back."""
        yield from self.found.items()


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
        self.weights: dict[nn.Module, _Weights] = {part: (part.weight, part.bias) for part in linears}
        self.parameters = [part for pair in self.weights.values() for part in pair if part is not None]
        self.parameters += [parameter for part in called[:1] for parameter in part.parameters()]

    def forward(self, features: Float[Tensor, "m f"], edge: Float[Tensor, " s"] | None) -> Inferred:
        """All steps."""
        networks, sizes, n = self.networks, self.sizes, len(features)
        config, like, weights = networks.config, self.places, self.weights
        d, passed = config.z_what_size, config.passthrough
        rows = features.index_select(0, self.table.order).to(self.computed)
        self.all_first = rows.new_empty(n, networks.features.out_features)
        self.features = _Layer(weights[networks.features], rows, self.all_first, (n,))
        self.features.forward(0)
        columns = self.all_first.split(config.hidden, 1)
        where = _Head(networks.where, weights, columns[0], None, (4, 4), (d, 4), sizes)
        what = _Head(networks.what, weights, columns[1], where, (d, d), (4, d), sizes)
        depth = _Head(networks.depth, weights, columns[2], what, (1, 1), (4, d, 1), sizes)
        present = _Head(networks.present, weights, columns[3], depth, (1,), (), sizes)
        self.heads = where, what, depth, present
        glimpses = rows.new_empty(n, 3 * config.patch_size**2)
        codes = where.all_out[:, 8 + passed : -4]
        self.encoder: _Perceptron | _Network
        if config.patch_networks == "mlp":
            own = [weights[layer] for layer in networks.encoder if layer in weights]
            self.encoder = _Perceptron(own, glimpses, codes, sizes)
        else:
            self.encoder = _Network(networks.encoder, glimpses, codes, sizes, self.learn)
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
            self.context = _Layer(weights[networks.context], around, self.all_first, sizes)
        for step in range(len(sizes)):
            self._infer(step)
        found += [wide(head.all_out[:, : head.n_parameters]) for head in self.heads]
        back = Inferred(*(part.index_select(0, self.table.back) for part in found))
        return back._replace(logits=back.logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT))

    def _of_state(self, states: Float[Tensor, "n s"]) -> _Parts:
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


def _constant(parameter: Tensor | None, like: Tensor) -> Any:
    """A parameter as a constant of the type of ``like``; None remains None."""
    return None if parameter is None else parameter.detach().to(like.dtype)


def std_of(raw: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Standard deviations in (0, 2) from a network's output."""
    return 2 * clipped_sigmoid(raw)


def _through_sigmoid(
    grad: Float[Tensor, "m d"], value: Float[Tensor, "m d"], logits: Float[Tensor, "m d"]
) -> Float[Tensor, "m d"]:
    """The gradient of a clipped sigmoid, from its value."""
    grad = torch.ops.aten.sigmoid_backward(grad, value)
    return torch.ops.aten.hardtanh_backward(grad, logits, -LOGIT_LIMIT, LOGIT_LIMIT)


def _through_relu(grad: Float[Tensor, "m h"], value: Float[Tensor, "m h"]) -> None:
    """The gradient of a rectifier, in place, from its value."""
    torch.ops.aten.threshold_backward.grad_input(grad, value, 0, grad_input=grad)
