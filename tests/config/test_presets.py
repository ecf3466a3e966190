from __future__ import annotations

import pytest

from ssdir.common.errors import ConfigError
from ssdir.config import DetectorRun
from ssdir.config.presets import PRESETS, SPACE_PRESETS, SPAIR_PRESETS, preset, scenes_presets
from ssdir.detector.ssd import Detector
from ssdir.training.teaching import FITTING

# "Training regime and hyperparameters" of the supplementary material, read from it row by row.
SEED_TABLE = {
    "batch_size": (32, 32, 32),
    "learning_rate": (0.0005, 0.0005, 0.0005),
    "clone_backbone": (False, True, True),
    "image": (10.0, 1.0, 1.0),
    "objects": (10.0, 14.0, 10.0),
    "what": (1.0, 0.54, 0.1),
    "depth": (1.0, 0.44, 0.4),
    "sigma_what": (0.1, 0.27, 0.3),
    "sigma_depth": (0.1, 0.14, 0.1),
    "n_hidden": (3, 3, 4),
    "z_what_size": (64, 256, 512),
}


@pytest.mark.parametrize(("column", "name"), list(enumerate(["mnist", "clevr", "wider"])))
def test_presets_hold_the_papers_table(column: int, name: str) -> None:
    run = preset(name).ssdir
    values = {**vars(run.model), **vars(run.objective), **vars(run.training)}
    assert {key: values[key] for key in SEED_TABLE} == {key: row[column] for key, row in SEED_TABLE.items()}
    assert run.model.decoder_norm == run.model.feature_norm == "none"
    assert run.model.merge == "softmax"
    assert run.model.decoder_channels == (1024, 512, 256, 128, 64, 32, 16)
    assert run.model.patch_size == 64
    detector = preset(name).detector.detector
    assert (detector.image_size, detector.width, detector.maps) == (300, 1.0, (1, 2, 3, 4, 5))
    assert detector.boxes_per_cell == 2
    assert detector.class_agnostic


@pytest.mark.parametrize("name", PRESETS)
def test_the_detector_is_asked_once_where_little_is_kept(name: str) -> None:
    chosen = preset(name)
    for run in (chosen.ssdir, chosen.teacher):
        if run is not None:
            small = run.model.clone_backbone or run.model.what_encoder == "glimpses"
            assert run.training.feature_cache == ("disk" if small else "off")
    assert chosen.detector.training.feature_cache == "off"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_taught_by_a_model_that_fits_it(name: str) -> None:
    chosen = preset(name)
    assert (chosen.teacher is None) == (chosen.ssdir.objective.teacher == 0)
    if chosen.teacher is not None:
        teacher, student = chosen.teacher.model, chosen.ssdir.model
        assert (teacher.what_encoder, student.what_encoder) == ("glimpses", "cells")
        assert all(getattr(teacher, part) == getattr(student, part) for part in FITTING)
        assert chosen.teacher == preset("quickstart").ssdir


def test_priors_of_the_small_preset_span_sizes_and_shapes() -> None:
    detector = Detector(preset("small").detector.detector)
    assert not detector.config.class_agnostic
    assert detector.backbone.map_cells == (24, 12, 6, 3) and len(detector.priors) == 4 * (576 + 144 + 36 + 9)
    area, ratio = detector.priors[:, 2:].prod(1).sqrt(), detector.priors[:, 2] / detector.priors[:, 3]
    assert area.min() == pytest.approx(30 / 300) and area.max() == pytest.approx((190 * 280) ** 0.5 / 300)
    assert {round(value, 3) for value in ratio.tolist()} == {0.5, 1.0, 2.0}


def test_photographs_are_augmented_and_digits_are_not() -> None:
    active = {
        name: preset(name).detector.augmentation.active
        for name in ("mnist", "quickstart", "clevr", "wider", "small")
    }
    assert active == {"mnist": False, "quickstart": False, "clevr": True, "wider": True, "small": True}
    assert preset("clevr").detector.augmentation.hue == 0  # hues tell its objects apart
    assert not DetectorRun().augmentation.active


def test_main_scenes_hold_the_papers_table() -> None:
    main = scenes_presets()["main"][1]
    assert main.grids == tuple((side, side) for side in range(2, 7))
    assert (main.digit_min, main.digit_max, main.side) == (96, 384, 512)
    assert (main.delta_position, main.theta_filled, main.n_train) == (0.7, 0.4, 50_000)


def test_ablation_has_the_45_combinations() -> None:
    ablation = [config for name, (_, config) in scenes_presets().items() if name.startswith("ablation")]
    assert len({(item.grids, item.digit_min, item.digit_max) for item in ablation}) == 45
    assert {item.digit_min for item in ablation} == {96, 128, 160}
    assert {item.digit_max for item in ablation} == {256, 320, 384}
    assert {item.n_train for item in ablation} == {10_000}


def test_quickstart_scenes_are_the_main_ones_scaled() -> None:
    quickstart, main = scenes_presets()["quickstart"][1], scenes_presets()["main"][1]
    assert quickstart.digit_min / quickstart.side == main.digit_min / main.side == 0.1875
    assert quickstart.digit_max / quickstart.side == main.digit_max / main.side == 0.75
    assert (quickstart.grids, quickstart.delta_position, quickstart.theta_filled) == (
        main.grids,
        main.delta_position,
        main.theta_filled,
    )
    assert quickstart.n_test >= 500


def test_an_unknown_preset_is_answered_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="perhaps you meant 'clevr'"):
        preset("clever")


@pytest.mark.parametrize("name", ["mnist", "clevr", "wider"])
def test_what_the_papers_presets_say_beside_the_table(name: str) -> None:
    run = preset(name).ssdir
    assert (run.model.reset_below, run.model.train_on, run.model.what_encoder) == (0.001, "sampled", "cells")
    assert run.objective.image_region == "all" and run.objective.error == "bce"
    ours = ("teacher", "opacity", "hidden", "invariance")
    assert [getattr(run.objective, term) for term in ours] == [0.0] * 4
    assert preset(name).teacher is None
    assert (run.model.background, run.model.opacity) == ("none", False)


def test_ablation_has_the_papers_grids_side_position_and_filling() -> None:
    ablation = {name: config for name, (_, config) in scenes_presets().items() if name.startswith("ablation")}
    grids = {
        "2to5": ((2, 2), (3, 3), (4, 4), (5, 5)),
        "2to6": ((2, 2), (3, 3), (4, 4), (5, 5), (6, 6)),
        "3to5": ((3, 3), (4, 4), (5, 5)),
        "3to6": ((3, 3), (4, 4), (5, 5), (6, 6)),
        "4to6": ((4, 4), (5, 5), (6, 6)),
    }
    sizes = [(low, high) for low in (96, 128, 160) for high in (256, 320, 384)]
    assert set(ablation) == {f"ablation-{of}-{low}-{high}" for of in grids for low, high in sizes}
    for name, config in ablation.items():
        _, of, low, high = name.split("-")
        assert config.grids == grids[of]
        assert (config.digit_min, config.digit_max) == (int(low), int(high))
        assert (config.size, config.delta_position, config.theta_filled) == ((512, 512), 0.7, 0.4)


@pytest.mark.parametrize("presets", [PRESETS, SPAIR_PRESETS, SPACE_PRESETS])
def test_every_model_of_the_papers_sheets_has_a_preset_for_each_dataset(presets: dict[str, object]) -> None:
    assert {"mnist", "clevr", "wider"} <= set(presets)
