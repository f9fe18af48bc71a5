"""Several runs in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssl_kernels import cli


def finished(folder: Path, **scores: Any) -> str:
    """A run that reported these figures, each a score beside that of pixels."""
    folder.mkdir()
    figures = [{"name": n, "model": m, "raw_pixels": raw, "note": "of noise"} for n, (m, raw) in scores.items()]
    (folder / "summary.json").write_text(json.dumps({"figures": figures, "steps": 3}))
    return str(folder)


def test_figures_of_all_runs_and_their_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for name, near in (("a", 0.75), ("b", 0.5), ("c", 0.6251)):
        finished(Path(name), near=(near, 0.25), far=(0.1, near / 2))
    assert cli.main(["compare", "a", "b", "c"]) == 0
    lines = [line.replace("│", " ").replace("┃", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "b", "c", "lowest", "to", "highest", "raw", "pixels"] in lines
    assert ["near", "0.750", "0.500", "0.625", "0.500", "to", "0.750", "0.250"] in lines
    assert ["far", "0.100", "0.100", "0.100", "0.100", "0.250", "to", "0.375"] in lines


def test_runs_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = finished(tmp_path / "one", near=(0.5, 0.1)), finished(tmp_path / "other", far=(0.5, 0.1))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "summary.json").write_text('{"figures": [')
    for folders, message in (
        ([], "compare: expected the folders of runs, got none"),
        ([one, str(tmp_path)], "summary.json: expected the folders of runs that were evaluated"),
        ([str(tmp_path / "cut")], "summary.json is not the summary of a run (JSONDecodeError)"),
        ([one, other], f"{other}: expected the figures of {one}, but 'far' is in one of them only"),
    ):
        assert cli.main(["compare", *folders]) == 2
        assert message in capsys.readouterr().err
