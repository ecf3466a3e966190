"""Which sizes SPACE can have, and that the presets hold the published settings."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from ssdir.common.errors import ConfigError
from ssdir.config import from_dict, to_dict
from ssdir.config.presets import SPACE_PRESETS
from ssdir.config.space import SpaceConfig, SpaceRun


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 300}, "image_size is 300.*288 and 320"),
        ({"image_size": 8}, "image_size is 8.*16"),
        ({"g": 12}, "g is 12.*64, 32, 16, 8, 4, 2, 1 cells"),
        ({"g": 0}, "model.g is 0"),
        ({"k": 0}, "model.k is 0"),
        ({"glimpse_size": 48}, "glimpse_size is 48"),
        ({"width": 0.3}, "width is 0.3"),
        ({"sigma_fg": 0.0}, "sigma_fg"),
        ({"scale_std": float("inf")}, "scale_std"),
        ({"foreground_lr_scale": 0.0}, "foreground_lr_scale"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SpaceConfig(**change)


@pytest.mark.parametrize(
    ("side", "g"), [(16, 2), (64, 8), (96, 6), (128, 16), (160, 10), (256, 16), (320, 20)]
)
def test_possible_sizes(side: int, g: int) -> None:
    assert SpaceConfig(image_size=side, g=g).n_cells == g * g


def test_published_settings() -> None:
    atari, room = (SPACE_PRESETS[name].run for name in ("published", "published-3d-room"))
    assert (atari.model.g, atari.model.k, atari.model.sigma_fg, atari.model.sigma_bg) == (16, 3, 0.15, 0.1)
    assert (room.model.g, room.model.k, room.model.sigma_fg, room.model.sigma_bg) == (8, 5, 0.15, 0.15)
    for run in (atari, room):
        model, training = run.model, run.training
        assert (model.image_size, model.z_what_size, model.glimpse_size, model.scale_std) == (
            128,
            32,
            32,
            0.1,
        )
        assert (training.batch_size, training.steps, training.clip_norm) == (16, 160_000, 1.0)
        assert (
            model.foreground_optimizer == "rmsprop" and model.background_norm == "batch" and model.width == 1
        )
        assert training.learning_rate == 1e-3
        assert training.learning_rate * model.foreground_lr_scale == pytest.approx(1e-5)


@pytest.mark.parametrize("name", SPACE_PRESETS)
def test_presets_survive_their_way_to_json(name: str) -> None:
    run = SPACE_PRESETS[name].run
    assert from_dict(SpaceRun, to_dict(run)) == run


def test_settings_need_no_torch() -> None:
    code = "import sys, ssdir.config.space; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
