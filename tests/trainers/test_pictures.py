"""The pictures of a run, and the fonts of their captions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_kernels.trainers.data.pairs import ImageTextPairs
from ssl_kernels.trainers.evaluation import curves, drawing, fonts, retrieval
from ssl_kernels.trainers.evaluation.figures import PairFigure
from ssl_kernels.trainers.use.items import Item
from ssl_kernels.trainers.use.sheet import Cell, draw_sheet

pytestmark = pytest.mark.usefixtures("drawn_pictures")
GREEN = (44, 160, 44)
CHINESE, ARABIC, HINDI, EMOJI = (
    "\u7ea2\u8272\u7684\u5706\u5708",
    "\u062f\u0627\u0626\u0631\u0629",
    "\u0932\u093e\u0932",
    "\U0001f469\U0001f3fd\u200d\U0001f680",
)
JAPANESE, KOREAN, THAI = "\u8d64\u3044\u4e38", "\ube68\uac04", "\u0e41\u0e14\u0e07"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is drawn, besides the files."""
    seen: list[Any] = []

    def save(figure: Any, path: Path) -> None:
        seen.append(figure)
        drawing.save(figure, path)

    for module in (curves, retrieval):
        monkeypatch.setattr(module, "save", save)
    return seen


def pairs(captions: list[str], **options: Any) -> ImageTextPairs:
    return ImageTextPairs(torch.full((len(captions), 3, 16, 16), 200, dtype=torch.uint8), captions, **options)


def texts(figure: Any) -> list[tuple[str, str]]:
    """What is written into the only axes of a picture, and in which colour."""
    (axis,) = figure.axes
    return [(text.get_text(), text.get_color()) for text in axis.texts]


def count(path: Path, colour: tuple[int, int, int]) -> int:
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB")).astype(int)
    return int((abs(pixels - np.array(colour)).sum(-1) < 30).sum())


@pytest.mark.parametrize("right", [True, False])
def test_the_right_image_is_framed_in_green(tmp_path: Path, right: bool) -> None:
    similarity = torch.eye(8) if right else -torch.eye(8)
    of = pairs([f"caption {i}" for i in range(8)], subsets=["novel concepts"] * 8)
    retrieval.plot_retrieval(tmp_path / "retrieval.png", of, similarity, 16, top=3, rows=4)
    assert (count(tmp_path / "retrieval.png", GREEN) > 500) == right


def test_a_retrieval_sheet_names_its_ranks_both_ways(tmp_path: Path, figures: list[Any]) -> None:
    """The second caption finds its image third and its image finds it first; the fourth, its image last."""
    similarity = torch.tensor([[9.0, 0, 1, 2], [4, 3, 5, 2], [0, 1, 9, 2], [4, 2, 6, 1]])  # caption by image
    of = pairs(["a sun", "a moon of $x$", "two stars", "a sun"])
    of.captions[3] = "a cloud"
    remark = retrieval.plot_retrieval(
        tmp_path / "retrieval.png", of, similarity, 16, "by someone", top=2, title="runs/a: SigLIP on b"
    )
    assert remark == ""
    written = texts(figures[0])
    words = [text for text, _ in written]
    assert words[0] == "runs/a: SigLIP on b"
    assert {"rank 1", "rank 2", "right image", "right caption", "captions of ranks 1 to 3"} <= set(words)
    assert "rank 3" not in words  # two images are shown
    assert [text for text in words if text.endswith("of 4")] == [
        *("rank 1\nof 4", "rank 1\nof 4"), *("rank 3\nof 4", "rank 1\nof 4"),
        *("rank 1\nof 4", "rank 1\nof 4"), *("rank 4\nof 4", "rank 4\nof 4"),
    ]  # fmt: skip
    assert ("a moon of $x$", "tab:green") in written  # its image finds it first
    assert {colour for text, colour in written if text == "a cloud"} == {"black"}  # it never finds its own
    assert "Green: the image that belongs to the caption" in words[-1]
    assert words[-1].endswith("by someone")


def test_captions_that_are_the_same_are_all_right(tmp_path: Path, figures: list[Any]) -> None:
    similarity = torch.tensor([[1.0, 2, 0], [1, 2, 0], [0, 0, 1]])
    retrieval.plot_retrieval(tmp_path / "retrieval.png", pairs(["dog", "dog", "cat"]), similarity, 16)
    assert "rank 2\nof 3" not in [text for text, _ in texts(figures[0])]


def test_a_model_that_tells_nothing_gives_no_rank(tmp_path: Path, figures: list[Any]) -> None:
    retrieval.plot_retrieval(tmp_path / "retrieval.png", pairs(["a", "b"]), torch.full((2, 2), torch.nan), 16)
    assert [text for text, _ in texts(figures[0])].count("no rank") == 4


def records(losses: list[float]) -> list[dict[str, Any]]:
    return [
        {"step": step, "epoch": 0, "loss": loss, "lr": 0.1, "grad_norm": None if step == 2 else 1.0, "elapsed_s": 1.0,
         "loss_check": loss, "loss_reference": loss} | ({"knn": 0.5} if step == 3 else {})
        for step, loss in enumerate(losses, 1)
    ]  # fmt: skip


