"""The schedules' values at the steps of the published tables; what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ssdir.common.errors import ConfigError
from ssdir.config.presets import SPACE_PRESETS
from ssdir.config.space_schedule import LinearRamp, SpaceSchedule


def values(preset: str, step: int | None) -> tuple[float, float, float, bool, float | None]:
    now = SPACE_PRESETS[preset].run.model.schedule.at(step)
    return now.presence_prior, now.scale_mean, now.temperature, now.boundary, now.fixed_alpha


@pytest.mark.parametrize(
    ("preset", "step", "presence", "scale", "temperature", "boundary", "fixed_alpha"),
    [
        ("published", 0, 0.1, -2.0, 2.5, False, 0.1),
        ("published", 3_999, 0.1, -2.099975, 2.5, False, 0.1),
        ("published", 4_000, 0.1, -2.1, 2.5, False, None),
        ("published", 10_000, 0.1, -2.25, 2.5, False, None),
        ("published", 12_500, 0.05, -2.3125, 2.5, False, None),
        ("published", 15_000, 1e-10, -2.375, 2.5, False, None),
        ("published", 160_000, 1e-10, -2.5, 2.5, False, None),
        ("published", None, 1e-10, -2.5, 2.5, False, None),
        ("published-3d-room", 0, 0.1, -1.0, 2.5, True, None),
        ("published-3d-room", 7_000, 0.055, -1.0, 1.8, True, None),
        ("published-3d-room", 10_000, 0.01, -1.0, 1.5, True, None),
        ("published-3d-room", 15_000, 0.01, -1.5, 1.0, True, None),
        ("published-3d-room", 99_999, 0.01, -2.0, 0.5, True, None),
        ("published-3d-room", 100_000, 0.01, -2.0, 0.5, False, None),
        ("published-3d-room", None, 0.01, -2.0, 0.5, False, None),
        ("clevr", 0, 0.1, 0.0, 2.5, True, None),
        ("clevr", 20_000, 0.01, -1.0, 0.5, False, None),
    ],
)
def test_values_of_the_tables(
    preset: str,
    step: int | None,
    presence: float,
    scale: float,
    temperature: float,
    boundary: bool,
    fixed_alpha: float | None,
) -> None:
    found = values(preset, step)
    assert found[:3] == pytest.approx((presence, scale, temperature), rel=1e-6, abs=1e-15)
    assert found[3:] == (boundary, fixed_alpha)


def test_a_ramp_without_length_is_a_step() -> None:
    ramp = LinearRamp(1.0, 3.0, 5, 5)
    assert [ramp.at(step) for step in (0, 4, 5, 6)] == [1, 1, 3, 3]


def test_switches() -> None:
    always = SpaceSchedule(boundary_until=None)
    assert always.at(10**9).boundary and always.at(None).boundary
    alone = SpaceSchedule(background_only_steps=10)
    assert [alone.at(step).background_only for step in (0, 9, 10, None)] == [True, True, False, False]


@pytest.mark.parametrize(
    "change",
    [
        {"presence_prior": LinearRamp(0.1, 0.0, 0, 10)},
        {"presence_prior": LinearRamp.constant(1.0)},
        {"temperature": LinearRamp.constant(0.0)},
        {"scale_mean": LinearRamp.constant(float("nan"))},
        {"scale_mean": LinearRamp.constant(100.0)},
        {"fix_alpha": 1.0},
        {"boundary_until": -1},
        {"background_only_steps": -1},
    ],
)
def test_what_cannot_be_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        SpaceSchedule(**change)


def test_ramps_that_run_backwards_are_refused() -> None:
    with pytest.raises(ConfigError, match="10 to 5"):
        LinearRamp(0.0, 1.0, 10, 5)
