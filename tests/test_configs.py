"""Which configuration of the tile kernels is chosen, by the model of a chip or by measurement."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

configs = pytest.importorskip("ssl_kernels.kernels.configs", reason="Triton is not installed")

CHIPS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx9": 304}
KINDS = ("half", "tf32")  # products in fp32 take so long that no tile waits for loads


def nothing(config: Any) -> None:
    raise AssertionError("measured, though nobody asked for it")


@pytest.mark.parametrize(("chip", "kind"), itertools.product(CHIPS, KINDS))
def test_large_tiles_where_they_occupy_the_chip_and_small_ones_elsewhere(chip: str, kind: str) -> None:
    large, *_, small = configs.CONFIGS[chip, kind]
    multiprocessors = CHIPS[chip]
    for width in (512, 768, 1152):
        assert configs.modelled(chip, kind, multiprocessors, 16_384, 16_384, width) == large
        assert configs.modelled(chip, kind, multiprocessors, 512, 512, width) == small


def test_the_clocks_of_a_tile_in_numbers() -> None:
    """An H100, 16 bits: 128 x 256 similarities of 512 features, then 132 tiles at a time on as many multiprocessors."""
    config = configs.Config(128, 256, 64, 8, 3, blocks=1)
    product, load, epilogue = 2 * 128 * 256 * 512 / 4096, (128 + 256) * 512 * 2 / 32, 128 * 256 * 24 / 128
    assert load > product
    alone = load + epilogue + 2000
    assert configs.clocks(config, "sm_90", "half", 132, 128, 256, 512) == alone
    assert configs.clocks(config, "sm_90", "half", 132, 128 * 132, 256, 512) == alone
    assert configs.clocks(config, "sm_90", "half", 132, 128 * 133, 256, 512) == 2 * alone
    assert configs.clocks(config, "sm_90", "half", 132, 128 * 133, 256, 511) == 2 * alone
    # Two at a time hide each other's epilogues and starts.
    pair = configs.Config(128, 256, 64, 8, 3, blocks=2)
    assert configs.clocks(pair, "sm_90", "half", 132, 128 * 132 * 8, 256, 512) == 8 * load


def test_rows_that_are_not_aligned_take_the_last() -> None:
    last = configs.CONFIGS["sm_80", "half"][-1]
    x, grad = torch.zeros(4096, 64).bfloat16(), torch.zeros(4096, 4096).bfloat16()
    assert configs.choose_config("sigmoid", x, x, grad, nothing) != last
    for change in (
        (torch.zeros(4096, 65).bfloat16()[:, :64], x, grad),
        (x, x[:, ::2], grad),
        (x, torch.zeros(4096 * 64 + 1).bfloat16()[1:].view(4096, 64), grad),
        (x, x, grad[:, :-1].t()),
    ):
        assert configs.choose_config("sigmoid", *change, nothing) == last


@pytest.mark.parametrize("old", [False, True])
def test_an_older_triton_holds_fewer_similarities_where_registers_are_scarce(
    old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssl_kernels.kernels import row_softmax, sigmoid, sinkhorn, softmax

    for module in (row_softmax, sigmoid, sinkhorn, softmax):
        monkeypatch.setattr(module, "HAS_OLD_TRITON", old)

    def held(config: Any, lanes: int = 32) -> float:  # by a thread at a time
        return config.block_m * config.block_n / (lanes * config.num_warps) / (1 + config.halves)

    large = {chip: configs.CONFIGS[chip, "half"][0] for chip in CHIPS}
    hopper, amd = large["sm_90"], large["gfx9"]
    assert softmax.config_for(hopper, "sm_90", False, False) == hopper  # statistics fit everywhere
    assert held(softmax.config_for(hopper, "sm_90", False, False, with_grad=True)) == (32 if old else 64)
    assert held(softmax.config_for(hopper, "sm_90", True, False)) == (16 if old else 32)
    assert softmax.config_for(large["sm_100"], "sm_100", True, False).block_m == (64 if old else 128)
    assert softmax.config_for(amd, "gfx9", True, False).block_n == (64 if old else 128)
    biased = row_softmax.fitted_for(hopper, "sm_90", False, False, False, has_bias=True, sums_columns=True)
    assert held(biased) == (32 if old else 64)
    biased = row_softmax.fitted_for(large["sm_100"], "sm_100", False, False, False, has_bias=True, sums_columns=True)
    assert held(biased) == 32
    assert not biased.halves
    assert held(sigmoid.config_for(amd, "gfx9", False), lanes=64) == (16 if old else 32)
    assert sinkhorn.columns_of_tile(65536, "sm_90", aligned=False) == (256 if old else 1024)
    assert sinkhorn.columns_of_tile(65536, "sm_90", aligned=True) == 1024
    assert sinkhorn.block_of_row(65552, aligned=True) == (2048 if old else 4096)
    assert sinkhorn.block_of_row(65536, aligned=True) == 4096


def test_measured_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def fastest(kernel: str, shapes: str, device: torch.device, found: tuple[Any, ...], launch: Any) -> Any:
        asked.append((kernel, shapes))
        return found[-1]

    monkeypatch.setattr(configs.autotune, "is_wanted", lambda device: True)
    monkeypatch.setattr(configs.autotune, "fastest", fastest)
    x, y = torch.zeros(4000, 64).half(), torch.zeros(4096, 64).half()
    both = configs.CONFIGS["sm_80", "half"]
    assert configs.choose_config("sigmoid", x, y, None, nothing) == both[-1]
    configs.choose_config("sigmoid", y, y, None, nothing)
    configs.choose_config("sigmoid", y, y, torch.zeros(4096, 4096).half(), nothing)
    configs.choose_config("koleo", y, y, None, nothing, has_ids=True)
    shapes = "4096 x 4096 x 64"
    assert asked == [
        ("sigmoid", f"torch.float16 half {shapes}"),
        ("sigmoid", f"torch.float16 half {shapes}"),
        ("sigmoid", f"torch.float16 half gradient {shapes}"),
        ("koleo", f"torch.float16 half ids {shapes}"),
    ]
    monkeypatch.setattr(configs.autotune, "fastest", lambda *arguments: None)
    assert configs.measured("koleo", x, y, "", both, nothing) is None
    assert configs.choose_config("sigmoid", x, y, None, nothing) == configs.modelled("sm_80", "half", 1, 4000, 4096, 64)


def test_keys_are_read_once_unless_measurements_say_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    key_softmax = pytest.importorskip("ssl_kernels.kernels.key_softmax")
    query, keys = torch.zeros(4, 64).half(), torch.zeros(300, 64)
    whole, deep, unaligned = key_softmax.CONFIGS["sm_80", "half"]

    def choice(query: torch.Tensor, keys: torch.Tensor) -> Any:
        return key_softmax.choose_config(query, keys, True, nothing)

    assert choice(query, keys) == whole
    assert choice(query[:, :63], keys[:, :63]) == whole
    assert choice(query[:, 1:], keys[:, 1:]) == unaligned
    assert choice(torch.zeros(4, 256).half(), torch.zeros(300, 256)) == deep

    asked: list[tuple[Any, ...]] = []

    def fastest(kernel: str, shapes: str, device: torch.device, found: tuple[Any, ...], launch: Any) -> Any:
        asked.append((kernel, shapes, found))
        return found[-1]

    monkeypatch.setattr(configs.autotune, "is_wanted", lambda device: True)
    monkeypatch.setattr(configs.autotune, "fastest", fastest)
    assert choice(query, keys) == deep
    choice(torch.zeros(4, 256).half(), torch.zeros(300, 256))
    assert asked == [("key_softmax", "torch.float16 half on torch.float32 mean 4 x 512 x 64", (whole, deep))]
