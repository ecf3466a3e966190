"""Whatever is in the files of models, runs, objects and settings: it is read, or refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tests.reliability.mutations import altered, damaged, damaged_json, require_sound_answer
from tests.training import training_toy as toy

from ssdir.baselines.kinds import BASELINES
from ssdir.common.ownership import read_index, read_mark, require_replaceable
from ssdir.common.randomness import seeded
from ssdir.common.storage import load_metadata, load_tensors
from ssdir.config import DetectorConfig, ModelConfig, TrainingConfig, from_dict, to_dict
from ssdir.config.presets import PRESETS
from ssdir.detector.ssd import Detector
from ssdir.inference.results import Index
from ssdir.model.latents import Objects
from ssdir.model.pretrained import read_folder, save_detector, weights_fingerprint
from ssdir.model.ssdir import SSDIR
from ssdir.plots.gallery import draw_loss_curves
from ssdir.registry import load_model
from ssdir.training.checkpoint import load_checkpoint
from ssdir.training.run_folder import changed_settings, check_run, load_run_config
from ssdir.training.tracking import MetricsFile, read_metrics

TINY = DetectorConfig(image_size=64, width=0.0625, maps=(2,), min_sizes=(80.0,), max_sizes=())
MODEL = ModelConfig(z_what_size=2, n_hidden=0, decoder_channels=(4, 4))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "detector"
    with seeded(0):
        save_detector(Detector(TINY), folder, ["thing"])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "ssdir"
    with seeded(0):
        SSDIR(Detector(TINY), MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the toy."""
    folder = tmp_path_factory.mktemp("toy")
    toy.write_dataset(folder / "data")
    toy.run_toy(folder / "data", folder / "run", steps=8, log_every=2, validate_every=4, checkpoint_every=4)
    return folder / "run"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("file") / "file"


def json_of(path: Path) -> Any:
    return json.loads(path.read_bytes())


def with_other(folder: Path, copy: Path, name: str, content: bytes) -> Path:
    """A copy of a folder in which one file has another content."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(content)
    return copy


def read_model(folder: Path) -> None:
    require_sound_answer(lambda: load_model(folder))
    require_sound_answer(lambda: read_folder(folder).categories)
    require_sound_answer(lambda: weights_fingerprint(folder))
    require_sound_answer(lambda: load_run_config(folder))


@pytest.mark.parametrize("kind", ["detector", "model"])
def test_config_json_of_models(kind: str, there: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    assert load_model(folder) is not None

    @given(content=damaged_json(json_of(folder / "config.json")))
    def damaged_configs(content: bytes) -> None:
        read_model(with_other(folder, there.with_name("model"), "config.json", content))

    damaged_configs()


def tensors_damaged(sound: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with another header, which says what the bytes behind it mean, or with other bytes."""
    length = int.from_bytes(sound[:8], "little")
    header, rest = json.loads(sound[8 : 8 + length]), sound[8 + length :]

    def joined(content: bytes) -> bytes:
        return len(content).to_bytes(8, "little") + content + rest

    return damaged_json(header).map(joined) | damaged(sound)


def test_model_safetensors(detector: Path, there: Path) -> None:
    @given(content=tensors_damaged((detector / "model.safetensors").read_bytes()))
    def damaged_weights(content: bytes) -> None:
        read_model(with_other(detector, there.with_name("model"), "model.safetensors", content))

    damaged_weights()


@pytest.mark.parametrize("name", ["training.json", "training.safetensors", "model.safetensors", "run.json"])
def test_checkpoints(run: Path, there: Path, name: str) -> None:
    checkpoint = run / "checkpoints/step_000008"
    sound = (checkpoint / name).read_bytes()

    @given(content=damaged_json(json.loads(sound)) if name.endswith("json") else tensors_damaged(sound))
    def damaged_checkpoints(content: bytes) -> None:
        copy = there.with_name("step_000008")
        with_other(checkpoint, copy, name, content)
        require_sound_answer(lambda: load_checkpoint(copy))
        require_sound_answer(lambda: load_run_config(copy))
        require_sound_answer(lambda: require_replaceable(copy, "checkpoint"))

    damaged_checkpoints()


@pytest.mark.parametrize("name", ["training.json", "training.safetensors"])
def test_a_run_goes_on_from_a_damaged_checkpoint_or_says_why_not(run: Path, there: Path, name: str) -> None:
    sound = (run / "checkpoints/step_000008" / name).read_bytes()
    strategy = damaged_json(json.loads(sound)) if name.endswith("json") else tensors_damaged(sound)

    @given(content=strategy)
    def damaged_checkpoints(content: bytes) -> None:
        copy = there.with_name("run")
        with_other(run, copy, f"checkpoints/step_000008/{name}", content)
        steps = {"steps": 8, "log_every": 2, "validate_every": 4, "checkpoint_every": 4}
        require_sound_answer(lambda: toy.run_toy(run.parent / "data", copy, resume=True, **steps))

    damaged_checkpoints()


