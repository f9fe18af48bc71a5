"""CLIP loss: ours, open_clip's, transformers', the eager formula, and the formula compiled; fp32, in one run.

The loss alone takes one product of 2 B^2 D FLOP, gradients three more, of which the first is spared for tiles that are
kept within the budget.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import MODES, Loss, measure, verify
from torch import Tensor

from ssl_kernels import ClipLoss, use_tile_budget
from ssl_kernels.settings import tile_budget_bytes


def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * x @ y.t(), torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def recompute(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    with use_tile_budget(0):
        return ClipLoss()(x, y, scale)


@functools.cache
def provider(name: str) -> Loss:
    if name == "open_clip":
        return pytest.importorskip("open_clip").loss.ClipLoss()
    if name == "transformers":
        clip = pytest.importorskip("transformers.models.clip.modeling_clip")
        loss = getattr(clip, "image_text_contrastive_loss", None) or clip.clip_loss  # its name before version 5
        return lambda x, y, scale: loss(scale * y @ x.t())
    return {"ours": ClipLoss(), "ours, recomputing": recompute, "eager": eager, "compile": torch.compile(eager)}[name]


SHAPES = [(1024, 512), (4096, 128), (4096, 512), (4096, 1152), (8192, 512)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    large = metafunc.function.__name__ == "bench_large_batch"
    metafunc.parametrize(("batch", "width"), [(64, 16)] if quick else [(32_768, 512)] if large else SHAPES)


def inputs(batch: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(batch, width, generator=generator), dim=-1) for _ in range(2))
    return [t.requires_grad_() for t in (x, y, torch.tensor(1 / 0.07))]


def run(benchmark: Any, name: str, batch: int, width: int, mode: str, rounds: int) -> None:
    kept = 0.0 if name == "ours, recomputing" else min(1.0, tile_budget_bytes() / (4 * batch**2))
    units = 1 if mode == "forward" else 4 - kept if name.startswith("ours") else 3
    measure(
        benchmark, provider(name), inputs(batch, width), op="clip", provider=name, mode=mode,
        shape=f"B={batch} D={width}", width=width, gflop=units * 2 * batch**2 * width / 1e9, rounds=rounds,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ours", "ours, recomputing", "open_clip", "transformers", "eager", "compile"])
def bench_clip(benchmark: Any, name: str, batch: int, width: int, mode: str) -> None:
    if name != "eager":
        verify(provider(name), eager, inputs(batch, width), mode)
    run(benchmark, name, batch, width, mode, rounds=8 if batch < 8192 else 3)


def bench_large_batch(benchmark: Any, batch: int, width: int) -> None:
    """A batch whose similarity matrix (4 GB) the others keep several times over, and nothing here can compare."""
    run(benchmark, "ours", batch, width, "forward+backward", rounds=1)
