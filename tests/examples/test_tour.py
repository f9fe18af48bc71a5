"""The tour of the documentation runs, at a size that takes seconds, and what it shows holds."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def tour_page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(DOCS)
    import tour_page

    return tour_page


def pictures_of(page: str) -> set[str]:
    return set(re.findall(r"\]\((tour/\S+)\)", page))


def test_tour(tour_page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import emoji

    from ssl_kernels.trainers.data import openmoji
    from ssl_kernels.trainers.evaluation import retrieval

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOUR_TINY", "1")
    # Some fifty emoji, which twelve steps see several times each; to draw more takes seconds, as does the sheet.
    monkeypatch.setattr(emoji, "EMOJI_DATA", dict(itertools.islice(emoji.EMOJI_DATA.items(), 0, None, 80)))
    monkeypatch.setattr(openmoji, "render", openmoji.render.__wrapped__)
    monkeypatch.setattr(retrieval, "plot_retrieval", lambda path, *_: path.touch())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        page, names = tour_page.page(tour_page.SOURCE.read_text())
    finally:
        torch.set_num_threads(threads)

    for name in ("SigLIP", "CLIP", "MoCo", "DINO"):
        fused, reference = ([step["loss"] for step in names[run][name].records] for run in ("fused", "reference"))
        assert sum(fused[-3:]) / 3 < 0.97 * fused[0], name
        assert fused[0] == pytest.approx(reference[0], rel=1e-5), name
        assert fused[: len(reference)] == pytest.approx(reference, rel=1e-2), name
    runs = names["runs"]
    assert runs["DINO"].said == []
    assert ["every sample's is the same" in text for text in runs["without a centre"].said] == [True]
    assert ["every sample's is uniform" in text for text in runs["without sharpening"].said] == [True]
    assert names["peak_mb"](512, "auto") < 0.6 * names["peak_mb"](512, "reference")
    assert {str(path.relative_to(tmp_path)) for path in (tmp_path / "tour").iterdir()} == pictures_of(page)


def test_page_is_of_this_source(tour_page) -> None:
    """Whoever changes tour.py runs tour_page.py."""
    page = (DOCS / "tour.md").read_text()
    rest = page
    for is_prose, text in tour_page.cells(tour_page.SOURCE.read_text()):
        block = text if is_prose else f"```python\n{text}\n```"
        assert block in rest, f"docs/tour.md lacks this cell of docs/tour.py; run docs/tour_page.py:\n{text}"
        rest = rest.partition(block)[2]
    pictures = list((DOCS / "tour").iterdir())
    assert {f"tour/{path.name}" for path in pictures} == pictures_of(page)
    assert sum(path.stat().st_size for path in pictures) < 500_000
