"""The style of all plots, and how they are saved."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdir.common.errors import printable
from ssdir.common.extras import how_to_install
from ssdir.common.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
"""Okabe and Ito's colours, told apart with any kind of colour vision."""
INK, MUTED, GRID = "#1a1a1a", "#6b6b6b", "#e3e3e3"
TEXT_WIDTH = 6.75
"""Width of a full-width figure, in inches."""
DOTS_PER_INCH = 300

_SETTINGS: Any = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.color": INK,
    "figure.facecolor": "white",
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


def literal(name: str) -> str:
    r"""A name as matplotlib draws it letter by letter: dollars begin no formula.

    >>> literal("$x_1$")
    '\\$x_1\\$'
    """
    return printable(name, keep="\n").replace("$", r"\$")


@contextmanager
def style() -> Iterator[None]:
    """The package's look, inside the ``with`` block only.

    Raises:
        ModuleNotFoundError: without matplotlib (extra ``eval``).
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"figures need matplotlib: {how_to_install('eval')}", name=error.name
        ) from error
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that no global state knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH)


def save(figure: Figure, path: Path, pdf: bool = False) -> Path:
    """Write ``path`` (PNG, 300 dpi) and, if asked for, a PDF beside it; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        for suffix in ("png", "pdf") if pdf else ("png",):
            stamp = {"Software": None} if suffix == "png" else {"CreationDate": None}
            file = io.BytesIO()
            figure.savefig(
                file, format=suffix, dpi=DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.04, metadata=stamp
            )
            atomic_write(path.with_suffix(f".{suffix}"), file.getvalue())
    return path


@contextmanager
def left_out_if_it_fails(path: Path) -> Iterator[None]:
    """A figure that cannot be drawn, or written to ``path``, costs itself only: a warning in one line.

    An older figure at ``path`` is removed then, which nobody should take for the new one.

    Raises:
        ModuleNotFoundError: without matplotlib, which costs every figure.
    """
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"the figure {path} is left out: {reason}", stacklevel=3)


def bare(axes: Axes) -> None:
    """No ticks and no frame: for pictures."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
