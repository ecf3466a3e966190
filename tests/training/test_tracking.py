"""metrics.csv, the health line, what is shown, and the trackers."""

from __future__ import annotations

import io
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from ssdir.common.errors import ConfigError, DataError
from ssdir.common.extras import how_to_install
from ssdir.training.health import health
from ssdir.training.tracking import Display, MetricsFile, Recorder, make_trackers, read_metrics

COLUMNS = ["step", "lr", "loss", "val/x"]


def line(step: int, **values: float) -> dict[str, float]:
    row = {
        "step": float(step),
        "lr": 0.1,
        "loss": 1.0,
        "loss/a": 1.0,
        "grad_norm": 1.0,
        "images_per_second": 8.0,
    }
    return {**row, **values}


def test_numbers_come_back_equal_and_empty_cells_stay_out(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    rows = [{"step": 1.0, "lr": 1 / 3, "loss": 1e-30}, {"step": 2.0, "loss": 123456789.0, "val/x": -0.1}]
    for row in rows:
        file.append(row, COLUMNS)
    assert read_metrics(file.path) == rows
    assert file.path.read_text().splitlines() == [
        "step,lr,loss,val/x", "1,0.3333333333333333,1e-30,", "2,,123456789,-0.1",
    ]  # fmt: skip


def test_resuming_drops_later_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    for step in (5, 10, 15):
        file.append({"step": float(step), "loss": math.inf}, COLUMNS)
    whole = path.read_text()
    path.write_text(whole + "20,0.1,0.")
    assert len(read_metrics(path)) == 3
    file = MetricsFile(path, until=10)
    assert path.read_text() == whole[: whole.index("15,")]
    assert [row["step"] for row in file.rows] == [5, 10]
    file.append({"step": 15.0, "loss": math.inf}, COLUMNS)
    assert path.read_text() == whole
    assert MetricsFile(path).rows == []  # a run from the start
    assert not path.exists()


def test_other_columns_and_broken_cells_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    file.append({"step": 1.0}, COLUMNS)
    with pytest.raises(DataError, match="has the columns step, lr"):
        file.append({"step": 2.0}, COLUMNS[:-1])
    with pytest.raises(DataError, match="move the file away"):
        file.append({"step": 2.0, "surprise": 1.0}, COLUMNS)
    path.write_text("step,loss\n1,x\n")
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(tmp_path / "none.csv")


def test_columns_that_come_later_are_empty_in_earlier_lines(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.append({"step": 1.0, "lr": 0.5}, ["step", "lr"])
    file = MetricsFile(tmp_path / "metrics.csv", until=1)
    file.append({"step": 2.0, "more": 3.0}, ["step", "more", "lr"])
    assert (tmp_path / "metrics.csv").read_text() == "step,more,lr\n1,,0.5\n2,3,\n"


def test_health_names_what_is_wrong() -> None:
    def verdict(rows: list[dict[str, float]]) -> tuple[bool | None, str]:
        return health(rows, {"a": 1.0, "b": 0.0})

    moving = [line(i, **{"loss/a": 1 / i, "loss": 1 / i}) for i in range(1, 41)]
    assert verdict(moving) == (True, "healthy: gradient norm 1")
    still = [line(i, **{"loss/b": 1.0}) for i in range(1, 41)]
    healthy, text = verdict(still)
    assert not healthy
    assert "a has not moved by 1 % over the last 10 lines" in text
    assert "b has" not in text  # its weight is 0
    assert verdict([{**row, "loss/a": 0.0} for row in still])[0]  # switched off by a schedule
    assert verdict(still[:19])[0]  # too early to say
    assert "the gradient is zero" in verdict([*moving, line(41, grad_norm=0.0)])[1]
    assert "about to diverge" in verdict([*moving, line(41, grad_norm=101.0)])[1]
    assert verdict([*moving, line(41, grad_norm=99.0, loss=0.1)])[0]
    assert "above where it began" in verdict([*moving, line(41, loss=1.5)])[1]
    empty = [line(i, **{"loss/a": 1 / i, "health/present_per_image": 0.0}) for i in range(1, 6)]
    assert "no object is present" in verdict(empty)[1]
    assert verdict(empty[:4])[0] is None  # a detector starts with none
    silent = [line(i, **{"loss/a": 1 / i, "health/fired_per_image": 0.0}) for i in range(1, 6)]
    assert "no object is present" in verdict(silent)[1]
    cropless = [line(i, **{"loss/a": 1 / i, "health/crops": 0.0}) for i in range(1, 6)]
    assert "no object is present" in verdict(cropless)[1]


def test_a_detector_that_misses_most_is_not_healthy() -> None:
    def verdict(fired: float, **others: float) -> tuple[bool | None, str]:
        counts = {"health/fired_per_image": fired, "health/true_per_image": 1.9}
        rows = [line(i, **{"loss/a": 1 / i, **counts}) for i in range(1, 5)]
        return health([*rows[:2], {**rows[2], **others}, rows[3], {**rows[3], "step": 5.0}], {"a": 1.0})

    few = "only 0.1 boxes an image fire where 1.9 are true: train longer (training.steps), or give what stands on this"
    assert verdict(0.1) == (
        False,
        f"look: {few} detector a lower --model.present-threshold | fired per image 0.1, true per image 1.9, gradient "
        "norm 1",
    )
    best = {"val/best_F1": 0.812, "val/best_presence": 0.32}
    assert (
        f"{few} detector a lower --model.present-threshold 0.32 (best F1 0.81) |" in verdict(0.1, **best)[1]
    )
    assert "threshold |" in verdict(0.1, **{**best, "val/best_presence": 0.7})[1]  # a higher one helps nobody
    assert not verdict(0.94)[0] and verdict(0.96)[0]
    assert "only 0 boxes" in verdict(0.0)[1] and "no object" not in verdict(0.0)[1]


def test_a_short_run_is_not_called_healthy() -> None:
    rows = [line(i, **{"loss/a": 1 / i, "loss": 1 / i}) for i in range(1, 6)]
    verdicts = [health(rows[:n], {"a": 1.0}) for n in range(1, 6)]
    assert [healthy for healthy, _ in verdicts] == [None] * 4 + [True]
    assert verdicts[2][1] == "too little to judge (3 of 5 lines of metrics): gradient norm 1"
    assert health([*rows[:2], line(3, grad_norm=0.0)], {"a": 1.0})[0] is False  # wrong in any line
    out = io.StringIO()
    display = Display(Console(file=out, width=200), steps=5, start=0)
    for row, verdict in zip(rows, verdicts, strict=True):
        display.row(int(row["step"]), row, 0.0, *verdict)
    told = [shown for shown in out.getvalue().splitlines() if shown.startswith("  ")]
    assert told == [f"  {verdicts[0][1]}", f"  {verdicts[4][1]}"]  # when the verdict changes


def latents(n: int = 10, **values: float) -> list[dict[str, float]]:
    """Lines of a run whose KLs and latents are as they should be, but for some values of the last five."""
    usual = {"loss/what": 2.0, "loss/depth": 1.5, "health/what_to_noise": 8.0, "health/depth_to_noise": 3.0}
    return [line(i, **{**usual, **(values if i > n - 5 else {})}) for i in range(1, n + 1)]


def test_health_tells_the_kl_and_latents_that_collapse_or_explode() -> None:
    def verdict(rows: list[dict[str, float]], image: float = 10.0) -> tuple[bool | None, str]:
        return health(rows, {"image": image, "what": 1.0, "depth": 1.0})

    healthy, text = verdict(latents())
    assert healthy
    assert "what KL 2, depth KL 1.5, gradient norm 1" in text
    for name in ("what", "depth"):
        column = f"health/{name}_to_noise"
        healthy, text = verdict(latents(**{column: 1.05}))
        assert not healthy
        assert f"z_{name} is hardly more than noise (1.05 times its sigma)" in text
        assert verdict(latents(**{column: 1.15}))[0]
        assert verdict(latents(**{column: 0.0}))[0]  # no objects: there is another word for that
        assert verdict(latents(**{column: 1.05})[:-1])[0]  # four lines
        column = f"loss/{name}"
        last = latents()
        last[-1][column] *= 20.5
        healthy, text = verdict(last)
        assert not healthy
        assert f"the {name} KL ({last[-1][column]:.4g}) is far above its usual" in text
        last[-1][column] *= 0.95
        assert verdict(last)[0]
    assert verdict(latents(**{"health/depth_to_noise": 1.0}), image=0.0)[0]  # nothing teaches it
    assert not verdict(latents(**{"health/what_to_noise": 1.0}), image=0.0)[0]


def test_plain_lines_outside_a_terminal() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=40), steps=375, start=0)
    display.step(200)
    display.row(200, line(200, loss=1.234), 80.0, True, "healthy: [x] 1")
    display.row(220, line(220), 70.0, True, "healthy: 2")
    display.row(240, line(240), 60.0, False, "look: 3")
    display.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 200/375  loss 1.234 (a 1)  lr 0.1  8.0 img/s  left 1m20s"
    assert lines[1] == "  healthy: [x] 1"
    assert [item[:8] for item in lines[2:]] == ["step 220", "step 240", "  look: "]


