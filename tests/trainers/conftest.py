"""Small real data on disk, and a way to run the trainer as its users do."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "black": (10, 10, 10)}
SHAPES = ("square", "bar", "cross", "dot", "corner", "frame")


def drawing(colour: str, shape: str, shade: int) -> Image.Image:
    """A 24-pixel drawing that its caption describes; the shade makes each one unique."""
    pixels = np.full((24, 24, 3), 255 - shade, dtype=np.uint8)
    mask = np.zeros((24, 24), dtype=bool)
    match shape:
        case "square":
            mask[6:18, 6:18] = True
        case "bar":
            mask[9:15] = True
        case "cross":
            mask[9:15] = mask[:, 9:15] = True
        case "dot":
            mask[10:14, 10:14] = True
        case "corner":
            mask[:12, :12] = True
        case "frame":
            mask[:4] = mask[-4:] = mask[:, :4] = mask[:, -4:] = True
    pixels[mask] = COLOURS[colour]
    return Image.fromarray(pixels)


def patchworks(folder: Path, n: int = 60) -> Path:
    """A folder of unlike images, each of sixteen random colours, in one subfolder to each of three tints."""
    rng = np.random.default_rng(0)
    for i in range(n):
        tint = ("blue", "green", "red")[i % 3]
        patches = rng.integers(0, 200, (4, 4, 3)) + 55 * np.eye(3, dtype=int)[2 - i % 3]
        (folder / tint).mkdir(exist_ok=True)
        image = Image.fromarray(patches.astype(np.uint8)).resize((24, 24), Image.Resampling.NEAREST)
        image.save(folder / tint / f"{i}.png")
    return folder


def rows(n: int) -> list[tuple[str, str, int]]:
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [(*kinds[i % len(kinds)], i // len(kinds)) for i in range(n)]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 96 drawings with unique captions and a category."""
    folder = tmp_path_factory.mktemp("drawings")
    lines = ["image,caption,category"]
    for i, (colour, shape, shade) in enumerate(rows(96)):
        drawing(colour, shape, shade).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{colour} {shape} number {shade},{shape}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four WebDataset shards of twelve drawings each."""
    folder = tmp_path_factory.mktemp("shards")
    pairs = rows(48)
    for shard in range(4):
        write_shard(
            folder / f"{shard:03}.tar",
            [(png(drawing(*pair)), f"{pair[0]} {pair[1]} number {pair[2]}") for pair in pairs[shard * 12 :][:12]],
        )
    return str(folder / "{000..003}.tar")


def write_shard(path: Path, pairs: list[tuple[bytes, str]]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, (image, caption) in enumerate(pairs):
            for suffix, content in (("png", image), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{path.stem}-{i}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nets this small are slower on several threads, and much slower where something else uses the cores."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def empty_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave empty files, for drawing takes most of their time, but in tests that ask for ``drawn_pictures``."""
    from several import leave_pictures_empty

    if "drawn_pictures" not in request.fixturenames:
        leave_pictures_empty(monkeypatch)


@pytest.fixture
def drawn_pictures() -> None:
    """What a run draws is drawn."""


@pytest.fixture
def small(table: Path) -> list[str]:
    """Arguments of a run over the table that takes a second or two."""
    return [
        *("--data", str(table), "--batch-size", "16", "--epochs", "3", "--image-size", "16", "--dim", "16"),
        *("--accelerator", "cpu"),
    ]


# The run goes on only when it is let, so that a signal comes in time however busy the processors are.
_HOLD = """
import importlib, sys, time
from pathlib import Path
from ssl_kernels.trainers import training

trainer, step, gate = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
memory = training.peak_memory_mb

def hold(device):  # asked for each line of the log
    hold.lines += 1
    if hold.lines == step:
        gate.with_suffix(".held").touch()
        while not gate.exists():
            time.sleep(0.01)
    return memory(device)

hold.lines = 0
training.peak_memory_mb = hold
sys.exit(importlib.import_module(f"ssl_kernels.trainers.{trainer}").main(sys.argv[4:]))
"""


def start(
    arguments: list[str], trainer: str = "siglip", *, hold: tuple[int, Path] | None = None, **options: object
) -> subprocess.Popen[str]:
    """`python -m ssl_kernels.trainers.<trainer>` with these arguments.

    With `hold` it waits in the step of that number, before its line is logged: see `signal_held`.
    """
    command = ["-m", f"ssl_kernels.trainers.{trainer}"]
    if hold is not None:
        command = ["-c", _HOLD, trainer, str(hold[0]), str(hold[1])]
    return start_command([*command, *arguments], **options)


def start_command(words: list[str], path: str | None = None, **options: object) -> subprocess.Popen[str]:
    """Python with these arguments, which hears SIGINT."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if path is not None:
        environment["PYTHONPATH"] = path
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # where it is ignored, a child would ignore it too
    try:
        return subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
        )  # type: ignore[call-overload, no-any-return]  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, heard)


def signal_held(process: subprocess.Popen[str], gate: Path, number: signal.Signals, *, group: bool = False) -> str:
    """Sends the signal when the process waits, lets it go on, and returns what it wrote to stderr by its end."""
    while not gate.with_suffix(".held").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    gate.touch()
    return process.communicate()[1]


def logged(folder: Path) -> list[dict[str, float]]:
    """The log of a run without what depends on the clock."""
    from ssl_kernels.trainers.loggers import TIMED

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def same_state(a: object, b: object) -> bool:
    """Whether two checkpoints hold the same bits, wherever they were written and however long it took."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        clock = {"elapsed_s", "output_dir", "resume"}
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a.keys() - clock)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@dataclass
class TrainedRun:
    """A finished run over the drawings of `table`, and what its own evaluation made of the held-out pairs."""

    folder: Path
    images: list[Path]
    captions: list[str]
    similarity: torch.Tensor  # text by image

    @property
    def drawings(self) -> Path:
        """The folder of all images, the table among them."""
        return self.images[0].parent


@pytest.fixture(scope="session")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run of siglip that tells the drawings apart."""
    from ssl_kernels.trainers import siglip
    from ssl_kernels.trainers.data import ImageTextPairs
    from ssl_kernels.trainers.evaluation import curves, retrieval

    folder, seen = tmp_path_factory.mktemp("trained") / "run", []

    def keep(path: Path, pairs: ImageTextPairs, similarity: torch.Tensor, *_: object, **__: object) -> str:
        seen.append((pairs, similarity))
        return ""

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "plot_retrieval", keep)
        patch.setattr(curves, "plot_curves", lambda *_, **__: "")
        arguments = ["--batch-size", "16", "--epochs", "14", "--image-size", "16", "--dim", "16", "--lr", "5e-3"]
        options = ["--accelerator", "cpu", "--no-check-loss", "--label-captions", "0"]
        assert siglip.main(["--data", str(table), *arguments, *options, "--output-dir", str(folder)]) == 0
    torch.set_num_threads(threads)
    ((pairs, similarity),) = seen
    return TrainedRun(folder, pairs.images, pairs.captions, similarity)


@pytest.fixture(scope="session")
def shapes(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawings of `table` in a subfolder to each shape."""
    folder = tmp_path_factory.mktemp("shapes")
    for i, (_, shape, _) in enumerate(rows(96)):
        (folder / shape).mkdir(exist_ok=True)
        (folder / shape / f"{i}.png").write_bytes((table.parent / f"{i}.png").read_bytes())
    return folder
