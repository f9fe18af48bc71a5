"""The closing table and the summary."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ssl_kernels.trainers.evaluation import report
from ssl_kernels.trainers.evaluation.figures import PairFigure, print_pairs
from ssl_kernels.trainers.training import Result

RECORDS = [
    {"step": 1, "epoch": 0, "loss": 10.0, "loss_check": 2.0, "loss_reference": 2.0, "lr": 0.1, "elapsed_s": 0.1},
    {"step": 2, "epoch": 0, "loss": 1.5, "loss_check": 1.0, "loss_reference": 1.25, "lr": 0.2, "elapsed_s": 0.2},
]
RESULT = Result(records=RECORDS, steps=2, elapsed_s=61.4, peak_mb=512.3)
FIGURES = [
    PairFigure("text->image R@1", 0.5934, 0.448, 0.0025, note="all 393 held-out pairs"),
    PairFigure("zero-shot skin tone of five", 0.81, 0.25, 0.2, 0.235, "226 images"),
    PairFigure("without a baseline", 0.75, None, 0.5),
]


def printed(result: Result, figures: list[PairFigure]) -> list[list[str]]:
    out = io.StringIO()
    print_pairs(Console(file=out, width=130), "A title", result, figures, 75.6)
    lines = out.getvalue().splitlines()
    assert lines[0].strip() == "A title"
    return [
        [cell.strip() for cell in line.strip("\u2502\u2503").split("\u2502")] for line in lines if line[0] == "\u2502"
    ]


def test_the_closing_table_sets_each_figure_beside_its_baselines() -> None:
    rows = {row[0]: row[1:] for row in printed(RESULT, FIGURES)}
    assert rows["text->image R@1"] == ["0.593", "0.448", "0.003", "", "all 393 held-out pairs"]
    assert rows["zero-shot skin tone of five"] == ["0.810", "0.250", "0.200", "0.235", "226 images"]
    assert rows["without a baseline"] == ["0.750", "", "0.500", "", ""]
    assert rows["training loss"][0] == "10.00 -> 1.50"
    assert rows["same loss by the reference"][0] == "2.0e-01"
    assert rows["seconds"][0] == "61 / 76"
    assert rows["peak memory, MB"][0] == "512"


def test_a_table_without_baselines_explains_none() -> None:
    for figures, is_explained in ((FIGURES, True), (FIGURES[2:], False), ([], False)):
        out = io.StringIO()
        print_pairs(Console(file=out, width=130), "A title", RESULT, figures, 75.6)
        assert ("TF-IDF" in out.getvalue()) is is_explained


def test_the_closing_table_needs_neither_figures_nor_records() -> None:
    assert [row[0] for row in printed(Result(), [])] == ["seconds", "peak memory, MB"]


def test_the_summary_holds_what_the_table_shows(tmp_path: Path) -> None:
    report.write_summary(tmp_path / "summary.json", RESULT, FIGURES, 75.6)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [figure["model"] for figure in summary["figures"]] == [0.5934, 0.81, 0.75]
    assert (summary["loss_first"], summary["loss_last"], summary["total_s"]) == (10.0, 1.5, 75.6)
    assert summary["loss_difference"] == pytest.approx(0.2)


def test_the_difference_of_losses_is_the_largest_or_none() -> None:
    assert report.loss_difference(RESULT) == pytest.approx(0.2)
    assert report.loss_difference(Result(records=[{"step": 1, "loss": 1.0}])) is None
