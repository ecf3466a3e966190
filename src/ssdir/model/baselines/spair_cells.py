"""The networks that infer SPAIR's cells, the same for all of them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssdir.model.baselines.glimpses import SMALLEST_SIDE
from ssdir.model.baselines.spair_config import SPAIRConfig
from ssdir.model.baselines.spair_networks import glimpse_encoder
from ssdir.model.baselines.spair_schedule import offsets


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
