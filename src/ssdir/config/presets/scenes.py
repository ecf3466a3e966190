"""Named parameters of Multi-scale scattered MNIST."""

from __future__ import annotations

import json

from ssdir.common.errors import ConfigError
from ssdir.config.base import did_you_mean, from_dict, to_dict
from ssdir.config.data import ScenesConfig
from ssdir.config.presets.ssdir import QUICKSTART_SCENES


def scenes_presets() -> dict[str, tuple[str, ScenesConfig]]:
    """Named scene parameters with a line of help: main, quickstart, and the 45 of the ablation study.

    >>> presets = scenes_presets()
    >>> len(presets), presets["ablation-3to6-128-320"][1].digit_max
    (47, 320)
    """
    named = {
        "main": ("the paper's main dataset: 512 px, 50,000 + 2,000 + 5,000 scenes", ScenesConfig()),
        "quickstart": ("the same at 128 px, 1/4 of every size, fewer scenes", QUICKSTART_SCENES),
    }
    for first, last in ((2, 5), (2, 6), (3, 5), (3, 6), (4, 6)):
        for digit_min in (96, 128, 160):
            for digit_max in (256, 320, 384):
                named[f"ablation-{first}to{last}-{digit_min}-{digit_max}"] = (
                    f"ablation: grids {first}..{last}, digits {digit_min}..{digit_max} px, 10,000 scenes",
                    ScenesConfig(
                        grids=tuple((side, side) for side in range(first, last + 1)),
                        digit_min=digit_min,
                        digit_max=digit_max,
                        n_train=10_000,
                        n_val=1_000,
                        n_test=1_000,
                    ),
                )
    return named


def named_scenes(name: str, *parameters: str) -> ScenesConfig:
    """Scene parameters by the name of a preset and changes to them, each NAME=VALUE with a JSON value.

    >>> named_scenes("main", "seed=3", "grids=[[2, 2]]").grids
    ((2, 2),)

    Raises:
        ConfigError: an unknown preset or parameter, a value that it refuses.
    """
    presets = scenes_presets()
    if name not in presets:
        raise ConfigError(f"there are no scenes {name!r}{did_you_mean(name, sorted(presets))}")
    values = to_dict(presets[name][1])
    for parameter in parameters:
        key, _, text = parameter.partition("=")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{parameter!r} is no parameter of scenes; write NAME=VALUE, such as seed=3 or grids=[[2,2],[3,3]]"
            ) from error
    return from_dict(ScenesConfig, values, "scenes")
