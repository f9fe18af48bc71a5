"""What README and docs print of speed, memory and trainings is what committed results say."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ssl_kernels.bench.problem import Op

ROOT = Path(__file__).resolve().parent.parent
if not all((ROOT / folder).is_dir() for folder in ("docs", "benchmarks/results")):
    pytest.skip("needs the checkout, whose documents these are", allow_module_level=True)
pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")

import collect_trainings  # noqa: E402
import evidence  # noqa: E402
from evidence import Figures  # noqa: E402

PAGES = [path.relative_to(ROOT).as_posix() for path in evidence.pages()]
GENERATED = ("docs/gpu_static.md", "docs/gpu_measured.md", "docs/scaling.md")  # by scripts with tests of their own
FIGURE = re.compile(
    r"""(?<![\w.,])(?:
        \d[\d.,]*x\b                                                     # 3.7x
        | \d[\d.,]*\ times\ (?:as|the|fast|slow|less|more)
        | \d[\d.,]*\ (?:MB|GB|ms|TFLOP/s)\b
        | 0?\.\d{3}\b                                                    # .845
    )""",
    re.VERBOSE,
)
CODE = [re.compile(r"```.*?```", re.DOTALL), re.compile(r"^(?: {4}|\t).*$", re.MULTILINE), re.compile(r"`[^`\n]+`")]
NOT_MEASURED = {  # and outside of code
    "2.0x": "how to read a ratio",
    "24 GB": "the card that a batch is asked to fit",
}


def stray_figures(text: str) -> list[str]:
    """Figures that come from no result: neither between markers, nor code, nor known to be no measurement."""
    for no_claim in (evidence.MARKER, *CODE):
        text = no_claim.sub("", text)
    return [figure for figure in FIGURE.findall(text) if figure not in NOT_MEASURED]


@pytest.fixture(scope="module")
def machines() -> list[Figures]:
    return evidence.machines()


def test_the_page_says_what_the_results_say(machines: list[Figures]) -> None:
    assert evidence.PAGE.read_text() == evidence.page(machines), "run `python benchmarks/evidence.py`"


@pytest.mark.parametrize("page", PAGES)
def test_figures_between_markers_are_those_of_the_results(page: str, machines: list[Figures]) -> None:
    text = (ROOT / page).read_text()
    assert text == evidence.filled(text, machines[0]), "run `python benchmarks/evidence.py`"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_no_figure_comes_from_elsewhere(page: str) -> None:
    assert stray_figures((ROOT / page).read_text()) == []


def test_pictures_show_the_results(machines: list[Figures]) -> None:
    drawn = evidence.swept_ops(machines[0])
    assert drawn
    for op in drawn:
        picture = (evidence.IMAGES / evidence.picture_name(op)).read_text()
        assert evidence.points(op, machines[0].found[op.name]) in html.unescape(picture), evidence.picture_name(op)


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("It is 3.7x as fast, or 12 times as fast.", ["3.7x", "12 times as"]),
        ("| .845 | 0.845 | 1,296 MB |", [".845", "0.845", "1,296 MB"]),
        ("`64 MB` and\n\n    ssl-kernels --lr .003\n\n```\n12 ms\n```", []),
        ("<!-- bench: time; a; b; c -->3.7x<!-- /bench --> and 3.8x", ["3.8x"]),
        ("2.0x means twice as slow on 2 threads of 3.11.7 at 0.1 and 1.234.", []),
    ],
)
def test_what_counts_as_a_figure(text: str, figures: list[str]) -> None:
    assert stray_figures(text) == figures


def test_committed_results_are_sound(machines: list[Figures]) -> None:
    assert list(evidence.unsound(machines)) == []


def test_unsound_results_are_named() -> None:
    def result(size: str = "full", load: float = 0.5, seconds: float = 1.0) -> dict[str, Any]:
        ours = run("ours", 64, 1.0, seconds) | {"gflop": 10.0, "width": 8, "fastest_gemm_gflops": 10.0}
        ours |= {"torch_mm_gflops": 1.0}  # slow in some versions, which is no fault of a run
        return {**STAMP, "size": size, "machine": {"name": "some", "cpus": 2, "load_before": load}, "runs": [ours]}

    bad = {"clip": result("quick"), "koleo": result(load=1.5), "sigmoid": result(seconds=0.5), "nt_xent": result()}
    assert list(evidence.unsound([Figures(bad, [])])) == [
        "some/clip.json: expected a full run, got a quick one",
        "some/koleo.json: expected a load of at most 1.0, got 1.5",
        "some/sigmoid.json: B=64, forward+backward: 200% of the fastest GEMM",
    ]


def test_nothing_is_written_where_a_page_cannot_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (good, bad, whole) = (tmp_path / name for name in ("good.md", "bad.md", "benchmarks.md"))
    good.write_text("<!-- bench: machine --><!-- /bench -->")
    bad.write_text("<!-- bench: nothing --><!-- /bench -->")
    monkeypatch.setattr(evidence, "pages", lambda: [good, bad])
    for name, value in {"PAGE": whole, "IMAGES": tmp_path / "images"}.items():
        monkeypatch.setattr(evidence, name, value)
    for name, value in {"machines": lambda: [SOME], "unsound": lambda _: [], "page": lambda _: "page"}.items():
        monkeypatch.setattr(evidence, name, value)
    with pytest.raises(LookupError, match="nothing"):
        evidence.main()
    assert good.read_text() == "<!-- bench: machine --><!-- /bench -->"
    assert not whole.exists()


def run(provider: str, batch: int, mb: float, seconds: float = 1.0) -> dict[str, Any]:
    more = {"ours_seconds": 0.5} if provider != "ours" else {"gbytes": 3.0, "copy_gbytes_per_s": 4.0}
    what = {"shape": f"B={batch}", "mode": "forward+backward", "provider": provider, "batch": batch}
    return {**what, "peak_mb": mb, "seconds": seconds, **more}


RUNS = [
    *(run("ours", batch, batch / 100) for batch in (1024, 4096, 8192)),
    *(run("open_clip", batch, 2000 + 2e-5 * batch**2, 2.0) for batch in (1024, 4096, 8192)),
]
MACHINE = {"processor": "Some 1", "instruction_set": "avx2", "threads": 2, "ram_gb": 8}
STAMP = {"machine": MACHINE, "versions": {"torch": "3.0"}, "measured": "2026-01-02", "absent": []}
TRAININGS = [
    {"command": "train clip", "seed": seed, "figures": {"R@1": {"model": 0.5 + seed / 10, "chance": 0.003}}}
    for seed in range(2)
]
SOME = Figures({"sigmoid": {**STAMP, "runs": RUNS}}, TRAININGS)


@pytest.mark.parametrize(
    ("marker", "text"),
    [
        ("time; sigmoid; B=4096; open_clip", "4.0x"),
        ("memory; sigmoid; B=8192; ours", "82 MB"),
        ("memory; sigmoid; B=8192; open_clip", "3,342 MB"),
        ("limit; sigmoid; B=4096", "75%"),
        ("fits; sigmoid; open_clip", "34,000"),  # 2000 + 2e-5 B² = 24 * 1024 at 33,598
        ("machine", "Some 1 (avx2), 2 threads, 8 GB, torch 3.0, measured 2026-01-02"),
        (
            "trainings; train clip",
            "\n\n|  | model | chance |\n|---|---:|---:|\n| R@1 | 0.500 to 0.600 | 0.003 |\n\n",
        ),
    ],
)
def test_markers(marker: str, text: str) -> None:
    page = f"a <!-- bench: {marker} -->old<!-- /bench --> b"
    assert evidence.filled(page, SOME) == f"a <!-- bench: {marker} -->{text}<!-- /bench --> b"


@pytest.mark.parametrize(
    "marker",
    [
        "speed; sigmoid; B=4096; open_clip",
        "time; sigmoids; B=4096; open_clip",
        "time; sigmoid; B=4097; open_clip",
        "time; sigmoid; B=4096; lightly",
        "time; sigmoid",
        "fits; sigmoid; lightly",
        "trainings; train dino",
    ],
)
def test_a_marker_without_a_result_is_an_error(marker: str) -> None:
    with pytest.raises(LookupError, match=f"bench: {marker}"):
        evidence.filled(f"<!-- bench: {marker} -->1x<!-- /bench -->", SOME)


def test_a_picture_is_the_same_each_time_it_is_drawn(tmp_path: Path, machines: list[Figures]) -> None:
    op: Op = evidence.swept_ops(machines[0])[0]
    for name in ("a", "b"):
        evidence.draw(op, machines[0].found[op.name], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_trainings_are_collected(tmp_path: Path) -> None:
    figure = {"name": "R@1", "model": 0.5, "chance": 0.1, "majority": None, "note": "of all"}
    for seed in (1, 0):
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"seed": seed}))
        (folder / "summary.json").write_text(json.dumps({"figures": [figure], "steps": 7}))
    path = tmp_path / "machine" / "trainings.json"
    for command in ("train moco", "train clip", "train moco"):
        collect_trainings.collect(path, command, [tmp_path / "run-1", tmp_path / "run-0"])
    runs = json.loads(path.read_text())
    found = [(run["command"], run["seed"]) for run in runs]
    assert found == [("train clip", 0), ("train clip", 1), ("train moco", 0), ("train moco", 1)]
    assert runs[0]["figures"] == {"R@1": {"model": 0.5, "chance": 0.1}}
