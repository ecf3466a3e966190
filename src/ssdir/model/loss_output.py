"""The output of a training step's forward pass: loss terms and diagnostics."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor


class LossOutput(NamedTuple):
    """What a model says of a batch."""

    losses: dict[str, Float[Tensor, ""]]
    """Unweighted loss terms."""
    diagnostics: dict[str, Any]
    """Scalars (tensors or numbers) that tell a healthy run from a sick one; columns ``health/...``."""
