"""The compiled kernels alone: threads, forks, a folder that cannot be written to, indices out of range."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from typing import Any

import numba
import numpy as np
import pytest
import torch

from ssdir.model.kernels import compiled, loops, threads
from ssdir.model.kernels.choice import use_kernels
from ssdir.model.render import covered, crop, paste


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything() -> list[torch.Tensor]:
    """All results and gradients of a scene large enough for several threads."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(60, 4, generator=generator) * torch.tensor([1.0, 1.0, 0.4, 0.4])
    patches, weights = (torch.rand(*shape, generator=generator) for shape in ((60, 3, 24, 24), (60,)))
    index = torch.randint(0, 3, (60,), generator=generator)
    images = torch.rand(3, 3, 150, 150, generator=generator)
    leaves = [value.requires_grad_() for value in (patches, boxes, weights, images)]
    with use_kernels("compiled"):
        drawn = paste(patches, boxes, index, 3, 150, weights)
        values, objects, pixels = covered(patches, boxes, index, 3, 150)
        crops = crop(images, boxes, index, 24)
        total = drawn.square().sum() + values.square().sum() + crops.square().sum()
        return [drawn, values, objects, pixels, crops, *torch.autograd.grad(total, leaves)]


def test_the_same_bytes_on_any_number_of_threads(set_threads):
    results = []
    for n in (1, 2, 3, 2):
        set_threads(n)
        results.append(everything())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("side", [4, 6, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bytes_however_a_gradient_is_written(monkeypatch, side, dtype):
    """Past the caches where planes are whole cache lines, or plainly; also of what is not seen."""
    generator = torch.Generator().manual_seed(0)
    boxes = 0.1 + 0.4 * torch.rand(40, 4, generator=generator, dtype=dtype)
    boxes[::5, 2] = 0
    boxes[1::5, 0] = 2
    patches = torch.rand(40, 3, side, side, generator=generator, dtype=dtype)
    grad = torch.rand(2, 3, 50, 50, generator=generator, dtype=dtype)
    index, weights = torch.arange(40) % 2, torch.rand(40, generator=generator, dtype=dtype)
    found, streamed = [], []
    for streamed_from in (2**40, 0):
        monkeypatch.setattr(compiled, "STREAMED", streamed_from)
        found.append(compiled.paste_backward(grad, patches, boxes, index, weights, True, True, True))
        streamed.append(compiled._streams(found[-1][0]))
    assert streamed == [False, side**2 * dtype.itemsize % 64 == 0]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0][::5].eq(0).all()
    assert found[0][0][1::5].eq(0).all()
    assert found[0][0][2::5].ne(0).any((1, 2, 3)).all()


def test_what_was_painted_spares_reading_the_patches_again():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(30, 4, generator=generator) * torch.tensor([1, 1, 0.1, 0.1])
    patches = torch.rand(30, 3, 16, 16, generator=generator)
    index, weights = torch.arange(30) % 2, torch.rand(30, generator=generator) - 0.5
    grad = torch.rand(2, 3, 40, 40, generator=generator)
    given = patches, boxes, index, weights, 2, 40
    images, painted = compiled.paste_and_keep(*given)
    assert torch.equal(images, compiled.paste(*given))
    to_patches, _, to_weights = compiled.paste_backward(grad, *given[:4], True, False, True)
    nowhere = torch.full_like(patches, torch.nan)
    found = compiled.paste_backward(grad, nowhere, *given[1:4], True, False, True, painted)
    assert torch.equal(found[0], to_patches)
    torch.testing.assert_close(found[2], to_weights, rtol=1e-5, atol=1e-5)
    values, _, _ = compiled.covered(patches, boxes, index, 40)
    assert len(painted) == values.numel()
    torch.testing.assert_close(painted.sum(), values.sum())
    large = boxes * torch.tensor([1, 1, 8, 8])
    assert not len(compiled.paste_and_keep(patches, large, *given[2:])[1])


def test_a_backward_pass_without_the_kernels_does_without_what_they_kept():
    patches, boxes = torch.rand(4, 3, 16, 16, requires_grad=True), torch.tensor([[0.5, 0.5, 0.2, 0.1]] * 4)
    index, weights = torch.zeros(4, dtype=torch.long), torch.rand(4, requires_grad=True)
    with use_kernels("compiled"):
        drawn = paste(patches, boxes, index, 1, 20, weights).square().sum()
        expected = torch.autograd.grad(drawn, [patches, weights], retain_graph=True)
    with use_kernels("plain"):
        found = torch.autograd.grad(drawn, [patches, weights])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(params=["PyTorch's threads", "a pool"])
def threading_by(request, monkeypatch):
    if request.param == "a pool":
        monkeypatch.setattr(threads, "openmp", lambda: 0)
    elif not threads.openmp():
        pytest.skip("this PyTorch does not use GNU OpenMP")
    return request.param


if sys.platform == "linux":
    thread_number = ctypes.CDLL(None).gettid
    thread_number.argtypes, thread_number.restype = [], ctypes.c_int


@numba.njit(nogil=True)
def take(doers, calls, patience, first, last):
    """Notes who does which task. A thread that has begun waits for another one, but not forever."""
    calls[first] = last
    for task in range(first, last):
        doers[task] = thread_number()
    for _ in range(patience):
        if (doers != 0).sum() > last - first:
            break


def test_loops_that_are_not_compiled_are_shared_too(set_threads):
    """As they are with NUMBA_DISABLE_JIT=1."""
    set_threads(2)
    done = []
    threads.share(lambda begin, first, last: done.extend(range(begin + first, begin + last)), (5,), 10, 10**6)
    assert sorted(done) == list(range(5, 15))


@pytest.mark.skipif(sys.platform != "linux", reason="threads have other numbers here")
def test_work_is_shared_in_whole_and_only_when_it_is_much(set_threads, threading_by):
    set_threads(2)
    for n_threads, tasks, work in ((2, 10, 10**6), (1, 10, 100), (1, 1, 10**6)):
        doers, calls = np.zeros(tasks, np.int32), np.zeros(tasks, np.int64)
        threads.share(take, (doers, calls, 10**7 if n_threads == 2 else 0), tasks, work)
        assert (doers != 0).all() and len(set(doers)) == n_threads
        ends = [0, *calls[calls > 0]]
        assert list(np.flatnonzero(calls)) == ends[:-1] and ends[-1] == tasks
        assert len(ends) - 1 == (8 if n_threads == 2 else 1)
    threads.share(take, (np.zeros(1, np.int32), np.zeros(1, np.int64), 0), 0, 10**6)


@loops.compiled
def divide(numbers, scale, first, last):
    for task in range(first, last):
        if numbers[task] * scale > 5:
            raise ValueError("more than 5")


def test_errors_in_a_thread_reach_the_caller(set_threads, threading_by):
    set_threads(2)
    numbers = np.arange(10.0)
    threads.share(divide, (numbers, 0.5), 10, 10**6)
    expected = ValueError if threading_by == "a pool" else RuntimeError
    with pytest.raises(expected, match=r"divide has failed|more than 5"):
        threads.share(divide, (numbers, 1.0), 10, 10**6)
    threads.share(divide, (numbers, 0.5), 10, 10**6)


def test_each_type_has_machine_code_of_its_own(set_threads):
    """Arrays of other types, orders and rights, and numbers of other kinds."""
    set_threads(2)
    for numbers in (
        np.arange(10.0),
        np.arange(10),
        np.arange(10.0).repeat(2)[::2],
        np.arange(10, dtype=np.float32),
    ):
        for scale in (1.0, 1, True):
            frozen = numbers.copy()
            frozen.flags.writeable = False
            for given in (numbers, frozen):
                with pytest.raises(RuntimeError, match="divide"):
                    threads.share(divide, (given, scale), 10, 10**6)
                threads.share(divide, (given, scale), 6, 10**6)


def test_several_python_threads_may_draw_at_once(set_threads):
    set_threads(2)
    expected, found = everything(), []
    workers = [threading.Thread(target=lambda: found.append(everything())) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 3
    assert all(torch.equal(a, b) for result in found for a, b in zip(expected, result, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_draws_with_threads_of_its_own():
    program = (
        "import os, torch; torch.set_num_threads(2)\n"
        "from ssdir.model.kernels.compiled import paste\n"
        "given = torch.ones(80, 1, 8, 8), torch.full((80, 4), 0.5), torch.zeros(80, dtype=torch.long), None, 1, 100\n"
        "before = paste(*given)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if torch.equal(paste(*given), before) else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_loops_work_where_nothing_can_be_kept_on_disk():
    """numba refuses to keep functions for which it finds no folder: those of no file, for one."""
    made: dict[str, Any] = {}
    exec(compile("def double(x): return 2 * x", "<nowhere>", "exec"), made)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(made["double"], cache=True)
    assert loops.compiled(made["double"])(21) == 42


@pytest.mark.parametrize("index", [-1, 2])
def test_an_image_that_is_not_there_is_an_error_and_not_memory_of_others(index):
    patches, boxes = torch.ones(1, 1, 2, 2), torch.full((1, 4), 0.5)
    where = torch.tensor([index])
    with pytest.raises(IndexError, match=f"{index}.*2 images"):
        compiled.paste(patches, boxes, where, None, 2, 8)
    with pytest.raises(IndexError, match="2 images"):
        compiled.paste_backward(torch.ones(2, 1, 8, 8), patches, boxes, where, None, True, True, True)
    with pytest.raises(IndexError, match="2 images"):
        compiled.crop(torch.ones(2, 1, 8, 8), boxes, where, 4, True, True)
    with pytest.raises(IndexError, match="2 images"):
        compiled.crop_backward(
            torch.ones(1, 1, 4, 4), torch.ones(2, 1, 8, 8), boxes, where, True, True, True, True
        )


def test_numba_is_not_imported_before_something_is_drawn():
    program = "import sys, ssdir, ssdir.model.render; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
