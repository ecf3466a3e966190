"""A training that is cut at any step, as often as may be, ends with the bytes of one that nothing disturbed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reliability.storm import contents_of
from tests.training import training_toy as toy

STEPS = 12
RUN = {"steps": STEPS, "log_every": 5, "validate_every": 4, "validation_images": 2, "checkpoint_every": 3}
FEW = max(3, settings().max_examples // 4)  # a training takes a tenth of a second


class Cut(BaseException):
    """The end of a process, as far as the training can tell."""


def train_until(out: Path, end: int | None, **others: int) -> None:
    """Go on with a run; ``end`` is the forward pass, counted from there, in which it is cut."""

    def hook(number: int, answer: torch.Tensor) -> torch.Tensor:
        if number == end:
            raise Cut
        return answer

    settings = {**RUN, **others}
    toy.run_toy(out.parent / "data", out, toy.ToyTask(hook=hook), resume=True, **settings)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("resume")
    toy.write_dataset(home / "data")
    return home


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_is_cut_ends_as_one_that_is_not(home: Path, accumulate: int) -> None:
    whole = home / f"whole-{accumulate}"
    train_until(whole, None, accumulate=accumulate)
    expected = contents_of(whole)

    @settings(max_examples=FEW)
    @given(ends=st.lists(st.integers(0, STEPS * accumulate - 1), min_size=1, max_size=4))
    def cut(ends: list[int]) -> None:
        out = home / "cut"
        shutil.rmtree(out, ignore_errors=True)
        for end in [*ends, None]:
            try:
                train_until(out, end, accumulate=accumulate)
            except Cut:
                continue
            break
        assert contents_of(out) == expected

    cut()
