"""What must hold for every baseline and each of its presets, whatever is inside."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from ssdir.baselines.base import Baseline
from ssdir.baselines.kinds import BASELINES
from ssdir.cli.main import main
from ssdir.common.randomness import generator_of, seeded
from ssdir.common.storage import load_tensors
from ssdir.config import DetectorConfig, TrainingConfig, from_dict, to_dict
from ssdir.data.batch import Batch
from ssdir.detector.ssd import Detector
from ssdir.model.loss_output import LossOutput
from ssdir.model.pretrained import save_detector
from ssdir.registry import load_model
from ssdir.training.optim import learning_rate, make_optimizer
from ssdir.training.start import train_baseline
from ssdir.training.tasks.baseline import BaselineTask

PRESETS = [(kind, name) for kind, item in BASELINES.items() for name in item.presets]
NEEDED = {"quickstart", "mnist", "clevr"}
SIDE = 32
QUIET = Console(quiet=True)
QUICK = TrainingConfig(
    steps=4, batch_size=4, log_every=1, validate_every=0, validation_images=4, checkpoint_every=2
)


def detector(side: int) -> Detector:
    """One that finds something: a few boxes of a third of the image."""
    config = DetectorConfig(image_size=side, width=0.125, maps=(1,), min_sizes=(side / 3,), max_sizes=())
    with seeded(0):
        found = Detector(config)
    with torch.no_grad():
        found.present[0].bias.fill_(0.5)
    return found.eval()


def built(kind: str, config: Any) -> Baseline:
    """A model with first weights that depend on nothing but its settings."""
    item = BASELINES[kind]
    build: Any = item.load_class()
    with seeded(0):
        return build(detector(config.image_size), config) if item.needs_detector else build(config)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def squares(n: int, side: int) -> tuple[Tensor, list[list[tuple[int, int, int]]]]:
    """Images of one to three grey squares on black, and (x, y, side) of each in pixels."""
    random = np.random.default_rng(0)
    images, boxes = np.zeros((n, 3, side, side), np.float32), []
    for image in images:
        quarters = random.permutation(4)[: 1 + random.integers(3)]
        found = []
        for quarter in quarters:
            edge = int(random.integers(side // 4, side // 2 - 2))
            x, y = int(quarter % 2) * side // 2 + 1, int(quarter // 2) * side // 2 + 1
            image[:, y : y + edge, x : x + edge] = random.uniform(0.4, 1)
            found.append((x, y, edge))
        boxes.append(found)
    return torch.from_numpy(images), boxes


@cache
def pictures(side: int) -> Tensor:
    return squares(8, side)[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set folder of such images; the class is the column."""
    folder = tmp_path_factory.mktemp("squares")
    for split, n in (("train", 8), ("val", 4), ("test", 6)):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        images, boxes = squares(n, SIDE)
        annotations: list[dict[str, Any]] = []
        for i, (image, found) in enumerate(zip(images, boxes, strict=True), start=1):
            pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / split / f"{i}.png")
            annotations += [
                {"id": len(annotations) + k, "image_id": i, "category_id": 1 + (x > SIDE // 2),
                 "bbox": [x, y, edge, edge], "area": edge**2, "iscrowd": 0}
                for k, (x, y, edge) in enumerate(found)
            ]  # fmt: skip
        value = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(1, n + 1)
            ],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "left"}, {"id": 2, "name": "right"}],
        }
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(value))
    return folder


def batch_of(images: Tensor) -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(images, torch.zeros(0, 4), none, none, tuple(range(len(images))))


