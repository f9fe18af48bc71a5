"""What a step launches on a GPU, counted with fake tensors of the real sizes: nothing comes back that each panel would
have to do anew."""

from __future__ import annotations

import functools
import math
from collections import Counter
from unittest import mock

import fake_device
import pytest
import step_model
import torch
from fake_device import Counts, counted
from torch import Tensor

from ssl_kernels.kernels.scratch import Scratch

LARGE, WIDTH = 65_536, 768


# What is made of the statistics, and of the scalars in the backward pass, whatever the size.
ONCE = {"summary": 1, "vectors": 1, "scalars": 1}


@functools.cache
def step(name: str, batch: int, width: int = WIDTH, chip: str = "sm_90") -> Counts:
    return counted(chip, lambda: fake_device.STEPS[name](batch, width))


def beyond_one_panel(name: str) -> tuple[Counts, Counter[str]]:
    """A large step, and the operations that a step of one panel does not have, products and Triton's kernels apart."""
    large, small = step(name, LARGE), step(name, 1024)
    assert large.allocations == small.allocations
    return large, large.others - small.others


def test_siglip() -> None:
    """Six panels of rows, and six of columns."""
    large, more = beyond_one_panel("SigLIP")
    assert large.kernels == {"sigmoid": 36, "scalars": 1}
    assert large.products == 72
    assert more == {"sum": 5, "add_": 5}  # of partial sums, once for all panels of the same rows
    assert large.launches <= 133
    assert large.free["as_strided"] == 36 + 10  # a place for each panel's sums; what waits, and a tile, by the shape
    assert large.free["t"] <= 25  # twice for each panel of rows and columns, at most


def test_clip() -> None:
    large, more = beyond_one_panel("CLIP")
    assert large.kernels == {"stats": 16, "merge": 16 + 4, "grad": 36, **ONCE}
    assert large.products == 72
    assert more == {"sum": 5, "add_": 5}


def test_nt_xent() -> None:
    """Of 12 panels of rows, 12 tiles lie on the diagonal, where G is halved, and 66 above it. Statistics have 10 panels
    of rows, 45 tiles above the diagonal, and for four of the panels too little room for all that waits."""
    large, small = step("NT-Xent", LARGE), step("NT-Xent", 1024)
    assert small.kernels == {"stats": 3, "merge": 3, "grad": 3, **ONCE}  # 2 panels of rows, one to each view
    assert large.kernels == {"stats": 55, "merge": 45 + 10 + 4, "grad": 78, **ONCE}
    assert large.products == 78 + 66
    assert large.allocations == small.allocations
    assert large.others - small.others == {"sum": 10, "add_": 10, "mul_": 10}


def test_info_nce_is_one_launch_a_merge_and_what_is_made_of_rows() -> None:
    large, small = step("InfoNCE", LARGE), step("InfoNCE", 1024)
    assert large == small
    assert large.kernels == {"keys": 1, "merge keys": 1, "rows": 1, "gradients": 1}
    assert large.others == {"mean": 1, "sum": 1}


@pytest.mark.parametrize(("name", "most"), [("CLIP", 18), ("SigLIP", 14), ("NT-Xent", 30), ("InfoNCE", 6)])
def test_a_step_of_one_panel(name: str, most: int) -> None:
    """All that it launches; NT-Xent has a panel of rows for each view."""
    assert step(name, 1024).launches <= most


@pytest.mark.parametrize(
    ("loss", "batch", "width", "chip"),
    [
        ("SigLIP", 65_536, 512, "sm_80"), ("SigLIP", 4096, 1152, "sm_100"), ("CLIP", 65_536, 256, "sm_90"),
        ("CLIP", 16_384, 768, "sm_100"), ("NT-Xent", 16_384, 768, "sm_90"), ("NT-Xent", 16_384, 512, "sm_100"),
        ("InfoNCE", 4096, 256, "sm_80"),
    ],
)  # fmt: skip
def test_the_model_of_a_step_counts_what_the_code_launches(loss: str, batch: int, width: int, chip: str) -> None:
    assert step_model.step(loss, batch, width, chip).launches == step(loss, batch, width, chip).launches


