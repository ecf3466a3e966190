"""Checkpoints: whole or absent, exact, and refused with a remedy where they do not fit."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import load_tensors, read_json, save_tensors, write_json
from ssdir.config import DetectorRun, TrainingConfig, to_dict
from ssdir.data.dataset import Dataset
from ssdir.data.split import ImageEntry, Split, image_files_fingerprint
from ssdir.model.pretrained import load_weights as fill_from_folder
from ssdir.model.pretrained import save_folder
from ssdir.training.checkpoint import (
    load_checkpoint,
    load_optimizer_tensors,
    load_weights,
    optimizer_tensors,
    save_checkpoint,
)
from ssdir.training.optim import make_optimizer
from ssdir.training.run_folder import (
    changed_settings,
    check_run,
    checkpoints,
    load_run_config,
    remove_leftovers,
)

SETTINGS = TrainingConfig(learning_rate=0.01, weight_decay=0.1)
DESCRIPTION = {
    "kind": "toy",
    "version": 1,
    "config": {"training": {"steps": 10, "seed": 0}, "loss": {"w": 1.0}},
    "data": {"folder": "/a", "fingerprint": "f0"},
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    # No bias before a BatchNorm: its gradient is rounding, of which Adam makes whole steps.
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).to(
        memory_format=torch.channels_last
    )


def names_of(module: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in module.named_parameters()}


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    module(images.contiguous(memory_format=torch.channels_last)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_one(run: Path, number: int, module: nn.Module, keep: int = 2) -> Path:
    return save_checkpoint(
        run,
        number,
        lambda folder: save_folder(folder, {"kind": "toy"}, module),
        {"x": torch.ones(2), "optimizer/step/0.weight": torch.tensor(float(number))},
        {},
        description=DESCRIPTION,
        keep=keep,
    )


def test_optimizer_state_goes_on_exactly() -> None:
    a = network()
    optimizer = make_optimizer(a, SETTINGS, torch.device("cpu"))
    for seed in range(3):
        step(a, optimizer, seed)
    b = network(seed=1)
    load_weights(b, a.state_dict(), "memory")
    other = make_optimizer(b, SETTINGS, torch.device("cpu"))
    saved = {name: value.contiguous() for name, value in optimizer_tensors(optimizer, names_of(a)).items()}
    load_optimizer_tensors(other, names_of(b), saved)
    first = b[0].weight
    assert other.state[first]["exp_avg"].stride() == first.stride() != first.contiguous().stride()
    for seed in range(3, 6):
        step(a, optimizer, seed)
        step(b, other, seed)
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def test_fused_steps_equal_plain_adamw_in_both_memory_formats() -> None:
    fused, plain = network(), network()
    optimizer = make_optimizer(fused, SETTINGS, torch.device("cpu"))
    assert optimizer.defaults["fused"]
    decayed = [parameter for parameter in plain.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in plain.parameters() if parameter.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.01,
        foreach=False,
    )
    for seed in range(4):
        step(fused, optimizer, seed)
        step(plain, reference, seed)
    for x, y in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_foreign_optimizer_state_is_refused() -> None:
    module = network()
    optimizer = make_optimizer(module, SETTINGS, torch.device("cpu"))
    with pytest.raises(DataError, match=r"optimizer state for 9.weight"):
        load_optimizer_tensors(optimizer, names_of(module), {"optimizer/exp_avg/9.weight": torch.ones(2)})
    with pytest.raises(DataError, match=r"0.bias with shape \(7,\)"):
        load_optimizer_tensors(optimizer, names_of(module), {"optimizer/exp_avg/0.bias": torch.ones(7)})


def test_newest_checkpoints_are_kept_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for number in (8, 100, 999_999, 1_000_000):
        save_one(tmp_path, number, network())
    assert [item.name for item in checkpoints(tmp_path)] == ["step_999999", "step_1000000"]
    model, training, values = load_checkpoint(checkpoints(tmp_path)[-1])
    assert values["step"] == 1_000_000
    assert training["x"].tolist() == [1, 1]
    assert torch.equal(model["0.weight"], network()[0].weight)


def test_leftovers_of_a_kill_are_no_checkpoints_and_are_removed(tmp_path: Path) -> None:
    save_one(tmp_path, 3, network())
    shutil.copytree(
        tmp_path / "checkpoints/step_000003", tmp_path / "checkpoints/.step_000004.12-0123abcd.tmp"
    )
    (tmp_path / ".metrics.csv.12-0123abcd.tmp").write_text("half")
    assert [item.name for item in checkpoints(tmp_path)] == ["step_000003"]
    remove_leftovers(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoints"]
    assert [item.name for item in (tmp_path / "checkpoints").iterdir()] == ["step_000003"]


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "training.json"])
def test_truncated_files_are_named_with_the_remedy(tmp_path: Path, name: str) -> None:
    folder = save_one(tmp_path, 3, network())
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=f"{name}.*remove .*step_000003 to resume from the checkpoint before"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, r"training\.safetensors holds 1 of 2 tensors; copy the checkpoint again"),
        ({"optimizer/step/0.weight": None}, r"training\.safetensors holds no state of the optimizer"),
        (
            {"optimizer/step/0.weight": torch.tensor(2.0)},
            r"training\.safetensors is of step 2, but .*training\.json of step 3",
        ),
        (
            {"x": torch.tensor([1.0, torch.nan])},
            r"training\.safetensors cannot be used: x holds NaN or infinity",
        ),
    ],
)
def test_a_damaged_state_is_refused_with_the_remedy(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = save_one(tmp_path, 3, network())
    changed = load_tensors(folder / "training.safetensors") | changes
    save_tensors(
        folder / "training.safetensors", {name: item for name, item in changed.items() if item is not None}
    )
    with pytest.raises(
        DataError, match=f"{message}.*remove .*step_000003 to resume from the checkpoint before"
    ) as told:
        load_checkpoint(folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("step", [4, "3", None, True, 3.0])
def test_an_altered_step_is_refused(tmp_path: Path, step: object) -> None:
    folder = save_one(tmp_path, 3, network())
    write_json(folder / "training.json", read_json(folder / "training.json") | {"step": step})
    with pytest.raises(
        DataError, match=r"training\.json (is of step 4, not of|does not say) the step.*remove .*step_"
    ):
        load_checkpoint(folder)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    moved = save_one(tmp_path, 3, network()).rename(tmp_path / "checkpoints" / "step_000005")
    with pytest.raises(DataError, match=r"training\.json is of step 3, not of the step in its folder's name"):
        load_checkpoint(moved)


def test_what_waits_to_be_logged_may_be_undefined(tmp_path: Path) -> None:
    folder = save_one(tmp_path, 3, network())
    tensors = load_tensors(folder / "training.safetensors")
    del tensors["x"]
    save_tensors(folder / "training.safetensors", tensors | {"window": torch.tensor([torch.nan])})
    assert bool(load_checkpoint(folder)[1]["window"].isnan().all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path, value: float) -> None:
    module = network()
    save_folder(tmp_path / "model", {"kind": "toy"}, module)
    checkpoint = save_one(tmp_path, 3, module)
    with torch.no_grad():
        module[2].weight[0, 0] = value
    with pytest.raises(
        DataError, match=r"not written to .*model: 2\.weight holds NaN or infinity\. To mend it, train"
    ):
        save_folder(tmp_path / "model", {"kind": "toy"}, module)
    fill_from_folder(module, tmp_path / "model")
    assert torch.equal(module[2].weight, network()[2].weight)  # what was there is untouched

    for folder in (tmp_path / "model", checkpoint):
        tensors = load_tensors(folder / "model.safetensors")
        tensors["2.weight"][0, 0] = value
        save_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(
        DataError, match=r"model/model\.safetensors cannot be used: 2\.weight holds .*give another model"
    ):
        fill_from_folder(module, tmp_path / "model")
    with pytest.raises(
        DataError,
        match=r"model\.safetensors cannot be used: 2\.weight holds .*remove .*step_000003 to resume",
    ):
        load_checkpoint(checkpoint)


def test_weights_of_another_architecture_are_refused_by_name() -> None:
    module = network()
    tensors = dict(module.state_dict())
    tensors["1.bias"] = torch.zeros(9)
    tensors["extra"] = tensors.pop("2.bias")
    with pytest.raises(DataError, match=r"2.bias is missing; extra is not part.*1.bias has shape"):
        load_weights(module, tensors, "file")


def test_full_disk_leaves_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_one(tmp_path, 3, network())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1))
    with pytest.raises(DataError, match=r"checkpoint of step 4.*free"):
        save_one(tmp_path, 4, network(), keep=1)
    assert [item.name for item in checkpoints(tmp_path)] == ["step_000003"]


def test_failed_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        save_checkpoint(tmp_path, 1, fail, {}, {}, description={}, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_changed_settings_have_full_names() -> None:
    new = {
        **DESCRIPTION,
        "version": 2,
        "config": {"training": {"steps": 20, "seed": 0, "new": 1}, "loss": {}},
        "data": {"folder": "/b", "fingerprint": "f1"},
    }
    assert changed_settings(DESCRIPTION, new) == [
        ("training.steps", 10, 20),
        ("loss.w", 1.0, "(absent)"),
        ("data.fingerprint", "f0", "f1"),
        ("training.new", "(absent)", 1),
    ]
    assert (
        changed_settings(DESCRIPTION, {**DESCRIPTION, "data": {"folder": "/moved", "fingerprint": "f0"}})
        == []
    )


def test_runs_are_refused_or_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert check_run(run, DESCRIPTION, resume=False) is None
    assert check_run(run, DESCRIPTION, resume=True) is None
    run.mkdir()
    (run / ".metrics.csv.tmp").touch()  # a leftover does not count
    assert check_run(run, DESCRIPTION, resume=False) is None
    (run / "notes.txt").touch()
    with pytest.raises(ConfigError, match="not empty; add --resume"):
        check_run(run, DESCRIPTION, resume=False)
    with pytest.raises(DataError, match=r"config.json is missing"):
        check_run(run, DESCRIPTION, resume=True)
    write_json(run / "config.json", DESCRIPTION)
    assert check_run(run, DESCRIPTION, resume=True) is None
    saved = save_one(run, 5, network())
    assert check_run(run, DESCRIPTION, resume=True) == saved
    changed = {**DESCRIPTION, "config": {"training": {"steps": 20, "seed": 1}, "loss": {"w": 1.0}}}
    with pytest.raises(
        ConfigError, match=r"training.steps: 10 -> 20\n  training.seed: 0 -> 1\n.*--allow-changed"
    ):
        check_run(run, changed, resume=True)
    with pytest.raises(ConfigError, match=r"settings:\n  training.seed: 0 -> 1\n"):
        check_run(run, changed, resume=True, allow_changed=["training.steps", "train"])
    assert check_run(run, changed, resume=True, allow_changed=["training"]) == saved
    with pytest.raises(ConfigError, match="is a file"):
        check_run(run / "notes.txt", DESCRIPTION, resume=True)


def test_fingerprint_follows_the_annotations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.json does not exist"):
        Dataset(tmp_path).fingerprint()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/train.json").write_text("{}")
    first = Dataset(tmp_path).fingerprint()
    (tmp_path / "annotations/test.json").write_text("{}")
    assert Dataset(tmp_path).fingerprint() == first
    (tmp_path / "annotations/val.json").write_text("{}")
    assert Dataset(tmp_path).fingerprint() != first


def test_fingerprint_of_image_files_follows_names_sizes_and_order(tmp_path: Path) -> None:
    for name, content in (("a.png", b"12"), ("b.png", b"345"), ("c.png", b"67")):
        (tmp_path / name).write_bytes(content)
    entries = [ImageEntry(i, tmp_path / f"{name}.png", 8, 8) for i, name in enumerate("ab")]
    nothing = np.zeros(0, np.int64)
    split = Split("train", entries, np.zeros((0, 4)), nothing, nothing, ("thing",), {})
    first = image_files_fingerprint([split])
    assert image_files_fingerprint([split]) == first
    renamed = [replace(entries[0], path=tmp_path / "c.png"), entries[1]]
    for other in (entries[::-1], entries[:1], renamed):
        assert image_files_fingerprint([replace(split, images=other)]) != first
    (tmp_path / "a.png").write_bytes(b"longer")
    assert image_files_fingerprint([split]) != first
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"(?s)1 of the 2 images .* cannot be found:.*a\.png"):
        image_files_fingerprint([split])


def test_image_files_count_where_both_descriptions_tell_them() -> None:
    def description(**data: str) -> dict[str, object]:
        return {**DESCRIPTION, "data": {"fingerprint": "f0", **data}}

    assert changed_settings(description(image_files="i0"), description(image_files="i1")) == [
        ("data.image_files", "i0", "i1")
    ]
    assert changed_settings(description(), description(image_files="i1")) == []


def test_a_checkpoint_tells_the_settings_of_its_run(tmp_path: Path) -> None:
    folder = save_one(tmp_path, 3, network())
    assert read_json(folder / "run.json") == DESCRIPTION
    with pytest.raises(DataError, match=r"run\.json is of kind 'toy', which is none of detector, ssdir"):
        load_run_config(folder)
    run = DetectorRun(training=replace(SETTINGS, betas=(0.5, 0.75), clip_norm=None))
    write_json(folder / "run.json", {"kind": "detector", "config": to_dict(run)})
    assert load_run_config(folder) == run
    write_json(folder / "run.json", {"kind": "detector", "config": {"training": {"stepz": 3}}})
    with pytest.raises(DataError, match=r"run\.json: .*no setting 'stepz'.*another version"):
        load_run_config(folder)
    (folder / "run.json").unlink()  # what is left is a model folder
    with pytest.raises(DataError, match=r"config\.json does not tell a run's settings"):
        load_run_config(folder)
    with pytest.raises(DataError, match=r"neither run\.json nor config\.json"):
        load_run_config(tmp_path)


def test_a_setting_that_an_older_run_did_not_know_has_its_default() -> None:
    """A run begun before a setting existed goes on without naming it, as long as it keeps the default."""
    new = {"kind": "detector", "config": to_dict(DetectorRun())}
    old = {"kind": "detector", "config": {**new["config"], "training": {**new["config"]["training"]}}}
    del old["config"]["training"]["feature_cache"]
    assert changed_settings(old, new) == []
    other = replace(DetectorRun(), training=replace(DetectorRun().training, feature_cache="disk"))
    assert changed_settings(old, {"kind": "detector", "config": to_dict(other)}) == [
        ("training.feature_cache", "off", "disk")
    ]