def one_step(
    task: BaselineTask, optimizer: torch.optim.Optimizer, settings: TrainingConfig, batch: Batch, step: int
) -> LossOutput:
    """What the loop does in a step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step) * group["lr_scale"]
    terms = task(batch, generator_of(0, step), step)
    optimizer.zero_grad()
    task.weighted(terms.losses).backward()
    if settings.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), settings.clip_norm)
    optimizer.step()
    return terms


# -- presets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(BASELINES))
def test_each_kind_has_the_presets_that_users_look_for(kind: str) -> None:
    item = BASELINES[kind]
    assert set(item.presets) >= NEEDED
    assert item.load_class().kind == kind
    for preset in item.presets.values():
        assert isinstance(preset.run, item.run)
        assert preset.help and "\n" not in preset.help
        assert item.needs_detector or preset.run.model.image_size == 128
        assert from_dict(item.run, json.loads(json.dumps(to_dict(preset.run)))) == preset.run


@pytest.mark.parametrize("kind", list(BASELINES))
def test_the_documentation_names_every_preset(kind: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "baselines.md").read_text()
    assert f"ssdir train {kind} " in text
    assert all(f"`{name}`" in text for name in BASELINES[kind].presets)


@pytest.mark.parametrize(("kind", "name"), PRESETS)
def test_a_training_step_of_every_preset(kind: str, name: str) -> None:
    """The whole architecture; the batch is cut to one image, and slots, which are all alike, to three."""
    run = BASELINES[kind].presets[name].run
    if kind == "slot-attention":
        run = replace(run, model=replace(run.model, n_slots=3))
    task = BaselineTask(built(kind, run.model)).train()
    optimizer = make_optimizer(task.model, run.training, torch.device("cpu"), task.optimizer_groups())
    before = {key: value.detach().clone() for key, value in task.model.named_parameters()}
    terms = one_step(task, optimizer, run.training, batch_of(pictures(run.model.image_size)[:1]), 0)
    assert terms.losses.keys() == task.weights.keys()
    assert all(math.isfinite(float(value.detach())) for value in terms.losses.values())
    assert "present_per_image" in terms.diagnostics
    changed = 0
    for key, value in task.model.named_parameters():
        assert torch.isfinite(value).all(), key
        if value.grad is not None and bool(value.grad.any()):
            changed += 1
            assert not torch.equal(value, before[key]), key
        elif not value.requires_grad:
            assert torch.equal(value, before[key]), key
    assert changed > 10


# -- small models ------------------------------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "space": {"g": 4, "glimpse_size": 8},
    "slot-attention": {"n_slots": 5},
    "crop-vae": {},
    "spair": {"cell": 8, "anchor": 32.0, "patch_size": 8},
}
"""The quickstart preset of each, for images of 32 px."""


def small(kind: str) -> Any:
    """The quickstart's model of a kind for small images, and QUICK as its training."""
    run = BASELINES[kind].presets["quickstart"].run
    return replace(run, model=replace(run.model, image_size=SIDE, **SMALL[kind]), training=QUICK)


@cache
def small_model(kind: str) -> Baseline:
    return built(kind, small(kind).model).eval()


kinds = pytest.mark.parametrize("kind", list(BASELINES))


@kinds
def test_what_leaves_a_model_is_packed_and_in_range(kind: str) -> None:
    model, images = small_model(kind), pictures(SIDE)
    found = model.infer(images, present_threshold=-1.0, nms_iou=None)
    assert found.n_images == 8 and len(found) > 0
    assert (found.image_index[1:] >= found.image_index[:-1]).all()
    assert ((found.present >= 0) & (found.present <= 1)).all()
    assert (found.boxes[:, 2:] > 0).all() and torch.isfinite(found.boxes).all()
    assert found.what is not None and torch.isfinite(found.what).all() and found.what.dtype == torch.float32
    assert found.patches is not None
    for values in (found.patches, found.alpha):
        assert values is None or bool(((values >= 0) & (values <= 1)).all())
    bare = model.infer(images, present_threshold=-1.0, nms_iou=None, patches=False)
    assert bare.patches is None and torch.equal(bare.boxes, found.boxes)
    nothing = model.infer(images[:0])
    assert nothing.n_images == len(nothing) == 0 and nothing.what is not None
    assert nothing.what.shape[1:] == found.what.shape[1:]
    assert len(model.infer(images, present_threshold=1.0)) == 0


@kinds
def test_painting(kind: str) -> None:
    model, images = small_model(kind), pictures(SIDE)
    found = model.infer(images, present_threshold=-1.0, nms_iou=None)
    for side in (SIDE, 48):
        alone, whole = model.render(found, side), model.reconstruct(images, side)
        behind = model.background(images, side)
        assert alone.shape == whole.shape == (8, 3, side, side)
        assert behind is None or model.has_background
        for rendered in (alone, whole, *([behind] if behind is not None else [])):
            assert torch.isfinite(rendered).all() and not rendered.requires_grad
            assert rendered.min() > -0.01 and rendered.max() < 1.01
    assert model.reconstruct(images).shape == images.shape
    nothing = model.infer(images, present_threshold=1.0)
    assert torch.equal(model.render(nothing, SIDE), torch.zeros_like(images))


@kinds
def test_evaluation_is_deterministic(kind: str) -> None:
    model, images = small_model(kind), pictures(SIDE)
    state = torch.get_rng_state()
    a, b = (model.infer(images, present_threshold=0.0) for _ in range(2))
    assert torch.equal(a.boxes, b.boxes) and torch.equal(a.present, b.present)
    assert a.what is not None and b.what is not None and torch.equal(a.what, b.what)
    assert torch.equal(model.reconstruct(images), model.reconstruct(images))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()  # whatever the mode, evaluation is evaluation
    assert torch.equal(model.infer(images, present_threshold=0.0).boxes, a.boxes) and model.training
    model.eval()


@kinds
def test_noise_comes_from_the_generator_alone(kind: str) -> None:
    model, images = built(kind, small(kind).model).train(), pictures(SIDE)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + len(losses))
        terms = model(images, torch.Generator().manual_seed(seed), 0)
        losses.append(
            sum(model.weights[name] * float(value.detach()) for name, value in terms.losses.items())
        )
    assert losses[0] == losses[1] != losses[2]


