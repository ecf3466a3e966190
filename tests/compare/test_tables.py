"""The texts of a comparison: aligned Markdown, LaTeX with escapes, CSV."""

from __future__ import annotations

import csv
import io

from ssdir.compare import tables
from ssdir.compare.metrics import Figure, Group, Model, Row
from ssdir.compare.tables import DASH, Table, comma_separated, escaped, latex, markdown

ROWS = [Row("AP", "AP", "share", "higher"), Row("mse", "image_mse & more", "error", "lower")]


def table() -> Table:
    first = Model(
        "A|1", "runs/a", "space", 0, "g", False, {"AP": Figure(0.5, 0.25, 0.75), "mse": Figure(0.00012)}
    )
    second = Model(
        "B_2",
        "runs/b",
        "space",
        1,
        "g",
        False,
        {"AP": Figure(0.7, 0.6, 0.8), "mse": Figure(None, reason="50% of it")},
    )
    group = Group(
        "SPACE, 2 seeds",
        ("A|1", "B_2"),
        {"AP": Figure(0.6, 0.5, 0.7), "mse": Figure(None, reason="50% of it")},
    )
    return Table(ROWS, [first, second], [group], ["A note."])


def test_names_are_text() -> None:
    assert tables.marked("a|b [x](y) <b> `c` $d$ _e_ z_what\n") == (
        r"a\|b \[x\](y) \<b\> \`c\` \$d\$ \_e\_ z_what\\n"
    )
    assert escaped("$x^2$ \x07") == r"\$x\textasciicircum{}2\$ \textbackslash{}x07"


def test_markdown():
    assert markdown(table()) == (
        "|                    | A\\|1                 | B_2                  | SPACE, 2 seeds      |\n"
        "|--------------------|----------------------|----------------------|---------------------|\n"
        f"| AP ↑               | 0.500 [0.250, 0.750] | 0.700 [0.600, 0.800] | 0.600 (0.500{DASH}0.700) |\n"
        f"| image_mse & more ↓ | 0.000120             | {DASH}¹                   | {DASH}¹                  |\n"
        "\n"
        f"1. {DASH}: 50% of it\n"
        "\n"
        "A note.\n"
    )


def test_latex_is_escaped():
    lines = [line.strip() for line in latex(table(), "On 100% of A_B").splitlines()]
    assert r"\caption{On 100\% of A\_B}" in lines
    assert r"\begin{tabular}{lccc}" in lines
    assert r"& A|1 & B\_2 & SPACE, 2 seeds \\" in lines
    assert r"image\_mse \& more $\downarrow$ & 0.000120 & --$^{1}$ & --$^{1}$ \\" in lines
    assert r"AP $\uparrow$ & 0.500 [0.250, 0.750] & 0.700 [0.600, 0.800] & 0.600 (0.500--0.700) \\" in lines
    assert r"$^{1}$ 50\% of it." in lines


def test_csv_holds_values_intervals_and_reasons():
    lines = list(csv.DictReader(io.StringIO(comma_separated(table()))))
    assert [line["model"] for line in lines] == ["A|1", "B_2", "SPACE, 2 seeds"]
    assert [line["interval"] for line in lines] == ["95% over images"] * 2 + ["range over seeds"]
    assert (lines[0]["AP"], lines[0]["AP_low"], lines[0]["AP_high"], lines[0]["AP_reason"]) == (
        "0.5",
        "0.25",
        "0.75",
        "",
    )
    assert (lines[1]["mse"], lines[1]["mse_reason"], lines[1]["seed"]) == ("", "50% of it", "1")
    assert (lines[2]["run"], lines[2]["seed"]) == ("", "")
