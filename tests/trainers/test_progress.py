"""How far an evaluation has come."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import patchworks
from rich.console import Console
from torch import Tensor

from ssl_kernels.trainers.data.image_sets import Images, read_folder
from ssl_kernels.trainers.data.images import open_image
from ssl_kernels.trainers.data.views import DrawingView, PhotoView
from ssl_kernels.trainers.evaluation import probes, progress
from ssl_kernels.trainers.evaluation.progress import Stages


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_is_told_every_few_seconds(clock: list[float]) -> None:
    out = io.StringIO()
    with Stages(Console(file=out)) as stages:
        stages.plan(3)
        for seconds, what in ((0.0, "one"), (1.0, "two"), (6.0, "three")):
            clock[0] = seconds
            stages.begin(what)
    assert out.getvalue().splitlines() == ["evaluating: one (1 of 3)", "evaluating: three (3 of 3)"]


def test_on_a_terminal_a_bar_is_shown_and_then_taken_away() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with Stages(console) as stages:
        stages.plan(2)
        stages.begin("probing")
        stages.begin("drawing")
        stages.progress.refresh()
        assert "evaluating: drawing" in out.getvalue()
        assert "1/2" in out.getvalue()
    assert stages.progress.finished is False
    assert not stages.progress.live.is_started


def test_without_a_console_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Stages() as stages:
        stages.begin("anything")
    with Stages(Console(quiet=True)) as stages:
        stages.begin("anything")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("labelled", [True, False])
def test_as_many_stages_come_as_were_planned(labelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(Stages, "begin", lambda self, what: begun.append(what))
    monkeypatch.setattr(probes, "_BATCH", 8)

    def images(n: int) -> Images:
        pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
        return Images(pixels, torch.arange(n) % 2 if labelled else None)

    def encode(images: Tensor) -> Tensor:
        return images.flatten(1).float()

    stages, view = Stages(), DrawingView(degrees=5, scale=1.1, shift=0.1, shear=0.0)
    probes.report_card(encode, encode, images(20), images(10), view, 8, 0, stages=stages)
    assert len(begun) == stages.total
    assert ("linear probe, raw pixels and copies" in begun) == labelled
    assert begun.count("features") == (3 if labelled else 2)


def test_photographs_are_opened_once_for_all_of_their_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the copies are those that would be drawn one after the other."""
    opened, begun = [], []
    monkeypatch.setattr(probes, "open_image", lambda path, *_: opened.append(path) or open_image(path))
    monkeypatch.setattr(Stages, "begin", lambda self, what: begun.append(what))
    monkeypatch.setattr(probes, "_FILES", 4)
    images, view = read_folder(patchworks(tmp_path, 12)), PhotoView()

    def pixels(images: Tensor) -> Tensor:
        return images.flatten(1).float()

    copies = probes._copies_of_files(view, images, 8, np.random.default_rng(3), pixels, Stages())
    rng = np.random.default_rng(3)
    for copy in copies:
        drawn = [pixels(view(images, range(start, start + 5), 8, rng)) for start in (0, 5)]
        assert torch.equal(copy, torch.cat([*drawn, pixels(view(images, range(10, 12), 8, rng))]))
    assert sorted(opened) == sorted(images.images)
    del begun[:]
    stages = Stages()
    probes.report_card(pixels, pixels, images, images.select(range(6)), view, 8, 0, stages=stages)
    assert len(begun) == stages.total
