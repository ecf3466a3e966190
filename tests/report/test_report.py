from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssdir.report.html import lookup, print_summary, write_report
from ssdir.report.text import describe

METRICS: dict[str, Any] = {
    "detection": {"AP": 0.7, "AP50": 0.93, "AP75": 0.8, "AR100": 0.77, "count_accuracy": 0.41, "class_aware": False},
    "reconstruction": {
        "image_mse": 0.012, "image_mse_black": 0.072, "object_mse": 0.02, "object_mse_true_box": 0.03,
    },
    "downstream": {
        "matched_accuracy": 0.85, "matched_macro_f1": 0.84, "matched_share": 0.9, "end_to_end_accuracy": 0.765,
        "chance": 0.1, "untrained": {"matched_accuracy": 0.35, "end_to_end_accuracy": 0.32}, "reason": None,
    },
    "seconds": {"inference_per_image": 0.0123, "rendering_per_image": 0.002, "evaluation": 30.0, "total": 400.0},
    "memory": {"peak_mib": 900.0},
    "counts": {"images": 600, "true_objects": 1000, "found_objects": 960, "matched_objects": 900},
    "provenance": {"split": "test", "categories": [str(i) for i in range(10)], "class_agnostic": True},
}  # fmt: skip

DETECTOR: dict[str, Any] = {
    **METRICS,
    "reconstruction": dict.fromkeys(METRICS["reconstruction"]),
    "downstream": {
        "matched_accuracy": None, "matched_share": 0.9, "untrained": None, "reason": "the model gives no z_what",
    },
}  # fmt: skip


def changed(**parts: dict[str, Any]) -> dict[str, Any]:
    return {**METRICS, **{name: {**METRICS[name], **values} for name, values in parts.items()}}


class Page(HTMLParser):
    """Collects tags, addresses and text; complains of tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "figures").mkdir()
    for name in ("scenes", "z_what"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "figures" / f"{name}.png")
    (tmp_path / "ssdir").mkdir()
    lines = ["step,loss,lr"] + [f"{i},{1 / (i + 1)},0.1" for i in range(5)]
    (tmp_path / "ssdir" / "metrics.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_report_stands_alone(out):
    path = write_report(out, METRICS, title="Scenes & <digits>")
    assert path == out / "report.html"
    text = path.read_text()
    page = Page(text)
    assert "Scenes & <digits>" in page.text  # escaped in the source
    assert len(page.addresses) == 3  # the two figures and the loss curves
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    embedded = base64.b64decode(page.addresses[0].split(",")[1])
    assert embedded == (out / "figures" / "scenes.png").read_bytes()
    assert "http" not in text and "<script" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_report_shows_every_measured_number(out):
    page = Page(write_report(out, METRICS).read_text())
    for number in (
        "0.930",
        "0.700",
        "0.410",
        "0.850",
        "0.765",
        "0.350",
        "0.012",
        "0.072",
        "900",
        "30.0 s",
        "400.0 s",
    ):
        assert number in page.text


def test_every_stage_has_its_time(out):
    seconds = {"train_detector": 11.0, "train_teacher": 22.0, "train_ssdir": 33.0}
    text = Page(write_report(out, changed(seconds=seconds)).read_text()).text
    places = [text.index(f"{name}{value:.1f} s") for name, value in (
        ("training the detector", 11), ("training the teacher", 22), ("training SSDIR", 33)
    )]  # fmt: skip
    assert places == sorted(places)


def test_curves_are_found_inside_and_beside(out):
    assert "Training" in Page(write_report(out, METRICS).read_text()).text
    (out / "evaluation" / "figures").mkdir(parents=True)
    (out / "metrics.csv").write_text((out / "ssdir" / "metrics.csv").read_text())
    write_report(out / "evaluation", METRICS)
    assert (out / "evaluation" / "figures" / f"curves_{out.name}.png").exists()
    (out / "bare").mkdir()
    assert "Training" not in Page(write_report(out / "bare", METRICS, curves={}).read_text()).text


def test_curves_that_cannot_be_drawn_cost_themselves_only(out):
    (out / "ssdir" / "metrics.csv").write_bytes(b"step,loss\n1,\xff\n")
    with pytest.warns(UserWarning, match=r"^the figure \S+/figures/curves_ssdir\.png is left out: "):
        page = Page(write_report(out, METRICS).read_text())
    assert "Training" not in page.text and len(page.addresses) == 2  # the figures of the evaluation


def test_words_say_what_was_measured():
    findings = describe(METRICS)
    words = " ".join(findings.summary)
    assert "On 600 test images with 1,000 digits in all, the model finds 90 of 100 digits" in words
    assert "6 of 100 boxes it draws match no true one" in words
    assert "AP50" in words and "0.930 of at most 1: good" in words
    assert "learned without any class label" in words
    assert "the digit of 85 of 100 found digits (chance: 10%)" in words
    assert "76 of 100 digits are both found and read right" in words
    assert "an untrained encoder give 35% of the found: learning adds 50 points" in words
    assert "0.0120" in words and "6.0 times as much" in words
    assert ("found and read right", "76.5%") in findings.tiles


@pytest.mark.parametrize(
    ("metrics", "expected", "forbidden"),
    [
        (changed(detection={"AP50": 0.04}), "poor: it has not learned to find objects", "good"),
        (changed(detection={"AP50": 0.97}), "nearly perfect", "poor"),
        (
            changed(downstream={"untrained": {"matched_accuracy": 0.9}}),
            "learning has added nothing",
            "learning adds",
        ),
        (changed(downstream={"untrained": None}), "85 of 100", "untrained"),
        (changed(reconstruction={"image_mse": 0.08}), "no better than leaving it black", "times as much"),
        (
            changed(counts={"matched_objects": 0, "found_objects": 0}),
            "finds none of the digits",
            "false alarm",
        ),
        (changed(counts={"matched_objects": 1000, "found_objects": 1000}), "finds all digits", "finds 100"),
        (changed(counts={"true_objects": 0, "found_objects": 3}), "marked 3 places all the same", "AP50"),
        (changed(provenance={"categories": ["cat"], "class_agnostic": False}), "objects", "digit"),
        (DETECTOR, "was not measured: the model gives no z_what", "Rendered"),
        ({}, "", "None"),
    ],
)
def test_words_fit_the_numbers(metrics, expected, forbidden):
    words = " ".join(describe(metrics).summary)
    assert expected in words
    assert forbidden not in words
    assert not re.search(r"\bnan\b|\{|\}", words)


def test_a_detectors_report_has_no_empty_entries(tmp_path):
    page = Page(write_report(tmp_path, DETECTOR).read_text())
    assert "AP50" in page.text
    assert "None" not in page.text and "image MSE" not in page.text
    assert "weights came with the package" not in page.text
    assert (
        "weights came with the package"
        in Page(write_report(tmp_path, METRICS, pretrained=True).read_text()).text
    )


def test_summary_prints_the_table(capsys):
    print_summary(METRICS)
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"AP50\s+0\.930\s*", line) for line in lines)
    assert any(re.fullmatch(r"end-to-end accuracy\s+0\.765\s*", line) for line in lines)
    print_summary(DETECTOR)
    assert "no probe: the model gives no z_what" in capsys.readouterr().out


def test_lookup_of_absent_parts():
    assert lookup({"downstream": {"untrained": None}}, "downstream.untrained.matched_accuracy") is None
    assert lookup(METRICS, "downstream.untrained.matched_accuracy") == 0.35