@kinds
def test_a_model_folder_gives_the_model_back(kind: str, tmp_path: Path) -> None:
    model, images = small_model(kind), pictures(SIDE)
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path)
    assert type(again) is type(model) and again.config == model.config and not again.training
    assert torch.equal(again.reconstruct(images), model.reconstruct(images))
    assert again.state_dict().keys() == model.state_dict().keys()


@kinds
def test_bf16_and_fp32_agree(kind: str) -> None:
    """Under autocast the likelihoods, divergences and positions stay in float32."""
    model, images = built(kind, small(kind).model).eval(), pictures(SIDE)
    exact = model(images, torch.Generator().manual_seed(0), None)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images, torch.Generator().manual_seed(0), None)
        found = model.infer(images, present_threshold=0.0)
    assert found.boxes.dtype == found.present.dtype == torch.float32
    for name, value in rough.losses.items():
        assert value.dtype == torch.float32, name
    total = [
        float(sum(model.weights[name] * value for name, value in terms.losses.items()).detach())
        for terms in (exact, rough)
    ]
    assert total[1] == pytest.approx(total[0], rel=0.05)


# -- runs --------------------------------------------------------------------------------------------------------


def run_of(kind: str, data: Path, out: Path, **options: Any) -> Path:
    standing: dict[str, Any] = {}
    if BASELINES[kind].needs_detector:
        folder = data.parent / f"{data.name}-detector"
        if not folder.exists():
            save_detector(detector(SIDE), folder, ("left", "right"))
        standing = {"detector": folder}
    return train_baseline(kind, small(kind), data, out, console=QUIET, **standing, **options)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = {kind: run_of(kind, data, folder / kind) for kind in BASELINES}
    torch.set_num_threads(threads)
    return made


@kinds
def test_a_run_goes_on_bit_for_bit(
    kind: str, data: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = BaselineTask.forward

    def interrupted(
        self: BaselineTask, batch: Batch, generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        if step == 3:
            raise KeyboardInterrupt
        return forward(self, batch, generator, step)

    with monkeypatch.context() as patch:
        patch.setattr(BaselineTask, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_of(kind, data, tmp_path / "run")
    run_of(kind, data, tmp_path / "run", resume=True)
    for file in ("model.safetensors", "training.safetensors"):
        a, b = (
            load_tensors(run / "checkpoints/step_000004" / file) for run in (runs[kind], tmp_path / "run")
        )
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@kinds
def test_a_run_is_evaluated_and_inferred(
    kind: str, data: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    assert main(["evaluate", str(runs[kind]), "--out", str(tmp_path / "evaluation")]) == 0
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert metrics["counts"]["images"] == 6 and metrics["counts"]["true_objects"] > 6
    assert metrics["reconstruction"]["image_mse"] is not None
    assert (tmp_path / "evaluation/report.html").is_file()
    words = ["infer", str(data / "images/test"), "--model", str(runs[kind]), "--out", str(tmp_path / "found")]
    assert main([*words, "--present", "0"]) == 0
    index = json.loads((tmp_path / "found/index.json").read_text())
    assert len(index) == 6 and all("error" not in entry for entry in index)
    assert (tmp_path / "found/1/reconstruction.png").is_file()


@pytest.mark.parametrize(("kind", "name"), [(kind, "quickstart") for kind in BASELINES])
def test_info_lists_every_parameter(kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", f"{kind}/{name}", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["objects"] >= 1 and len(shown["layers"]) > 5
    total = sum(shown["parameters"].values())
    assert sum(layer["parameters"] for layer in shown["layers"]) == total
    if not BASELINES[kind].needs_detector:
        model = built(kind, BASELINES[kind].presets[name].run.model)
        assert total == sum(item.numel() for item in model.parameters())


# -- learning ----------------------------------------------------------------------------------------------------

OVERFIT = {
    "space": (0.003, 5.0), "spair": (0.003, 2.0), "slot-attention": (0.003, 2.0), "crop-vae": (0.01, 2.0),
}  # fmt: skip
"""Learning rate, and the factor by which 20 steps on 8 images must cut the loss, above its least possible value."""


@kinds
def test_twenty_steps_cut_the_loss(kind: str) -> None:
    """The small form of runs/overfit_*.sh, with the schedules at their end."""
    rate, factor = OVERFIT[kind]
    settings = replace(QUICK, learning_rate=rate, clip_norm=1.0 if kind == "slot-attention" else None)
    task = BaselineTask(built(kind, small(kind).model)).train()
    optimizer = make_optimizer(task.model, settings, torch.device("cpu"), task.optimizer_groups())
    batch = batch_of(pictures(SIDE))
    least = 0.0
    if kind == "space":  # every channel of every pixel exactly right
        least = 3 * SIDE**2 * math.log(task.model.config.sigma_fg * math.sqrt(2 * math.pi))
    found = [
        float(task.weighted(one_step(task, optimizer, settings, batch, 10**6).losses).detach()) - least
        for _ in range(20)
    ]
    assert 0 < found[-1] < found[0] / factor
