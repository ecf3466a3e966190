"""``report.html``: one file with the figures, the numbers, and what they mean in plain words."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssdir.common.console import rich_console
from ssdir.common.errors import printable
from ssdir.common.storage import atomic_write
from ssdir.plots.gallery import draw_loss_curves
from ssdir.plots.style import left_out_if_it_fails
from ssdir.report.text import Findings, describe
from ssdir.training.tracking import read_metrics

Metrics = Mapping[str, Any]

_ROWS: tuple[tuple[str, str, str], ...] = (
    ("detection.AP50", "AP50", "average precision of the boxes; a box is right at IoU 0.5 with a true one"),
    ("detection.AP", "AP", "the same, mean over stricter and stricter overlaps (IoU 0.50 to 0.95)"),
    ("detection.AP75", "AP75", "the same at IoU 0.75"),
    ("detection.AR100", "AR100", "share of true boxes found by up to 100 boxes an image, mean over IoU 0.50 to 0.95"),
    ("detection.count_accuracy", "count accuracy", "images in which exactly the right number was found"),
    ("detection.without_nms.AP50", "AP50 without NMS", "the model's boxes as they are, duplicates and all"),
    ("detection.without_nms.count_accuracy", "count accuracy without NMS", "likewise"),
    ("downstream.matched_share", "matched share", "true objects that were found (one-to-one, IoU at least 0.5)"),
    ("downstream.matched_accuracy", "matched accuracy", "found objects whose class a linear probe reads from z_what"),
    ("downstream.matched_macro_f1", "matched macro F1", "the same, every class counting alike"),
    ("downstream.end_to_end_accuracy", "end-to-end accuracy", "of all true objects, those found and read right"),
    ("downstream.chance", "chance", "accuracy of always naming the most frequent class"),
    ("downstream.what_where.matched_accuracy", "matched accuracy, with box", "the probe on z_what with the box added"),
    ("downstream.untrained.matched_accuracy", "untrained: matched", "the probe with an untrained what encoder"),
    ("downstream.untrained.end_to_end_accuracy", "untrained: end to end", "likewise, of all true objects"),
    ("reconstruction.image_mse", "image MSE", "mean squared error of the rendered image at 128 px, values in [0, 1]"),
    ("reconstruction.image_mse_black", "image MSE of black", "what an image left black would score"),
    ("reconstruction.object_mse", "object MSE", "decoded patch against the image inside its own box, at 64 px"),
    ("reconstruction.object_mse_true_box", "object MSE, true box", "likewise, against the image inside the true box"),
    ("segmentation.ari_fg", "ARI-FG", "agreement of true and found segments on true objects' pixels; 0 is chance"),
    ("segmentation.miou", "mIoU of objects", "IoU of true objects with segments matched one to one"),
    ("segmentation.miou_with_background", "mIoU with background", "likewise, the background and surplus counting too"),
    ("segmentation.mbo", "mBO", "best IoU of each true object with any segment"),
    ("segmentation.amodal_miou", "mIoU of whole objects", "opacity against masks of whole objects, hidden parts too"),
    ("depth_order.share", "depth order", "overlapping pairs of found objects of which the nearer one is told"),
    ("depth_order.pairs", "pairs judged", "of the depth order"),
    ("seconds.inference_per_image", "seconds an image", "from image to boxes, vectors and patches"),
    ("seconds.rendering_per_image", "seconds to render", "from objects to an image of 128 px"),
    ("memory.peak_mib", "peak memory, MiB", "of finding and rendering the objects of a batch (docs/evaluation.md)"),
)  # fmt: skip

_ATTRIBUTE_ROWS: tuple[tuple[str, str, str], ...] = (
    ("matched_accuracy", "matched accuracy", "found objects whose {} the probe reads from z_what"),
    ("matched_macro_f1", "matched macro F1", "the same, every {} counting alike"),
    (
        "end_to_end_accuracy",
        "end-to-end accuracy",
        "of all true objects, those found and their {} read right",
    ),
    ("chance", "chance", "accuracy of always naming the most frequent {}"),
    (
        "what_where.matched_accuracy",
        "matched accuracy, with box",
        "{} read from z_what with the box added",
    ),
)
"""Of every attribute, where there are several; the braces stand for its name."""

_FIGURES: tuple[tuple[str, str], ...] = (
    ("scenes", "Scenes"),
    ("traversals", "What the directions of z_what mean"),
    ("z_what", "A map of the vectors"),
    ("precision_recall", "Precision and recall"),
)


def write_report(
    out: Path,
    metrics: Metrics,
    title: str = "Evaluation",
    pretrained: bool = False,
    curves: Mapping[str, Path] | None = None,
) -> Path:
    """Write ``out/report.html`` from the metrics and the figures in ``out/figures``.

    The file stands alone: figures are embedded, styles are inline, nothing is fetched from anywhere. What it says
    depends on the measured numbers.

    Args:
        out: folder of an evaluation.
        metrics: what :func:`ssdir.evaluation.protocol.evaluate` returns, perhaps with more entries under ``seconds``.
        title: of the page.
        pretrained: the weights came with the package; nothing was trained here.
        curves: name -> ``metrics.csv`` of each training run to draw; None looks for those in the folders of
            ``out`` and, where there are none, beside it (an evaluation inside a run folder).

    Returns:
        The report.
    """
    figures = out / "figures"
    for name, path in (_find_curves(out) if curves is None else curves).items():
        curve = figures / f"curves_{name}.png"
        with left_out_if_it_fails(curve):
            draw_loss_curves(read_metrics(path), curve, name)
    findings = describe(metrics, pretrained)
    page = _page(title, findings, metrics, figures)
    atomic_write(out / "report.html", page)
    return out / "report.html"


def print_summary(metrics: Metrics) -> None:
    """Print the main figures as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("measured")
    table.add_column("value", justify="right")
    for key, name, _ in _ROWS:
        if (value := lookup(metrics, key)) is not None:
            table.add_row(_titled(key, name, metrics), _number(value))
    for _, name, value, _ in attribute_rows(metrics):
        table.add_row(escape(printable(name)), _number(value))
    seconds = metrics.get("seconds", {})
    if "total" in seconds:
        table.add_row("seconds in total", _number(seconds["total"]))
    console = rich_console()
    console.print(table)
    if reason := lookup(metrics, "downstream.reason"):
        console.print(f"no probe: {printable(str(reason))}", markup=False, highlight=False)


