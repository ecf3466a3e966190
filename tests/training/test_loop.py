"""The training loop: what it computes, what it writes, and that a killed run goes on bit for bit."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ssdir.common.errors import ConfigError, DataError, TrainingError
from ssdir.common.randomness import generator_of, seeded
from ssdir.common.storage import load_tensors, read_json
from ssdir.config import (
    DetectorConfig,
    DetectorLossConfig,
    DetectorRun,
    ModelConfig,
    ObjectiveConfig,
    SSDIRRun,
    TrainingConfig,
)
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset, step_indices
from ssdir.detector.backbone import Backbone
from ssdir.detector.loss import match
from ssdir.detector.ssd import Detector
from ssdir.model.loss_output import LossOutput
from ssdir.model.pretrained import load_detector, read_config
from ssdir.model.ssdir import SSDIR
from ssdir.plots.overlay import with_boxes
from ssdir.training.accelerator import make_accelerator
from ssdir.training.loader import Loader
from ssdir.training.metrics import FiniteGuard, MetricAccumulator
from ssdir.training.optim import MovingAverage, learning_rate, make_optimizer
from ssdir.training.run_folder import load_run_config
from ssdir.training.start import computes_in_bf16, train_detector, train_ssdir
from ssdir.training.tasks.base import Task
from ssdir.training.tasks.detector import DetectorTask
from ssdir.training.tasks.ssdir import SSDIRTask
from ssdir.training.tracking import read_metrics

HERE = Path(__file__).parent


def _toy_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_toy", HERE / "training_toy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_toy"] = module
    spec.loader.exec_module(module)
    return module


toy = _toy_module()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_dataset(tmp_path_factory.mktemp("toy") / "data")


def run_program(folder: Path, *scenarios: str) -> subprocess.CompletedProcess[str]:
    """Run scenarios of training_toy.py in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, HERE / "training_toy.py", folder, *scenarios],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def killed(data: Path) -> Path:
    """A folder with a toy run that nothing disturbed, others that were killed and resumed, and one of two processes."""
    folder = data.parent
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    toy.run_toy(data, folder / "whole")
    toy.run_toy(data, folder / "one", toy.ToyTask(norm=False, noise=0.0), ema_decay=0.0)
    torch.set_num_threads(threads)
    done = run_program(folder, "kill_at_random", "kill_in_checkpoints", "two_processes")
    assert int(done.stdout.split()[0]) >= 3  # kills
    return folder


def timeless(path: Path) -> list[list[str]]:
    """The cells of a metrics.csv, as written, without those that hold times."""
    lines = list(csv.reader(path.read_text().splitlines()))
    kept = [i for i, name in enumerate(lines[0]) if name not in ("seconds", "images_per_second")]
    return [[line[i] for i in kept] for line in lines]


# -- pure functions ----------------------------------------------------------------------------------------------


def test_one_cycle_rises_for_thirty_percent_and_falls_to_a_ten_thousandth() -> None:
    settings = TrainingConfig(steps=101, learning_rate=2.0, schedule="one_cycle")
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[0] == pytest.approx(2.0 / 25)
    assert rates[15] == pytest.approx((2.0 + 2.0 / 25) / 2)  # half way up the cosine
    assert rates[30] == 2.0 == max(rates)
    assert rates[65] == pytest.approx((2.0 + 2e-4) / 2)
    assert rates[100] == pytest.approx(2e-4)
    assert all(math.isfinite(learning_rate(replace(settings, steps=1), step)) for step in (0,))
    assert learning_rate(replace(settings, warmup_steps=10), 10) == 2.0


