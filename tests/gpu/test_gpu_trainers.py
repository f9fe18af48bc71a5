"""A short run of each family of trainers on the device: their data, models, losses, teachers and evaluation."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from device_cases import ON_GPU

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image", reason="the trainers' dependencies are not installed")
if importlib.util.find_spec("lightning_fabric") is None:  # to import it takes seconds of each process that collects
    pytest.skip("the trainers' dependencies are not installed", allow_module_level=True)

TWO_TOWERS = ["--dim", "16", "--image-size", "16"]
IMAGES = ["--held-out", "0.25", "--image-size", "8", "--hidden", "16", "--dim", "8"]
CROPS = [*IMAGES, "--local-size", "8", "--local-crops", "1", "--prototypes", "12"]
FAMILIES = {
    "siglip": ("siglip", TWO_TOWERS),
    "clip": ("clip", TWO_TOWERS),
    "simclr": ("simclr", IMAGES),
    "moco-2": ("moco", [*IMAGES, "--queue-size", "16", "--groups", "2"]),
    "moco-3": ("moco", [*IMAGES, "--version", "3"]),
    "dino-1": ("dino", CROPS),
    "dino-2": ("dino", [*CROPS, "--version", "2", "--image-model", "tiny-vit"]),
}
ON_CPU = ("siglip", "dino-2")  # where tests/trainers has the others


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four unlike images in three folders, and a table of captions."""
    folder = tmp_path_factory.mktemp("drawings")
    rng = np.random.default_rng(0)
    lines = ["image,caption,category"]
    for i in range(24):
        tint = ("blue", "green", "red")[i % 3]
        (folder / "images" / tint).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 200, (16, 16, 3)) + 55 * np.eye(3, dtype=int)[2 - i % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / tint / f"{i}.png")
        lines.append(f"images/{tint}/{i}.png,{tint} drawing number {i},{tint}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_short_run(family: str, precision: str, drawings: Path, tmp_path: Path) -> None:
    if not ON_GPU and (family not in ON_CPU or precision != "32-true"):
        pytest.skip("tests/trainers has it on a CPU")
    trainer, options = FAMILIES[family]
    data = drawings / ("pairs.csv" if options is TWO_TOWERS else "images")
    common = ["--data", str(data), "--batch-size", "8", "--epochs", "2", "--precision", precision]
    accelerator = ["--accelerator", "cuda" if ON_GPU else "cpu"]
    main = importlib.import_module(f"ssl_kernels.trainers.{trainer}").main
    assert main([*options, *common, *accelerator, "--output-dir", str(tmp_path / "run")]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) >= 2
    assert all(np.isfinite(losses))
