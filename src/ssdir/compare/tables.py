"""A comparison as Markdown, CSV and LaTeX. A missing value is a dash with its reason, never a zero."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ssdir.common.errors import printable
from ssdir.compare.metrics import Figure, Group, Model, Row

DASH = "\N{EN DASH}"
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


@dataclass(frozen=True)
class Table:
    """What is written: models and groups of seeds are columns, figures are rows."""

    rows: Sequence[Row]
    models: Sequence[Model]
    groups: Sequence[Group]
    notes: Sequence[str]
    """Sentences below the table."""

    def columns(self) -> list[tuple[str, dict[str, Figure], bool]]:
        """Name, figures, and whether they are means over seeds; each group follows its last member."""
        columns: list[tuple[str, dict[str, Figure], bool]] = []
        left = {group.name: set(group.members) for group in self.groups}
        for model in self.models:
            columns.append((model.name, model.figures, False))
            for group in self.groups:
                if model.name in left[group.name]:
                    left[group.name].remove(model.name)
                    if not left[group.name]:
                        columns.append((group.name, group.figures, True))
        return columns

    def reasons(self) -> list[str]:
        """Why there are dashes, in the order in which they first occur."""
        found = [figures[row.key].reason for row in self.rows for _, figures, _ in self.columns()]
        return list(dict.fromkeys(reason for reason in found if reason is not None))


def markdown(table: Table) -> str:
    """The table, what its dashes mean, and the notes; its columns are aligned, so that it reads as text too."""
    columns, reasons = table.columns(), table.reasons()
    lines = [["", *(marked(name) for name, _, _ in columns)]]
    for row in table.rows:
        cells = []
        for _, figures, over_seeds in columns:
            figure = figures[row.key]
            if figure.value is None:
                cells.append(DASH + str(reasons.index(str(figure.reason)) + 1).translate(_RAISED))
            else:
                cells.append(written(figure, row, over_seeds))
        arrow = {"higher": " ↑", "lower": " ↓", "": ""}[row.better]
        lines.append([marked(row.title) + arrow, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    below = [f"{number}. {DASH}: {marked(reason)}" for number, reason in enumerate(reasons, start=1)]
    parts = ["\n".join(rows), *(["\n".join(below)] if below else []), *map(marked, table.notes)]
    return "\n\n".join(parts) + "\n"


def latex(table: Table, caption: str, label: str = "tab:comparison") -> str:
    r"""A ``table`` for the package booktabs (``\usepackage{booktabs}``)."""
    columns, reasons = table.columns(), table.reasons()
    lines = [
        r"\begin{table}",
        r"  \centering\small",
        rf"  \caption{{{escaped(caption)}}}",
        rf"  \label{{{label}}}",
        rf"  \begin{{tabular}}{{l{'c' * len(columns)}}}",
        r"    \toprule",
        "    " + "".join(f" & {escaped(name)}" for name, _, _ in columns).strip() + r" \\",
        r"    \midrule",
    ]
    for row in table.rows:
        arrow = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "": ""}[row.better]
        cells = []
        for _, figures, over_seeds in columns:
            figure = figures[row.key]
            if figure.value is None:
                cells.append(f"--$^{{{reasons.index(str(figure.reason)) + 1}}}$")
            else:
                cells.append(escaped(written(figure, row, over_seeds)).replace(DASH, "--"))
        lines.append(f"    {escaped(row.title)}{arrow} & " + " & ".join(cells) + r" \\")
    lines += [r"    \bottomrule", r"  \end{tabular}"]
    below = [
        *(f"$^{{{number}}}$ {escaped(text)}." for number, text in enumerate(reasons, start=1)),
        *(escaped(note) for note in table.notes),
    ]
    lines += [r"  \par\smallskip\footnotesize", "  " + "\n  ".join(below)] if below else []
    return "\n".join([*lines, r"\end{table}", ""])


def comma_separated(table: Table) -> str:
    """One line a model or group of seeds; of each figure its value, its interval's ends, and the reason where there is
    none."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    parts = ("", "_low", "_high", "_reason")
    writer.writerow(
        [
            "model",
            "run",
            "kind",
            "seed",
            "interval",
            *(f"{row.key}{part}" for row in table.rows for part in parts),
        ]
    )
    about = {model.name: (model.run, model.kind, model.seed) for model in table.models}
    for name, figures, over_seeds in table.columns():
        run, kind, seed = ("", "", None) if over_seeds else about[name]
        line: list[object] = [name, run, kind, "" if seed is None else seed]
        line.append("range over seeds" if over_seeds else "95% over images")
        for row in table.rows:
            figure = figures[row.key]
            line += [
                "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
                for value in (figure.value, figure.low, figure.high, figure.reason)
            ]
        writer.writerow(line)
    return text.getvalue()


def written(figure: Figure, row: Row, over_seeds: bool) -> str:
    """A value with its interval: brackets for one over images, parentheses for a range over seeds.

    >>> row = Row("AP", "AP", "share")
    >>> written(Figure(0.5, 0.25, 0.75), row, False), written(Figure(0.5, 0.25, 0.75), row, True)
    ('0.500 [0.250, 0.750]', '0.500 (0.250–0.750)')
    """
    assert figure.value is not None
    digits = _digits(figure.value) if row.style == "error" else 0
    value, *ends = (
        "" if number is None else _number(number, row.style, digits)
        for number in (figure.value, figure.low, figure.high)
    )
    if figure.low is None or (over_seeds and figure.low == figure.high):
        return value
    return f"{value} ({ends[0]}{DASH}{ends[1]})" if over_seeds else f"{value} [{ends[0]}, {ends[1]}]"


def escaped(text: str) -> str:
    r"""Text as LaTeX takes it.

    >>> escaped("z_what: 5 % & {more}")
    'z\\_what: 5 \\% \\& \\{more\\}'
    """
    return "".join(_LATEX.get(letter, letter) for letter in printable(text))


def _number(value: int | float, style: str, digits: int) -> str:
    if style == "error":
        return f"{value:.{digits}f}"
    return {"share": f"{value:.3f}", "whole": f"{value:,.0f}", "tenth": f"{value:.1f}"}[style]


def _digits(value: int | float) -> int:
    """Decimal places that show three digits of an error, at least four and at most eight.

    >>> _digits(0.0135), _digits(0.000123)
    (4, 6)
    """
    places = 4
    while places < 8 and 0 < abs(value) < 10.0 ** (2 - places):
        places += 1
    return places


def marked(text: str) -> str:
    r"""Text as Markdown takes it: what could begin a link, a formula, emphasis or HTML has a backslash in front.

    >>> marked("z_what of $5 *x* |_a_")
    'z_what of \\$5 \\*x\\* \\|\\_a\\_'
    """
    return re.sub(r"[\\`*<>\[\]|$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text))