def lookup(metrics: Metrics, key: str) -> Any:
    """The entry at a dotted key, or None.

    >>> lookup({"detection": {"AP": 0.5}}, "detection.AP"), lookup({}, "detection.AP")
    (0.5, None)
    """
    value: Any = metrics
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def attribute_rows(metrics: Metrics) -> Iterator[tuple[str, str, float, str]]:
    """Attribute, name, value and meaning of each figure of every attribute, where objects have several.

    >>> rows = attribute_rows({"downstream": {"attributes": {"color": {"chance": 0.125}}}})
    >>> list(rows)
    [('color', 'color: chance', 0.125, 'accuracy of always naming the most frequent color')]
    """
    for attribute, scores in (lookup(metrics, "downstream.attributes") or {}).items():
        for key, name, meaning in _ATTRIBUTE_ROWS:
            if (value := lookup(scores, key)) is not None:
                yield attribute, f"{attribute}: {name}", value, meaning.format(attribute)


def _text(value: str) -> str:
    """Text as HTML shows it."""
    return html.escape(printable(value))


def _find_curves(out: Path) -> dict[str, Path]:
    inside = {path.parent.name: path for path in sorted(out.glob("*/metrics.csv"))}
    beside = out.resolve().parent / "metrics.csv"
    return inside or ({out.resolve().parent.name: beside} if beside.is_file() else {})


