"""The kernels of tiles as a large aligned batch meets them: through tensor descriptors where the chip has them.

Values and gradients against float64 for rows that no tile divides and widths that some tiles divide; every shipped
configuration, forced; results that are exact, again and again to the same bits; the ragged last panel in a CUDA graph.
Without a GPU the same code runs in the interpreter, at sizes that it can take, with the configurations of sm_90.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from covering import covering
from device_cases import (
    CASES,
    DEVICE,
    ON_GPU,
    Case,
    Inputs,
    Result,
    Sizes,
    assert_close,
    evaluate,
    fp32_products,
    reference,
)
from torch import Tensor

import ssl_kernels
from ssl_kernels.settings import choose_backend

RUNS_KERNELS = choose_backend(DEVICE, torch.float32, ("cpu", "triton")) == "triton"
if not RUNS_KERNELS:
    pytest.skip(f"the Triton kernels do not run on {DEVICE} but in the interpreter", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from ssl_kernels.kernels import configs, key_softmax  # noqa: E402
from ssl_kernels.kernels.koleo import koleo_panel  # noqa: E402
from ssl_kernels.kernels.row_softmax import Pairs  # noqa: E402
from ssl_kernels.kernels.row_softmax_stats import row_softmax_stats  # noqa: E402
from ssl_kernels.kernels.softmax_stats import softmax_stats  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAMILY = configs.device_traits(DEVICE)[0] if ON_GPU else "sm_90"
ROWS = (1031, 4099) if ON_GPU else (19, 35)
WIDTHS = (512, 576, 768, 1152) if ON_GPU else (48, 144)  # of one step of the products, and of two
RUNS = 50 if ON_GPU else 2
NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = ("sigmoid_contrastive_loss", "clip_loss", "row_softmax_loss", "info_nce_loss", "koleo_loss")
# Where the configuration of a launch is chosen.
CHOOSERS = {
    "sigmoid_contrastive_loss": ("sigmoid",),
    "clip_loss": ("softmax_stats", "softmax_grad"),
    "row_softmax_loss": ("row_softmax",),
}
MODULES = ("sigmoid", "softmax_stats", "softmax_grad", "row_softmax", "row_softmax_stats", "row_softmax_grad")


def of(op: str, variant: str = "mean") -> Case:
    return next(case for case in CASES if case.op == op and case.variant == variant)


def check(case: Case, sizes: Sizes, dtype: torch.dtype, *, tf32: bool = False) -> None:
    inputs = case.inputs(sizes, dtype)
    with fp32_products("high" if tf32 else "highest"):
        ours, plain = evaluate(case, inputs), reference(case, inputs)
    assert_close(case, ours, plain, reference(case, inputs, torch.float64), dtype, tf32=tf32)


@covering(2, op=OPS, rows=ROWS, width=WIDTHS, dtype=NAMES)
def test_values_of_an_aligned_batch(op: str, rows: int, width: int, dtype: str) -> None:
    check(of(op), Sizes(rows, width, rows), NAMES[dtype])


# ---- every configuration


def forced() -> Iterator[tuple[str, str, str, configs.Config]]:
    """(op, variant, kind of product, configuration)"""
    for op in CHOOSERS:
        for variant in ("mean", "ids", "bias"):
            for kind in ("half", "tf32", "ieee") if any((c.op, c.variant) == (op, variant) for c in CASES) else ():
                for config in configs.CONFIGS[FAMILY, kind]:
                    yield op, variant, kind, config


@contextmanager
def only(op: str, config: configs.Config) -> Iterator[list[Any]]:
    """Launches inside take this configuration. The list receives what they hand to their kernels."""
    used: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in CHOOSERS[op]:
            module = importlib.import_module(f"ssl_kernels.kernels.{name}")
            patch.setattr(module, "choose_config", lambda *args, **options: config)
        for name in MODULES:
            module = importlib.import_module(f"ssl_kernels.kernels.{name}")
            operands = module.operands
            patch.setattr(
                module, "operands", lambda *args, operands=operands: used.extend(operands(*args)) or used[-3:]
            )
        yield used


@pytest.mark.parametrize(("op", "variant", "kind", "config"), forced(), ids=str)
def test_every_configuration(op: str, variant: str, kind: str, config: configs.Config) -> None:
    rows, width = ROWS[0], WIDTHS[1]
    for dtype in (torch.bfloat16, torch.float16) if kind == "half" else (torch.float32,):
        with only(op, config) as used:
            check(of(op, variant), Sizes(rows, width, rows), dtype, tf32=kind == "tf32")
        described = [isinstance(x, TensorDescriptor) for x in used if x is not None]
        assert described
        assert all(described) if config.descriptors else not any(described)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
def test_every_configuration_over_keys(kind: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = key_softmax.CONFIGS[FAMILY, kind][place]
    width = 32 if not ON_GPU else 128 if config.block_d is None else 576
    monkeypatch.setattr(key_softmax, "choose_config", lambda *args: config)
    for dtype in (torch.bfloat16, torch.float16) if kind == "half" else (torch.float32,):
        check(of("key_softmax", "both"), Sizes(ROWS[0], width, ROWS[1]), dtype, tf32=kind == "tf32")


# ---- results that are exact


def integers(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """From -4 to 4: every dtype holds them, and fp32 their products' sums, of a row as of a tile."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (rows, width), generator=generator).to(DEVICE, dtype)