def test_config_json_of_runs(run: Path, there: Path) -> None:
    sound = json_of(run / "config.json")
    assert changed_settings(sound, sound) == []

    @given(content=damaged_json(sound))
    def damaged_runs(content: bytes) -> None:
        copy = with_other(run, there.with_name("run"), "config.json", content)
        require_sound_answer(lambda: check_run(copy, sound, resume=True), lines=40)  # one line a setting
        require_sound_answer(lambda: load_run_config(copy))

    damaged_runs()


@pytest.mark.parametrize("name", [".ssdir.json", "config.json"])
def test_marks(model: Path, there: Path, name: str) -> None:
    @given(content=damaged_json(json_of(model / name)))
    def damaged_marks(content: bytes) -> None:
        copy = with_other(model, there.with_name("model"), name, content)
        (copy / "thesis.txt").write_text("mine")
        require_sound_answer(lambda: read_mark(copy))
        assert (
            require_sound_answer(lambda: require_replaceable(copy, "model") or "replaced") is None
        )  # it is kept

    damaged_marks()


METRICS = b"""step,epoch,loss,loss/image,val/loss,seconds
2,0.5,1.25,0.5,,0.1
4,1,0.75,0.25,0.5,0.2
6,1.5,nan,inf,,0.3
"""


@given(content=damaged(METRICS))
@example(content=b"step,l\x80ss\n2,1\n")
@example(content=b"step,loss\n2," + b"x" * 5000 + b"\n")
def test_metrics_csv(there: Path, content: bytes) -> None:
    there.write_bytes(content)
    rows = require_sound_answer(lambda: read_metrics(there))
    if rows:
        require_sound_answer(lambda: draw_loss_curves(rows, there.with_name("curves.png")))
    require_sound_answer(lambda: MetricsFile(there, until=4))


def objects() -> Objects:
    generator = torch.Generator().manual_seed(0)
    return Objects(
        image_index=torch.tensor([0, 0, 1]),
        boxes=torch.rand(3, 4, generator=generator),
        labels=torch.tensor([0, 1, 0]),
        present=torch.rand(3, generator=generator),
        patches=torch.rand(3, 3, 2, 2, generator=generator),
        what=torch.rand(3, 2, generator=generator),
        depth=torch.rand(3, generator=generator),
        n_images=2,
    )


@given(values=altered(objects().to_dict()))
@example(values={**objects().to_dict(), "n_images": ""})
def test_objects_of_dicts(values: Any) -> None:
    require_sound_answer(lambda: Objects.from_dict(values))


def test_objects_of_files(there: Path) -> None:
    there.unlink(missing_ok=True)
    objects().save(there)
    assert len(Objects.load(there)) == 3

    @given(content=tensors_damaged(there.read_bytes()))
    def damaged_objects(content: bytes) -> None:
        there.write_bytes(content)
        require_sound_answer(lambda: Objects.load(there))
        require_sound_answer(lambda: load_tensors(there))
        require_sound_answer(lambda: load_metadata(there))

    damaged_objects()


SETTINGS = {
    "detector": PRESETS["quickstart"].detector,
    "ssdir": PRESETS["small"].ssdir,
    "training": TrainingConfig(),
    **{kind: next(iter(item.presets.values())).run for kind, item in BASELINES.items()},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    sound = SETTINGS[name]
    assert from_dict(type(sound), to_dict(sound)) == sound

    @given(values=altered(to_dict(sound)) | st.sampled_from([None, [], 1, "", [[]]]))
    def altered_settings(values: Any) -> None:
        require_sound_answer(lambda: from_dict(type(sound), values))

    altered_settings()


ENTRIES = [{"image": "a.png", "folder": "a", "objects": 2}, {"image": "b.png", "error": "it is damaged"}]


@example(index=b"[]", journal=[b'{"image": 1}', b'{"image": "a.png", "folder": []}'])
@example(index=b'[{"image": "a", "folder": "' + b"x" * 5000 + b'"}]', journal=[b"[" * 100_000])
@given(index=damaged_json(ENTRIES), journal=st.lists(damaged_json(ENTRIES[0]), max_size=2))
def test_index_of_inferred_images(there: Path, index: bytes, journal: list[bytes]) -> None:
    out = there.with_name("out")
    (out / "a").mkdir(parents=True, exist_ok=True)
    (out / "index.json").write_bytes(index)
    (out / "index.jsonl").write_bytes(b"\n".join(journal))

    def read() -> None:
        with Index(out) as opened:
            opened.add(ENTRIES[0])

    require_sound_answer(read)
    assert read_index(out / "index.json")[-1] == ENTRIES[0]