def _page(title: str, findings: Findings, metrics: Metrics, figures: Path) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(name)}</span></div>'
        for name, value in findings.tiles
    )
    sections = [
        _section(name, heading, findings.captions[name], [figures / f"{name}.png"])
        for name, heading in _FIGURES
        if (figures / f"{name}.png").is_file()
    ]
    if curves := sorted(figures.glob("curves_*.png")):
        sections.append(_section("curves", "Training", findings.captions["curves"], curves))
    return _TEMPLATE.format(
        title=_text(title),
        style=_STYLE,
        summary="".join(f"<p>{_text(text)}</p>" for text in findings.summary),
        tiles=tiles,
        sections="".join(sections),
        table=_table(metrics),
        times=_times(metrics.get("seconds", {})),
        provenance=_definitions(metrics.get("provenance", {})),
    )


def _section(name: str, heading: str, text: str, pictures: Sequence[Path]) -> str:
    shown = "".join(
        f'<img alt="{_text(heading)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    )
    words = f"<h2>{_text(heading)}</h2><p>{_text(text)}</p>"
    return f'<section>{words}<figure class="{name}">{shown}</figure></section>'


def _table(metrics: Metrics) -> str:
    rows = []
    for key, name, meaning in _ROWS:
        value = lookup(metrics, key)
        if value is not None:
            title = _text(_titled(key, name, metrics))
            rows.append(f"<tr><th>{title}</th><td>{_number(value)}</td><td>{_text(meaning)}</td></tr>")
    for _, name, value, meaning in attribute_rows(metrics):
        rows.append(f"<tr><th>{_text(name)}</th><td>{_number(value)}</td><td>{_text(meaning)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _times(seconds: Mapping[str, float | None]) -> str:
    names = {
        "generate": "making the scenes",
        "train_detector": "training the detector",
        "train_teacher": "training the teacher",
        "train_ssdir": "training SSDIR",
        "test_pass": "pass over the test images",
        "probe": "probe and untrained control",
        "figures": "figures",
        "evaluation": "evaluation as a whole",
        "total": "everything",
    }
    rows = [
        f"<tr><th>{text}</th><td>{seconds[name]:,.1f} s</td></tr>"
        for name, text in names.items()
        if seconds.get(name) is not None
    ]
    return f"<table>{''.join(rows)}</table>"


def _definitions(values: Mapping[str, Any]) -> str:
    rows = []
    for name, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        rows.append(f"<dt>{_text(name.replace('_', ' '))}</dt><dd>{_text(text)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _titled(key: str, name: str, metrics: Metrics) -> str:
    """A figure's name, which says where boxes stand for masks."""
    by_boxes = key.startswith("segmentation.") and lookup(metrics, "segmentation.masks") == "boxes"
    return f"{name}, boxes for masks" if by_boxes else name


def _number(value: int | float) -> str:
    """Three digits that matter; counts as they are.

    >>> _number(0.93456), _number(0.00123), _number(812.3), _number(12)
    ('0.935', '0.00123', '812', '12')
    """
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{summary}
<div class="tiles">{tiles}</div>
{sections}
<section><h2>All figures</h2>
<div class="wide">{table}</div></section>
<section><h2>Time</h2>
<div class="wide">{times}</div></section>
<section><h2>Where it comes from</h2>
{provenance}</section>
</main>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1c2024; --muted: #626a73; --paper: #fbfbfa; --card: #ffffff; --line: #e2e4e6; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e9ea; --muted: #9ba3ab; --paper: #15181b; --card: #1d2125; --line: #30363c; --accent: #6cb8ea; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .4rem; }
p { max-width: 46rem; margin: 0 0 .8rem; }
section { margin-top: 2.6rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; margin: 1.4rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.2; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .85rem; line-height: 1.3; display: block; }
figure { margin: .8rem 0 0; display: grid; gap: .8rem; }
figure img { background: #fff; border: 1px solid var(--line); border-radius: .6rem; padding: .6rem; max-width: 100%;
  height: auto; max-height: 42rem; justify-self: start; }
figure.precision_recall img { max-height: 24rem; }
figure.z_what img { max-height: 34rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td:nth-child(2) { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:nth-child(3) { color: var(--muted); min-width: 14rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .88rem; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
"""