def test_constant_and_cosine_warm_up_linearly() -> None:
    settings = TrainingConfig(steps=50, learning_rate=1.0, warmup_steps=10)
    assert [learning_rate(settings, step) for step in (0, 4, 9, 10, 49)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    cosine = replace(settings, schedule="cosine")
    assert learning_rate(cosine, 30) == pytest.approx(0.5)
    assert learning_rate(cosine, 49) == pytest.approx((1 + math.cos(math.pi * 39 / 40)) / 2)


def test_weight_decay_spares_biases_and_norms() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    module[2].weight.requires_grad_(False)
    groups = make_optimizer(module, TrainingConfig(weight_decay=0.3), torch.device("cpu")).param_groups
    decays = {id(item): group["weight_decay"] for group in groups for item in group["params"]}
    assert {name: decays.get(id(item)) for name, item in module.named_parameters()} == {
        "0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": None, "2.bias": 0.0,
    }  # fmt: skip


def test_moving_average_is_the_closed_form_and_gives_the_weights_back() -> None:
    module = nn.Linear(1, 1, bias=False).double()
    average = MovingAverage(module, 0.5)
    expected = module.weight.item()
    for step in range(6):
        module.weight.data.fill_(step + 1.0)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
    with average.applied():
        assert module.weight.item() == pytest.approx(expected, abs=1e-12)
    assert module.weight.item() == 6.0
    off = MovingAverage(module, 0.0)
    off.update(0)
    with off.applied():
        assert module.weight.item() == 6.0
    assert off.shadow == {}


def test_generators_differ_in_every_number_and_repeat() -> None:
    draws = {
        numbers: tuple(torch.rand(4, generator=generator_of(*numbers)).tolist())
        for numbers in ((0, 1, 0, 0), (1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (-3, 0, 0, 0))
    }
    assert len(set(draws.values())) == len(draws)
    assert tuple(torch.rand(4, generator=generator_of(0, 1, 0, 0)).tolist()) == draws[0, 1, 0, 0]


def test_precision_auto_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert computes_in_bf16("bf16") and not computes_in_bf16("fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True}, raising=False
    )
    assert not computes_in_bf16("auto")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert computes_in_bf16("auto")
    assert not computes_in_bf16("auto", "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)  # such as a V100
    assert not computes_in_bf16("auto") and not computes_in_bf16("auto", "cuda:1")
    assert computes_in_bf16("auto", "cpu")


# -- the loop ----------------------------------------------------------------------------------------------------


def test_run_folder_holds_what_it_should(killed: Path) -> None:
    run = killed / "whole"
    assert sorted(item.name for item in run.iterdir()) == [
        "checkpoints", "config.json", "metrics.csv", "model", "pictures",
    ]  # fmt: skip
    assert [item.name for item in sorted((run / "checkpoints").iterdir())] == ["step_000035", "step_000040"]
    assert sorted(item.name for item in (run / "checkpoints/step_000040").iterdir()) == [
        ".ssdir.json", "config.json", "model.safetensors", "run.json", "training.json", "training.safetensors",
    ]  # fmt: skip
    assert len(list((run / "pictures").iterdir())) == 4
    described = read_json(run / "config.json")
    assert described["kind"] == "toy"
    assert described["config"]["training"]["ema_decay"] == 0.9
    assert described["data"]["images"] == 10
    assert described["data"]["categories"] == ["thing"]
    assert read_json(run / "checkpoints/step_000040/run.json") == described


def test_metrics_are_means_with_one_header(killed: Path) -> None:
    rows = read_metrics(killed / "whole/metrics.csv")
    assert [row["step"] for row in rows] == [4, 8, 10, 12, 16, 20, 24, 28, 30, 32, 36, 40]
    assert [row["step"] for row in rows if "val/fit" in row] == [10, 20, 30, 40]
    for row in rows:
        assert row["epoch"] == row["step"] * 4 / 10
        assert row["weighted/size"] == pytest.approx(0.01 * row["loss/size"])
        assert row["loss"] == pytest.approx(row["loss/fit"] + row["weighted/size"])
        assert row["health/objects"] == 4
        assert row["lr"] == learning_rate(toy.SETTINGS, int(row["step"]) - 1)
    assert rows[-1]["loss/fit"] < 0.2 * rows[0]["loss/fit"]
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(rows))


@pytest.mark.parametrize("name", ["random", "save_tensors-0", "save_tensors-2", "write_json-1", "discard-0"])
def test_killed_and_resumed_runs_equal_an_undisturbed_one_bit_for_bit(killed: Path, name: str) -> None:
    """SIGKILL at random moments, while a checkpoint's files are written, and while an old one is removed."""
    whole, run = killed / "whole", killed / name
    for file in (
        "model/model.safetensors",
        "checkpoints/step_000040/model.safetensors",
        "checkpoints/step_000040/training.safetensors",
        "checkpoints/step_000035/training.safetensors",
    ):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert timeless(run / "metrics.csv") == timeless(whole / "metrics.csv")
    assert [item.name for item in sorted((run / "checkpoints").iterdir())] == ["step_000035", "step_000040"]


def test_two_processes_with_two_micro_batches_equal_one(killed: Path) -> None:
    one, two = (load_tensors(killed / name / "model/model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    for a, b in zip(
        read_metrics(killed / "one/metrics.csv"), read_metrics(killed / "two/metrics.csv"), strict=True
    ):
        assert b["loss/fit"] == pytest.approx(a["loss/fit"], rel=1e-3, abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3, abs=1e-6)


def test_processes_share_a_batch_without_overlap(killed: Path) -> None:
    seen = [json.loads((killed / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    for step in range(3):
        both = [image_id for rank in (0, 1) for micro in (0, 1) for image_id in seen[rank][2 * step + micro]]
        assert [image_id - 1 for image_id in both] == step_indices(10, 4, step, seed=0).tolist()


def test_checkpoints_hold_the_average_and_the_live_weights(killed: Path) -> None:
    folder = killed / "whole/checkpoints/step_000040"
    model, training = (
        load_tensors(folder / "model.safetensors"),
        load_tensors(folder / "training.safetensors"),
    )
    assert not torch.equal(model["0.weight"], training["live/0.weight"])
    assert torch.equal(model["frozen"], torch.ones(3)) and "live/frozen" not in training
    assert int(model["1.num_batches_tracked"]) == 40
    assert (folder / "model.safetensors").read_bytes() == (
        killed / "whole/model/model.safetensors"
    ).read_bytes()


def test_seeds_decide_and_the_global_generator_does_not(data: Path, tmp_path: Path) -> None:
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(results))
        results.append(
            toy.run_toy(data, tmp_path / name, steps=3, seed=seed).model[0].weight.detach().clone()
        )
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_micro_batches_equal_one_batch(data: Path, tmp_path: Path) -> None:
    models = [
        toy.run_toy(
            data, tmp_path / str(parts), toy.ToyTask(norm=False, noise=0.0), steps=6, accumulate=parts
        ).model
        for parts in (1, 4)
    ]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_precision_may_change_from_run_to_run(data: Path, tmp_path: Path) -> None:
    for name, precision, autocast in (("a", "bf16", True), ("b", "fp32", False), ("c", "bf16", True)):
        task = toy.run_toy(data, tmp_path / name, steps=1, precision=precision)
        assert task.autocast is autocast
        assert task.model[0].weight.dtype == torch.float32


def test_clipping_bounds_the_step_and_metrics_tell_the_norm_before(data: Path, tmp_path: Path) -> None:
    for name, clip in (("free", None), ("tight", 1e-3)):
        toy.run_toy(data, tmp_path / name, steps=1, clip_norm=clip, log_every=1)
    norms = [read_metrics(tmp_path / name / "metrics.csv")[0]["grad_norm"] for name in ("free", "tight")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    moments = [
        load_tensors(tmp_path / name / "checkpoints/step_000001/training.safetensors")
        for name in ("free", "tight")
    ]
    size = [
        math.sqrt(sum(float(t.square().sum()) for n, t in item.items() if "exp_avg/" in n))
        for item in moments
    ]
    assert size[0] == pytest.approx(0.1 * norms[0], rel=1e-4)  # 1 - beta1
    assert size[1] == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_longer_training_goes_on_when_allowed(data: Path, tmp_path: Path) -> None:
    toy.run_toy(data, tmp_path / "run", steps=5, schedule="constant")
    with pytest.raises(ConfigError, match=r"training.steps: 5 -> 9\n.*--allow-changed training.steps"):
        toy.run_toy(data, tmp_path / "run", steps=9, schedule="constant", resume=True)
    toy.run_toy(
        data, tmp_path / "run", steps=9, schedule="constant", resume=True, allow_changed=["training.steps"]
    )
    toy.run_toy(data, tmp_path / "straight", steps=9, schedule="constant")
    assert read_json(tmp_path / "run/config.json")["config"]["training"]["steps"] == 9
    a, b = (tmp_path / name / "model/model.safetensors" for name in ("run", "straight"))
    assert a.read_bytes() == b.read_bytes()


def test_another_dataset_or_a_used_folder_is_refused(data: Path, tmp_path: Path) -> None:
    other = toy.write_dataset(tmp_path / "other", n_train=9)
    toy.run_toy(data, tmp_path / "run", steps=2)
    with pytest.raises(ConfigError, match="not empty; add --resume"):
        toy.run_toy(data, tmp_path / "run", steps=2)
    with pytest.raises(ConfigError, match=r"data.fingerprint"):
        toy.run_toy(other, tmp_path / "run", steps=2, resume=True)
    file = other / "images/train/3.png"  # the same annotations, another image
    file.write_bytes(file.read_bytes() + b"x")
    toy.run_toy(other, tmp_path / "files", steps=2)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"settings:\n  data.image_files: .*\ngive"):
        toy.run_toy(other, tmp_path / "files", steps=2, resume=True)
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    out = io.StringIO()
    toy.run_toy(data, tmp_path / "run", steps=2, resume=True, console=Console(file=out))
    assert "finished at step 2" in out.getvalue()
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before


def test_resuming_from_other_weights_or_a_truncated_file_is_an_error(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    toy.run_toy(data, run, steps=2)
    with pytest.raises(DataError, match=r"another architecture: .*1.weight is not part of the model"):
        toy.run_toy(data, run, toy.ToyTask(norm=False), steps=2, resume=True)
    weights = run / "checkpoints/step_000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"model.safetensors.*resume from the checkpoint before"):
        toy.run_toy(data, run, steps=2, resume=True)


def test_without_validation_split_a_line_says_so(tmp_path: Path) -> None:
    folder = toy.write_dataset(tmp_path / "data", n_val=0)
    out = io.StringIO()
    toy.run_toy(folder, tmp_path / "run", steps=2, console=Console(file=out))
    assert "no val split: no validation" in out.getvalue()
    assert all("val/fit" not in row for row in read_metrics(tmp_path / "run/metrics.csv"))
    assert (tmp_path / "run/pictures/step_000002.png").is_file()


def without_objects(data: Path, folder: Path) -> Path:
    """A copy of a data set folder whose train split has no object but one that is too small."""
    shutil.copytree(data, folder)
    file = folder / "annotations" / "train.json"
    value = json.loads(file.read_text())
    value["annotations"] = value["annotations"][:1]
    value["annotations"][0]["bbox"] = [1, 1, 0.5, 4]
    file.write_text(json.dumps(value))
    return folder


@pytest.mark.filterwarnings("ignore:.*boxes left out")
def test_a_detector_refuses_a_train_split_without_objects(scenes: Path, tmp_path: Path) -> None:
    folder = without_objects(scenes, tmp_path / "data")
    run = DetectorRun(detector=DETECTOR, training=QUICK)
    message = (
        r"train\.json: none of the 8 images of the train split has an object \(left out: 1 less than 1 pixel.*"
        r"a detector learns from boxes; annotate the images, or name another .*--data"
    )
    with pytest.raises(DataError, match=message):
        train_detector(run, folder, tmp_path / "run", console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*boxes left out")
def test_a_model_that_needs_no_boxes_says_that_there_are_none(data: Path, tmp_path: Path) -> None:
    line = "no image of the train split has an annotated object: training a toy needs none"
    for folder in (data, without_objects(data, tmp_path / "without")):
        out = io.StringIO()
        toy.run_toy(folder, tmp_path / f"run-{folder.name}", steps=2, console=Console(file=out))
        assert (line in " ".join(out.getvalue().split())) == (folder != data)


def test_no_steps_give_the_first_weights(data: Path, tmp_path: Path) -> None:
    task = toy.ToyTask()
    before = task.model[0].weight.detach().clone()
    toy.run_toy(data, tmp_path / "run", task, steps=0)
    assert torch.equal(load_tensors(tmp_path / "run/model/model.safetensors")["0.weight"], before)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_numbers_stop_the_run_before_they_reach_the_weights(
    data: Path, tmp_path: Path, where: str
) -> None:
    def poison(number: int, answer: Tensor) -> Tensor:
        if number != 9:
            return answer
        return answer * math.nan if where == "loss" else answer + (answer - answer).abs().sqrt()

    task = toy.ToyTask(hook=poison)
    ids = ", ".join(str(i + 1) for i in step_indices(10, 4, 9, seed=0))
    bad = (
        r"loss/fit is nan, loss/size is nan, grad_norm is nan"
        if where == "loss"
        else r"grad_norm is nan \(all: "
    )
    with pytest.raises(TrainingError, match=rf"step 10: {bad}.*image ids of the batch: {ids}\..*step_000007"):
        toy.run_toy(data, tmp_path / "run", task)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in task.model.parameters())
    assert [item.name for item in (tmp_path / "run/checkpoints").iterdir()] == ["step_000007"]
    task = toy.run_toy(data, tmp_path / "run", resume=True)  # the cause removed, the run goes on
    assert bool(torch.isfinite(task.model[0].weight).all())


def test_window_keeps_means_over_micro_batches_and_steps() -> None:
    class Alone:
        @staticmethod
        def reduce(value: Tensor, reduction: str) -> Tensor:
            return value

    window = MetricAccumulator()
    for step in (0.0, 1.0):
        terms = [LossOutput({"a": torch.tensor(step + micro)}, {"h": 2 * micro}) for micro in (0.0, 2.0)]
        window.add(terms, torch.tensor(step))
    assert window.take(Alone()) == {"loss/a": 1.5, "health/h": 2.0, "grad_norm": 0.5}
    assert window.sums is None and window.count == 0


def test_numbers_looked_at_late_still_name_the_first_bad_step(tmp_path: Path) -> None:
    guard = FiniteGuard(tmp_path)
    for step, value in enumerate((1.0, math.inf, math.nan), start=7):
        values = {
            "loss/a": torch.tensor(value),
            "health/h": torch.tensor(math.nan),
            "grad_norm": torch.tensor(1.0),
        }
        guard.note(step, values, [step, 100])
    with pytest.raises(
        TrainingError, match=r"^step 8: loss/a is inf .*batch: 8, 100\. There is no checkpoint yet"
    ):
        guard.check()
    guard.check()  # nothing is left to look at
    guard = FiniteGuard(tmp_path, processes=4)
    guard.note(1, {"grad_norm": torch.tensor(math.nan)}, [3])
    with pytest.raises(
        TrainingError, match=r"image ids of this process's share of the batch \(1 of 4\): 3\."
    ):
        guard.check()


def test_images_read_ahead_are_the_same(data: Path) -> None:
    images = CachedDataset(data, "train", toy.SIDE)
    settings = replace(toy.SETTINGS, accumulate=2)
    feeds = [
        Loader(images, settings, SimpleNamespace(device=torch.device(kind), process_index=0, num_processes=1))
        for kind in ("cpu", "meta")
    ]
    for step in (3, 4, 5, 9):  # a jump, too
        here, ahead = (loader.micro_batches(step) for loader in feeds)
        assert [batch.image_ids for batch in here] == [batch.image_ids for batch in ahead]
        assert {batch.images.device.type for batch in ahead} == {"meta"}
        assert here[0].images.is_contiguous(memory_format=torch.channels_last)
    for loader in feeds:
        with loader:
            pass


def test_batch_that_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda self: 3))
    with pytest.raises(ConfigError, match=r"batch_size 4 cannot be shared by 3 processes.*multiple of 6"):
        make_accelerator(replace(toy.SETTINGS, accumulate=2))


def test_a_named_device_is_taken_for_one_run_and_an_absent_one_before_anything_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(toy.SETTINGS, precision="fp32")
    assert make_accelerator(plain, "meta").device == torch.device("meta")
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ
    assert make_accelerator(plain).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    toy.run_toy(data, tmp_path / "run", steps=2, device="cpu")
    assert read_json(tmp_path / "run/checkpoints/step_000002/training.json")["device"] == "cpu"
    with pytest.raises(ConfigError, match="device 'tpu' cannot be used here"):
        toy.run_toy(data, tmp_path / "other", steps=2, device="tpu")
    assert not (tmp_path / "other").exists()
    with monkeypatch.context() as patched:  # where there is a GPU
        patched.setattr(torch.cuda, "is_available", lambda: True)
        assert make_accelerator(plain, "cpu").device.type == "cpu"


def test_processes_that_share_a_training_take_no_single_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    for device in ("cuda:1", "mps"):
        with pytest.raises(ConfigError, match=rf"--device {device} names one .* by CUDA_VISIBLE_DEVICES"):
            make_accelerator(toy.SETTINGS, device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device 'cuda' cannot be used here"):
        make_accelerator(toy.SETTINGS, "cuda")


@pytest.mark.parametrize("left", [{"LOCAL_RANK": ""}, {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1"}])
def test_a_left_over_number_of_a_process_is_told_and_ignored(
    left: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(
        UserWarning, match=f"the environment has {', '.join(left)}, but not .*: one process trains"
    ):
        assert make_accelerator(toy.SETTINGS, "cpu").num_processes == 1
    assert {name: os.environ[name] for name in left} == left


# -- the two tasks -----------------------------------------------------------------------------------------------

DETECTOR = DetectorConfig(
    image_size=64, width=0.125, maps=(1, 2), min_sizes=(80.0, 150.0), max_sizes=(150.0, 220.0), n_classes=9,
    class_agnostic=False,
)  # fmt: skip
MODEL = ModelConfig(
    z_what_size=8, n_hidden=1, decoder_channels=(16, 8, 8), decoder_norm="batch", feature_norm="group"
)
GLIMPSES = replace(MODEL, what_encoder="glimpses", glimpse_size=8, glimpse_width=4, projector_size=8)
QUICK = TrainingConfig(
    steps=4, batch_size=4, learning_rate=0.003, log_every=2, validate_every=0, checkpoint_every=2, precision="auto",
    channels_last=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright squares of two classes on black; one image without objects."""
    folder = tmp_path_factory.mktemp("scenes")
    for split, n in (("train", 8), ("val", 5)):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        annotations: list[dict[str, Any]] = []
        for i in range(1, n + 1):
            pixels = np.zeros((64, 64), np.uint8)
            for j in range(i % 3):
                x, y, side = 4 + 5 * i % 20, 3 + 30 * j, 24
                pixels[y : y + side, x : x + side] = 120 + 100 * j
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": j + 1, "bbox": [x, y, side, side],
                     "area": side * side, "iscrowd": 0}
                )  # fmt: skip
            Image.fromarray(pixels).save(folder / "images" / split / f"{i}.png")
        value = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(1, n + 1)
            ],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "dim"}, {"id": 2, "name": "bright"}],
        }
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def detector_run(scenes: Path) -> Path:
    run = DetectorRun(detector=DETECTOR, training=replace(QUICK, steps=30, ema_decay=0.5, log_every=5))
    return train_detector(run, scenes, scenes.parent / "detector", console=Console(quiet=True))


def ssdir_run(scenes: Path, detector: Path, out: Path, *, clone: bool = True, resume: bool = False) -> SSDIR:
    run = SSDIRRun(
        model=replace(MODEL, clone_backbone=clone),
        objective=ObjectiveConfig(image=1.0),
        training=QUICK,
    )
    train_ssdir(run, detector, scenes, out, resume=resume, console=Console(quiet=True))
    return SSDIR.from_pretrained(out)


def test_detector_learns_and_takes_its_classes_from_the_dataset(detector_run: Path) -> None:
    rows = read_metrics(detector_run / "metrics.csv")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert {"loss/box", "loss/score", "health/fired_per_image", "val/loss", "val/recall"} <= rows[-1].keys()
    detector = load_detector(detector_run)
    assert detector.config.n_classes == 2
    assert read_config(detector_run)["categories"] == ["dim", "bright"]
    assert read_json(detector_run / "config.json")["config"]["detector"]["n_classes"] == 2


@pytest.mark.parametrize("clone", [False, True])
def test_frozen_detector_stays_bit_for_bit_and_the_rest_moves(
    scenes: Path, detector_run: Path, tmp_path: Path, clone: bool
) -> None:
    model = ssdir_run(scenes, detector_run, tmp_path / "run", clone=clone)
    before = load_detector(detector_run)
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.detector.state_dict()[name], tensor), name
    images = CachedDataset(scenes, "val", 64).batch(range(5)).images
    after, expected = model.detector(images), before(images)
    assert torch.equal(after.logits, expected.logits) and torch.equal(after.offsets, expected.offsets)
    rows = read_metrics(tmp_path / "run/metrics.csv")
    assert {"loss/image", "loss/objects", "loss/what", "loss/depth", "val/image_mse"} <= rows[-1].keys()
    assert model.categories == ("dim", "bright")
    if clone:
        assert not torch.equal(model.backbone.features[0].weight, before.backbone.features[0].weight)
    with Image.open(tmp_path / "run/pictures/step_000004.png") as picture:
        assert picture.size == (3 * 68 + 4, 5 * 68 + 4)


def test_ssdir_resumes_exactly(
    scenes: Path, detector_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssdir_run(scenes, detector_run, tmp_path / "whole")
    forward = SSDIRTask.forward
    calls = iter(range(100))

    def interrupted(
        self: SSDIRTask, batch: Batch, generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, batch, generator)

    with monkeypatch.context() as patch:
        patch.setattr(SSDIRTask, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ssdir_run(scenes, detector_run, tmp_path / "stopped")
    ssdir_run(scenes, detector_run, tmp_path / "stopped", resume=True)
    a, b = (tmp_path / name / "model/model.safetensors" for name in ("whole", "stopped"))
    assert a.read_bytes() == b.read_bytes()
    assert timeless(tmp_path / "whole/metrics.csv") == timeless(tmp_path / "stopped/metrics.csv")


def test_runs_and_checkpoints_give_their_settings_back(
    scenes: Path, detector_run: Path, tmp_path: Path
) -> None:
    settings = replace(QUICK, steps=1, betas=(0.8, 0.99), clip_norm=None)
    teacher = SSDIRRun(GLIMPSES, ObjectiveConfig(image=0.0, invariance=0.1, view_noise=0.2), settings)
    train_ssdir(teacher, detector_run, scenes, tmp_path / "teacher", console=Console(quiet=True))
    student = SSDIRRun(MODEL, ObjectiveConfig(image=0.5, teacher=2.0), settings)
    train_ssdir(
        student,
        detector_run,
        scenes,
        tmp_path / "ssdir",
        teacher=tmp_path / "teacher",
        console=Console(quiet=True),
    )
    training = replace(QUICK, steps=30, ema_decay=0.5, log_every=5)
    detector = DetectorRun(detector=replace(DETECTOR, n_classes=2), training=training)
    for out, run, step in (
        (detector_run, detector, 30), (tmp_path / "teacher", teacher, 1), (tmp_path / "ssdir", student, 1),
    ):  # fmt: skip
        assert load_run_config(out) == run
        assert load_run_config(out / f"checkpoints/step_{step:06d}") == run


def test_a_run_from_imagenet_goes_on_from_imagenet_only(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path | None] = []
    monkeypatch.setattr(Backbone, "load_imagenet_weights", lambda self, path: loaded.append(path))
    run = DetectorRun(detector=DETECTOR, training=replace(QUICK, steps=1))

    def start(imagenet: Path | None, resume: bool) -> None:
        train_detector(
            run, scenes, tmp_path / "run", imagenet=imagenet, resume=resume, console=Console(quiet=True)
        )

    with monkeypatch.context() as patch:
        patch.setattr(DetectorTask, "forward", lambda self, batch, generator, step=None: next(iter(())))
        with pytest.raises(StopIteration):
            start(tmp_path / "vgg.pth", resume=False)
    with pytest.raises(ConfigError, match=r"initial_weights: imagenet -> \(absent\)"):
        start(None, resume=True)
    start(tmp_path / "vgg.pth", resume=True)  # before the first checkpoint: loaded again
    start(tmp_path / "vgg.pth", resume=True)  # after it: not needed
    assert loaded == [tmp_path / "vgg.pth"] * 2


# -- micro-batches -----------------------------------------------------------------------------------------------


def halves_of(batch: Batch) -> list[Batch]:
    """The micro-batches of ``training.accumulate`` 2."""
    half, parts = len(batch) // 2, []
    for first in (0, half):
        mine = (batch.image_index >= first) & (batch.image_index < first + half)
        parts.append(
            Batch(
                batch.images[first : first + half],
                batch.boxes[mine],
                batch.labels[mine],
                batch.image_index[mine] - first,
                batch.image_ids[first : first + half],
            )
        )
    return parts


def test_micro_batches_of_a_detector_weigh_objects_by_their_own_counts(
    scenes: Path, detector_run: Path
) -> None:
    """A task's terms are means over the positives of its own micro-batch, which are simply averaged."""
    task = DetectorTask(load_detector(detector_run), DetectorLossConfig()).eval()
    dataset = CachedDataset(scenes, "train", 64)
    for indices, equal in (
        ((0, 1, 0, 1), True),
        ((0, 6, 1, 4), False),
    ):  # 1 + 2 | 1 + 2 and 1 + 1 | 2 + 2 objects
        batch = dataset.batch(indices)
        whole = task(batch, generator_of(0)).losses
        parts = [task(item, generator_of(0)).losses for item in halves_of(batch)]
        priors = task.model.priors
        counts = torch.tensor(
            [
                (
                    match(priors, item.boxes, item.image_index, len(item), task.objective.config.match_iou)
                    >= 0
                ).sum()
                for item in halves_of(batch)
            ]
        )
        assert (counts[0] == counts[1]) == equal
        for name, value in whole.items():
            terms = torch.stack([part[name] for part in parts])
            torch.testing.assert_close((terms * counts).sum() / counts.sum(), value, rtol=1e-4, atol=1e-6)
            assert torch.isclose(terms.mean(), value, rtol=1e-4, atol=1e-6) == equal


def test_micro_batches_of_ssdir_weigh_objects_by_their_own_counts(scenes: Path, detector_run: Path) -> None:
    """Means over images and predictions do not depend on the parts; a mean over objects' pixels
    does: micro-batches are simply averaged."""
    config = replace(MODEL, sigma_what=0.0, sigma_depth=0.0, train_on="selected", decoder_norm="none")
    with seeded(0):
        model = SSDIR(load_detector(detector_run), replace(config, present_threshold=0.3))
    task = SSDIRTask(model, ObjectiveConfig(image=1.0)).eval()
    dataset = CachedDataset(scenes, "train", 64)
    for indices in ((0, 1, 0, 1), (0, 6, 1, 4)):
        batch = dataset.batch(indices)
        whole = task(batch, generator_of(0))
        parts = [task(item, generator_of(0)) for item in halves_of(batch)]
        counts = [part.diagnostics["decoded"] for part in parts]
        assert sum(counts) == whole.diagnostics["decoded"] > 0
        for name, value in whole.losses.items():
            mean = torch.stack([part.losses[name] for part in parts]).mean()
            same = name != "objects" or counts[0] == counts[1]
            assert torch.isclose(mean, value, rtol=1e-4, atol=1e-6) == same, name
    assert counts[0] != counts[1]


def test_ssdir_refuses_to_resume_on_another_detector(
    scenes: Path, detector_run: Path, tmp_path: Path
) -> None:
    ssdir_run(scenes, detector_run, tmp_path / "run")
    checkpoint = detector_run / "checkpoints" / "step_000028"
    with pytest.raises(ConfigError, match="detector_weights: "):
        ssdir_run(scenes, checkpoint, tmp_path / "run", resume=True)


class PerfectDetector(Detector):
    """Answers with the true boxes, which it finds by the brightness of the scenes."""

    truth: Batch

    def detect(self, images: Tensor, score_threshold: float = 0.01, **others: Any) -> Any:
        from ssdir.boxes import cxcywh_to_xyxy
        from ssdir.detector.ssd import Detections

        batch = self.truth
        return Detections(
            cxcywh_to_xyxy(batch.boxes),
            torch.ones(len(batch.boxes)),
            batch.labels,
            batch.image_index,
            len(images),
        )


def test_validation_of_perfect_boxes_is_perfect_and_of_none_is_zero(scenes: Path) -> None:
    dataset = CachedDataset(scenes, "val", 64)
    detector = PerfectDetector(replace(DETECTOR, n_classes=2))
    detector.truth = dataset.batch(range(5))
    task = DetectorTask(detector, DetectorLossConfig())
    task.eval()
    with torch.no_grad():
        figures = task.validate(dataset, 500)
        assert figures["recall"] == figures["precision"] == 1.0
        if importlib.util.find_spec("faster_coco_eval"):
            assert figures["AP50"] == pytest.approx(1.0) and figures["AP"] == pytest.approx(1.0)
        terms = task(dataset.batch(range(5)), generator_of(0))
        assert figures["loss"] == pytest.approx(float(sum(terms.losses.values())), rel=1e-5)
        whole = detector.truth
        detector.truth = Batch(
            whole.images, whole.boxes[:0], whole.labels[:0], whole.image_index[:0], whole.image_ids
        )
        figures = task.validate(dataset, 500)
    assert figures["recall"] == 0.0
    assert "precision" not in figures


def test_average_precision_is_left_out_without_its_judge(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    dataset = CachedDataset(scenes, "val", 64)
    detector = PerfectDetector(replace(DETECTOR, n_classes=2))
    detector.truth = dataset.batch(range(5))
    figures = DetectorTask(detector, DetectorLossConfig()).validate(dataset, 500)
    assert "AP50" not in figures and figures["recall"] == 1.0


def test_image_networks_are_those_with_fixed_shapes(detector_run: Path) -> None:
    def kinds(task: Task) -> list[str]:
        return [type(part).__name__ for part in task.image_networks()]

    detector = load_detector(detector_run)
    assert kinds(DetectorTask(detector, DetectorLossConfig())) == ["Backbone"]
    ssdir = SSDIRTask(SSDIR(detector, replace(MODEL, clone_backbone=True)), ObjectiveConfig())
    assert kinds(ssdir) == ["Backbone", "Backbone", "WhatEncoder", "DepthEncoder"]
    glimpses = SSDIRTask(SSDIR(detector, GLIMPSES), ObjectiveConfig())
    assert kinds(glimpses) == ["Backbone"]
    behind = replace(GLIMPSES, opacity=True, background="learned")
    assert kinds(SSDIRTask(SSDIR(detector, behind), ObjectiveConfig())) == ["Backdrop", "Backbone"]
    alone = SSDIRTask(SSDIR(None, replace(GLIMPSES, image_size=64)), ObjectiveConfig())
    assert kinds(alone) == [] and alone.cached_detector() is None and "detector" not in alone.fingerprint()


def test_compiled_training_takes_the_same_steps(scenes: Path, detector_run: Path, tmp_path: Path) -> None:
    """In a program of its own: the checks of shapes that tests run with cannot be compiled."""
    (tmp_path / "data").symlink_to(scenes)
    (tmp_path / "detector").symlink_to(detector_run)
    done = run_program(tmp_path, "compiled")
    assert int(done.stdout.split()[0]) > 20  # operations in compiled graphs
    for kind in ("detector", "ssdir"):
        plain, compiled = (
            load_tensors(tmp_path / f"{kind}-{name}/model/model.safetensors")
            for name in ("plain", "compiled")
        )
        assert compiled.keys() == plain.keys()
        for name, tensor in plain.items():
            torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_drawn_boxes_lie_on_their_outermost_pixels() -> None:
    drawn = np.asarray(with_boxes(torch.zeros(3, 10, 20), torch.tensor([[0.1, 0.1, 0.35, 0.9]])))
    rows, columns = np.nonzero(drawn.any(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 8, 2, 6)
