"""Room for gradients: types, alignment, and blocks that are used again only when nobody holds them."""

from __future__ import annotations

import gc

import pytest
import torch

from ssdir.model.kernels import room
from ssdir.model.kernels.room import Rooms


@pytest.mark.parametrize("shape", [(2, 3), (40, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_that_are_not_touched_are_zeros_of_the_same_type(shape, dtype):
    found = room.zeros(shape, torch.empty(0, dtype=dtype))
    assert found.dtype == dtype
    assert found.shape == shape
    assert found.eq(0).all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 3), (40, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_room_begins_with_a_cache_line(shape, dtype):
    found = room.empty(shape, torch.empty(0, dtype=dtype))
    assert found.dtype == dtype
    assert found.shape == shape
    assert found.is_contiguous()
    assert found.data_ptr() % 64 == 0


@pytest.fixture
def rooms(monkeypatch) -> Rooms:
    """Blocks above 1 kB are kept, in rooms of the test's own."""
    found = Rooms()
    monkeypatch.setattr(room, "_rooms", found)
    monkeypatch.setattr(room, "KEPT", 1_000)
    monkeypatch.setattr(room, "keeps_freed_memory", lambda: False)
    return found


def test_a_large_block_is_used_again_once_nobody_holds_it(rooms):
    like = torch.empty(0)
    first = room.empty((1_000,), like)
    place, part = first.data_ptr(), first[10:20].fill_(7)
    del first
    second = room.empty((1_000,), like)
    assert second.data_ptr() != place and rooms.held() == 2 * 4_064  # a view still shows the first
    second.fill_(1)
    assert part.eq(7).all()
    del part, second
    gc.collect()
    third = room.empty((20, 30), like)  # smaller, by less than half
    assert third.is_contiguous() and rooms.held() == 4_064
    taken = third.data_ptr()
    del third
    assert room.empty((1_000,), like).data_ptr() == taken


def test_a_gradient_that_is_kept_by_autograd_is_not_written_again(rooms):
    like = torch.empty(0)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return room.empty(grad.shape, like).copy_(2 * grad)

    leaves = [torch.ones(1_000, requires_grad=True) for _ in range(3)]
    for factor, leaf in enumerate(leaves, start=1):
        (factor * Doubled.apply(leaf)).sum().backward()
    assert [leaf.grad.unique().tolist() for leaf in leaves] == [[2.0], [4.0], [6.0]]
    assert rooms.held() == 3 * 4_064


def test_what_does_not_fit_is_given_back(rooms):
    like = torch.empty(0)
    room.empty((10_000,), like)
    room.empty((1_000,), like)  # less than half of what is free
    assert rooms.held() == 4_064
    room.empty((100,), like)  # small: not kept
    assert rooms.held() == 4_064


def test_nothing_is_kept_where_the_process_keeps_all(rooms, monkeypatch):
    monkeypatch.setattr(room, "keeps_freed_memory", lambda: True)
    room.empty((1_000,), torch.empty(0))
    assert rooms.held() == 0