def test_bar_on_a_terminal_and_silence_of_other_processes() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=120), steps=10, start=2)
    display.step(3)
    display.row(4, line(4), 3.0, False, "look: here")
    display.say("a message")
    display.close()
    shown = out.getvalue()
    for part in ("a message", "4/10", "8.0 img/s  left 3s", "loss 1 (a 1)", "look: here"):
        assert part in shown
    silent = io.StringIO()
    display = Display(Console(file=silent), steps=10, start=0, active=False)
    display.say("no")
    display.row(4, line(4), 3.0, True, "healthy")
    assert silent.getvalue() == ""


def test_unknown_and_missing_trackers_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no tracker 'wandbb'; choose from tensorboard, wandb"):
        make_trackers(["wandbb"], tmp_path, 0, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=re.escape(how_to_install("track"))):
        make_trackers(["wandb"], tmp_path, 0, {})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=re.escape(how_to_install("track"))):
        make_trackers(["tensorboard"], tmp_path, 0, {})


class FakeWandB(types.ModuleType):
    """The three calls of wandb that are used."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[Any, ...]] = []

    def init(self, **settings: Any) -> FakeWandB:
        self.calls.append(("init", settings))
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append(("log", values, step))

    def Image(self, path: str) -> str:
        return f"image {path}"

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 4):
        with Recorder(
            tmp_path, 8, start, {"a": 1.0}, Console(quiet=True), track=["wandb"], config={"kind": "toy"}
        ) as recorder:
            recorder.row(line(start + 4), list(line(0)), 1.0)
            recorder.log_image(start + 4, tmp_path / "p.png")
    first, again = (call[1] for call in wandb.calls if call[0] == "init")
    assert first == again
    assert first["config"] == {"kind": "toy"}
    assert wandb.calls[1] == ("log", {name: value for name, value in line(4).items() if name != "step"}, 4)
    assert wandb.calls[2] == ("log", {"picture": f"image {tmp_path / 'p.png'}"}, 4)
    assert wandb.calls[3] == ("finish",)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [4, 8]


@pytest.mark.filterwarnings("default")  # of tensorboard's own imports
def test_tensorboard_gets_every_number_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    with Recorder(tmp_path, 8, 0, {"a": 1.0}, Console(quiet=True), track=["tensorboard"]) as recorder:
        recorder.row(line(4, loss=2.5), list(line(0)), 1.0)
        recorder.log_image(4, tmp_path / "p.png")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 2.5)]
    assert [event.step for event in events.Images("picture")] == [4]


def test_only_one_process_writes(tmp_path: Path) -> None:
    with Recorder(tmp_path, 8, 0, {}, Console(quiet=True), track=["tensorboard"], active=False) as recorder:
        recorder.row(line(4), list(line(0)), 1.0)
        recorder.sync()
    assert list(tmp_path.iterdir()) == []