def test_the_model_of_a_step_before_has_five_launches_to_a_panel() -> None:
    before = step_model.step("SigLIP", 65_536, 768, "sm_90", before=True)
    assert before.panels == 256
    assert before.launches == 5 * 256 + step_model.FIXED["SigLIP"] + 2


def test_the_model_of_a_step_takes_the_time_of_its_products_at_least() -> None:
    for width in step_model.WIDTHS:
        of = step_model.step("SigLIP", 65_536, width, "sm_90")
        at_peak = 6 * 65_536**2 * width / 989e9  # milliseconds
        assert at_peak < of.device_ms < 2 * at_peak
        assert of.host_ms < of.device_ms


@pytest.mark.parametrize("rocm", [False, True])
def test_what_a_panel_converts(rocm: bool) -> None:
    """On ROCm products of 16-bit factors are made in fp32: each panel converts its tile, and y is converted once."""
    with mock.patch.object(torch.version, "hip", "7.0" if rocm else None):
        found = counted("sm_90", lambda: fake_device.siglip(LARGE, 512))
    rows, panels = 8, 32
    assert found.kernels == {"sigmoid": panels, "scalars": 1}
    assert found.others["_to_copy"] == (rows + panels + 1 if rocm else 0)


def test_the_eager_backend_converts_features_once() -> None:
    found = counted("sm_90", lambda: fake_device.siglip(4096, 512, workspace_mb=32, backend="eager"))
    panels = found.products // 3
    assert panels >= 16
    assert found.others["_to_copy"] <= 1 + math.isqrt(panels) + 1


def test_partial_sums_wait_for_their_rows_and_no_longer() -> None:
    """Sums of two panels of the same rows are added up together; those that would begin elsewhere than at 16 bytes are
    not, nor are those that the memory has no room for."""
    added: list[int] = []

    def add(partials: Tensor, stats: Tensor) -> None:
        added.append(len(partials))
        stats += partials.sum(0).t()

    scratch = Scratch(columns=100, workspace=2 * 4 * 3 * 8 * 10, add=add)
    stats = torch.zeros(16, 3, dtype=torch.float64)
    upper, lower, ragged = stats[:8], stats[8:], stats[:7]
    for rows, blocks, expected in (
        (upper, 4, []), (lower, 4, [4]), (lower, 5, [4]), (lower, 2, [4, 9]), (ragged, 2, [4, 9, 2]),
        (ragged, 2, [4, 9, 2, 2]),
    ):  # fmt: skip
        partials = scratch.partials(rows, blocks, 10)
        assert partials.shape == (blocks, 3, len(rows))
        assert partials.data_ptr() % 16 == 0
        partials.fill_(1)
        assert added == expected
    scratch.reduce()
    scratch.reduce()
    assert added == [4, 9, 2, 2, 2]
    assert stats[:, 0].tolist() == [8.0] * 7 + [4.0] + [11.0] * 8


def test_what_waits_is_halved() -> None:
    scratch, stats = Scratch(20, 2**20), torch.zeros(4, 1, dtype=torch.float64)
    scratch.partials(stats, 2, 10).fill_(1)
    scratch.halve()
    scratch.partials(stats, 2, 10).fill_(1)
    scratch.reduce()
    assert stats[:, 0].tolist() == [3.0] * 4


def test_a_gradient_tile_is_the_memory_of_the_one_before() -> None:
    scratch, like = Scratch(100, 0), torch.zeros(10, 4)
    first, ragged = scratch.gradient(like, 33), scratch.gradient(like[:5], 20)
    assert (first.shape, first.stride()) == ((10, 33), (48, 1))
    assert (ragged.shape, ragged.stride()) == ((5, 20), (32, 1))
    assert first.data_ptr() == ragged.data_ptr()
    assert scratch.gradient(like, 33) is first
    assert scratch.gradient(torch.zeros(20, 4), 33).untyped_storage().size() == 20 * 48 * 4
