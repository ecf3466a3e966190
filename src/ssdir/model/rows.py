"""Indices of ``objects[...]``, turned into something that selects rows of a tensor."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


def chosen_rows(chosen: Any, n: int) -> slice | Tensor:
    """What picks the chosen of ``n`` rows out of a tensor, and leaves them rows."""
    if isinstance(chosen, slice):
        backwards = chosen.step is not None and chosen.step < 0  # which tensors cannot
        return torch.tensor(range(n)[chosen], dtype=torch.long) if backwards else chosen
    if isinstance(chosen, Tensor):
        if chosen.dtype == torch.bool and chosen.shape == (n,):
            return chosen.nonzero().squeeze(1)
        if chosen.dtype == torch.bool:
            raise IndexError(f"the mask has shape {tuple(chosen.shape)}, but there are {n} objects: ({n},)")
        if chosen.ndim > 1 or chosen.is_floating_point() or chosen.is_complex():
            raise TypeError(f"objects are chosen by a mask or by rows, not by {chosen.ndim}-d {chosen.dtype}")
        return chosen.long().reshape(-1)
    try:
        row = operator.index(chosen)
    except TypeError:
        pass
    else:
        if not -n <= row < n:
            raise IndexError(f"there is no object {row}: there are {n}")
        return slice(row % n, row % n + 1)
    try:
        rows = torch.as_tensor(chosen)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"objects are chosen by a mask or by rows, not by {type(chosen).__name__}") from error
    return chosen_rows(rows if rows.numel() else rows.long(), n)
