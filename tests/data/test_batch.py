"""The packed batch."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from ssdir.data.batch import Batch


def test_counts_include_images_without_objects() -> None:
    batch = Batch(
        torch.zeros(4, 3, 2, 2), torch.rand(3, 4), torch.arange(3), torch.tensor([1, 1, 3]), (5, 6, 7, 8)
    )
    assert batch.counts().tolist() == [0, 2, 0, 1] and len(batch) == 4


def test_a_batch_without_objects() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(torch.zeros(2, 3, 2, 2), torch.zeros(0, 4), none, none, (1, 2)).to("cpu")
    assert batch.counts().tolist() == [0, 0] and batch.image_ids == (1, 2)


def test_to_moves_every_tensor() -> None:
    batch = Batch(
        torch.zeros(1, 3, 2, 2), torch.rand(2, 4), torch.arange(2), torch.zeros(2, dtype=torch.long), (1,)
    )
    moved = batch.to("meta")
    tensors = (moved.images, moved.boxes, moved.labels, moved.image_index)
    assert all(tensor.device.type == "meta" for tensor in tensors)


@pytest.mark.parametrize(("device", "early"), [("cpu", False), ("mps", False), ("cuda", True)])
def test_only_copies_to_cuda_are_queued(monkeypatch: pytest.MonkeyPatch, device: str, early: bool) -> None:
    """MPS may read the source of a queued copy after it is gone."""
    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(torch.zeros(2, 3, 2, 2), torch.zeros(0, 4), none, none, (1, 2))
    asked: list[bool] = []
    original = torch.Tensor.to

    def watched(self: torch.Tensor, target: str, non_blocking: bool) -> torch.Tensor:
        asked.append(non_blocking)
        return original(self, "cpu")

    monkeypatch.setattr(torch.Tensor, "to", watched)
    batch.to(device)
    assert asked == [early] * 4


def test_shapes_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        Batch(
            torch.zeros(1, 3, 2, 2), torch.rand(2, 4), torch.arange(3), torch.zeros(2, dtype=torch.long), (1,)
        )