def again_and_again(run: Callable[[], tuple[Tensor, ...]], expected: tuple[Tensor, ...]) -> None:
    """The results are these and no others, in every bit."""
    for _ in range(RUNS):
        for found, right in zip(run(), expected, strict=True):
            assert torch.equal(found, right.to(found.dtype))


@covering(1, rows=ROWS, width=WIDTHS, dtype=NAMES, place=[0, 1])
def test_sums_of_similarities_are_exact(rows: int, width: int, dtype: str, place: int) -> None:
    """Of positive pairs and of all: whatever a product misses is missing there."""
    x, y = (integers(rows, width, NAMES[dtype], seed) for seed in (0, 1))
    raw = x.double() @ y.double().t()
    every, positives = raw.sum(1), raw.diagonal()
    config = configs.CONFIGS[FAMILY, configs.product_kind(x)][place]
    target, scales = torch.arange(rows, device=DEVICE), torch.full((3,), 0.01, device=DEVICE)
    pairs = Pairs(target, None, None, 0, scales, None, False, None)

    def run() -> tuple[Tensor, ...]:
        stats = torch.zeros(3, rows, 6, dtype=torch.float64, device=DEVICE)
        stats[:, :, 0] = -torch.inf
        softmax_stats(x, y, stats[0], stats[1], scales[0], None, None, False, 0, 2**40, config=config)
        row_softmax_stats(x, y, stats[2], pairs, config=config)
        return stats[0, :, 2], stats[0, :, 4], stats[1, :, 2], stats[1, :, 4], stats[2, :, 2], stats[2, :, 4]

    again_and_again(run, (positives, every, positives, raw.sum(0), positives, every))


@covering(1, rows=ROWS, width=WIDTHS, kind=["tf32", "ieee"], place=[0, 1])
def test_nearest_neighbours_are_exact(rows: int, width: int, kind: str, place: int) -> None:
    x = integers(rows, width, torch.float32, 0)
    raw = x.double() @ x.double().t()
    raw.fill_diagonal_(-torch.inf)
    best = raw.amax(1)
    neighbor = (raw == best[:, None]).to(torch.uint8).argmax(1)  # the first of equals
    config = configs.CONFIGS[FAMILY, kind][place]

    def run() -> tuple[Tensor, ...]:
        found = torch.full((rows,), -torch.inf, device=DEVICE)
        whose = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        koleo_panel(x, x, found, whose, 0, 0, config=config)
        return found, whose

    with fp32_products("high" if kind == "tf32" else "highest"):
        again_and_again(run, (best, neighbor))


@covering(1, keys=[ROWS[0] // 2 * 2, 64], width=[32, 128], dtype=NAMES, place=[0, 1])
def test_means_of_keys_are_exact(keys: int, width: int, dtype: str, place: int) -> None:
    """At scale 0 every key weighs the same: the mean is their sum over their number, a power of two."""
    keys = 1 << (keys.bit_length() - 1)
    query, table = integers(ROWS[0], width, NAMES[dtype], 0), integers(keys, width, NAMES[dtype], 1)
    mean = (table.double().sum(0) / keys).expand(ROWS[0], width)
    config = key_softmax.CONFIGS[FAMILY, configs.product_kind(query)][place]
    scale = torch.zeros((), device=DEVICE)

    def run() -> tuple[Tensor, ...]:
        found = key_softmax.key_softmax(query, table, scale, True, config=config)[1]
        assert found is not None
        return (found,)

    again_and_again(run, (mean,))


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("op", OPS)
def test_every_run_has_the_same_bits(op: str, dtype: str) -> None:
    case = of(op)
    inputs = case.inputs(Sizes(ROWS[0], WIDTHS[1], ROWS[1]), NAMES[dtype])
    again_and_again(lambda: evaluate(case, inputs).tensors, evaluate(case, inputs).tensors)


# ---- the last panel


def captured(run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
    """What a run returns, and how to run it once more into the same memory: a CUDA graph where there is a GPU."""
    if not ON_GPU:
        result = run()

        def again() -> None:
            for old, new in zip(result.tensors, run().tensors, strict=True):
                old.copy_(new)

        return result, again
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return result, graph.replay


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", [op for op in OPS if op != "koleo_loss"])
def test_the_ragged_last_panel_in_a_graph(op: str, dtype: str) -> None:
    """Panels of a few tiles, of which the last has rows and columns that fill none."""
    case, sizes = of(op), Sizes(ROWS[1], WIDTHS[0], ROWS[1])

    def changing() -> tuple[Inputs, Inputs]:
        return case.inputs(sizes, NAMES[dtype]), case.inputs(sizes, NAMES[dtype], seed=1)

    inputs, others = changing()
    with ssl_kernels.use_workspace(4.0 if ON_GPU else 0.005):
        result, replay = captured(lambda: evaluate(case, inputs))
        for name, t in inputs.items():
            t.copy_(others[name])
        replay()
        for found, expected in zip(result.tensors, evaluate(case, others).tensors, strict=True):
            assert torch.equal(found, expected)
    assert_close(case, result, reference(case, others), reference(case, others, torch.float64), NAMES[dtype])