def test_curves_show_every_metric_and_the_figures_beside_their_baselines(tmp_path: Path, figures: list[Any]) -> None:
    scores = [PairFigure("text->image R@1", 0.6, 0.45, 0.1), PairFigure("no baseline", 0.7, None, 0.2)]
    losses = [80.0, *(2.0 + 1 / step for step in range(1, 40))]
    assert curves.plot_curves(tmp_path / "curves.png", records(losses), "runs/a: DINO", scores) == ""
    figure = figures[0]
    assert figure.get_suptitle() == "runs/a: DINO"
    *panels, below = figure.axes
    assert [axis.get_ylabel() for axis in panels] == ["loss", "learning rate", "norm of the gradient", "knn"]
    assert {axis.get_xlabel() for axis in panels} == {"step"}
    raw, mean = panels[0].lines
    assert (raw.get_label(), mean.get_label()) == ("each step", "running mean")
    assert raw.get_ydata().tolist() == losses
    assert panels[0].get_ylim()[1] < 4  # not the 80 of the first step, which the legend tells
    assert panels[0].get_legend().get_title().get_text() == "80 at step 1"
    assert len(panels[2].lines[0].get_xdata()) == 39  # what is not known is left out
    assert [label.get_text() for label in below.get_yticklabels()] == ["text->image R@1", "no baseline"]
    points = {series.get_label(): series.get_offsets().tolist() for series in below.collections}
    assert points["model"] == [[0.6, 0.0], [0.7, 1.0]]
    assert points["baseline"] == [[0.45, 0.0]]
    assert points["chance"] == [[0.1, 0.0], [0.2, 1.0]]
    assert count(tmp_path / "curves.png", (31, 119, 180)) > 300


def test_the_mean_is_of_a_twentieth_of_the_values() -> None:
    assert curves.running_mean([3.0, 1.0]) == [3.0, 1.0]
    mean = curves.running_mean(list(range(80)))
    assert (mean[0], mean[1], mean[40], mean[79]) == (1.0, 1.5, 40.0, 78.0)


@pytest.mark.parametrize("shift", [0.0, -10.0])
def test_the_axis_of_the_loss_leaves_out_spikes_alone(shift: float) -> None:
    values = [50.0, *(3 + shift - step / 100 for step in range(199))]
    values[100] = 1000.0
    low, high = curves.loss_limits(values)
    assert low < 1.02 + shift < low + 0.2
    assert 2.8 + shift < high < 3.2 + shift
    low, high = curves.loss_limits([2.0])
    assert low < 2.0 < high


def test_every_script_has_a_font(tmp_path: Path, figures: list[Any]) -> None:
    """Without a word of matplotlib on glyphs that are missing."""
    of = pairs([CHINESE, ARABIC, HINDI, EMOJI, KOREAN, THAI])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remark = retrieval.plot_retrieval(tmp_path / "retrieval.png", of, torch.eye(6), 16, title=f"runs/{CHINESE}")
    assert remark == ""
    assert {of.captions[i] for i in range(6)} <= {text for text, _ in texts(figures[0])}


def test_chinese_characters_are_those_of_the_language_around_them() -> None:
    assert fonts.fonts_for([CHINESE]).families == ["DejaVu Sans", "Noto Sans CJK SC"]
    assert fonts.fonts_for([JAPANESE]).families == ["DejaVu Sans", "Noto Sans CJK JP"]
    assert fonts.fonts_for(["caf\u00e9 \u03a9"]).families == ["DejaVu Sans"]


def test_without_a_font_one_line_names_the_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Any]
) -> None:
    monkeypatch.setattr(fonts, "_others", lambda: iter(()))
    of = pairs([f"red {CHINESE} {HINDI}", "a\x07b", "\u2764\ufe0f", EMOJI[2:]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remark = retrieval.plot_retrieval(tmp_path / "retrieval.png", of, torch.eye(4), 16)
    assert remark == (
        "Devanagari, Han, symbol letters are left out (no installed font has them; pip install manimgx-fonts"
        " noto-cjk-sans-otc)"
    )
    words = [text for text, _ in texts(figures[0])]
    assert "red [Han] [Devanagari]" in words
    assert "a b" in words


def test_letters_that_this_matplotlib_cannot_join_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "shapes_text", lambda: False)
    found = fonts.fonts_for([CHINESE, ARABIC, HINDI, KOREAN])
    assert found.drawable(f"{CHINESE} {ARABIC} {HINDI} {KOREAN}") == f"{CHINESE} [Arabic] [Devanagari] {KOREAN}"
    assert "Arabic, Devanagari letters are left out (matplotlib 3.11" in found.remark()


def test_a_broken_font_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    every = list(fonts._others())
    monkeypatch.setattr(fonts, "_others", lambda: iter([str(tmp_path / "broken.ttf"), *every]))
    assert fonts.fonts_for([CHINESE]).missing == set()


def test_captions_are_wrapped_by_what_they_take_up() -> None:
    assert drawing.wrap("one two three", 8, 3) == "one two\nthree"
    assert drawing.wrap("one two three four", 8, 1) == "one two\u2026"
    assert drawing.wrap(CHINESE * 2, 8, 9).splitlines() == [(CHINESE * 2)[:4], (CHINESE * 2)[4:8], (CHINESE * 2)[8:]]


def test_a_contact_sheet_has_titles_and_names_in_any_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    cells = [Cell(Item(name, image), "0.9") for name in (CHINESE, "costs $1 or $2")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_sheet(tmp_path / "sheet.png", f'"{ARABIC}"', cells) == ""
        monkeypatch.setattr(fonts, "_others", lambda: iter(()))
        assert "Han letters are left out" in draw_sheet(tmp_path / "sheet.pdf", "a run", cells)
    assert (tmp_path / "sheet.pdf").read_bytes().startswith(b"%PDF")


def test_a_byte_of_a_file_name_that_is_no_text_is_drawn_as_such() -> None:
    assert fonts.fonts_for(["runs/\udcff"]).drawable("runs/\udcff\x00") == "runs/\ufffd "
