"""How the tile kernels are cut: every shipped configuration, and the model that chooses among them.

The model counts clocks of one multiprocessor. For a tile of block_m x block_n similarities of D features

    product   2 block_m block_n D / (FLOP of the matrix unit per clock)
    load      (block_m + block_n) D bytes / (bytes from L2 per clock)
    epilogue  block_m block_n instructions per element / (instructions per clock)
    start     a constant: the launch, the first loads, the last stores

A program alone takes alone = max(product, load) + epilogue + start. Where several share a multiprocessor, the epilogue
of one hides behind the product of another, and each costs no less than busy = max(product, load, epilogue). A panel is
done when the multiprocessor with the most tiles is:

    max(t busy, ceil(t / blocks) alone),    t = ceil(tiles / multiprocessors)

Large tiles load less, small ones leave fewer multiprocessors idle. The rates are published ones and nothing of this was
measured; ``SSL_KERNELS_AUTOTUNE=1`` measures on the card at hand instead (see autotune.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from ssl_kernels.kernels import autotune

AnyConfig = TypeVar("AnyConfig")


@dataclass(frozen=True)
class Config:
    """How one program of a kernel is cut."""

    block_m: int
    block_n: int
    block_d: int  # depth of one step of the matrix product
    num_warps: int
    num_stages: int
    halves: bool = False  # run the epilogue on one half of the columns after the other: fewer registers
    group_m: int = 8  # row blocks that are visited before the next column block
    descriptors: bool = False  # rows that are aligned are loaded and stored by the chip's engine for tensors (TMA)
    blocks: int = 1  # programs that share a multiprocessor


# Every shipped configuration, by chip family and by kind of product: each is emulated by the tests, and compiled with
# no spills. The last of each also serves rows that are not aligned; the others load and store them in wide pieces,
# whose addresses take few registers. A thread holds 32 similarities, or 64 where it can take them half by half.
CONFIGS: dict[tuple[str, str], tuple[Config, ...]] = {
    ("sm_80", "half"): (Config(128, 128, 32, 8, 3, halves=True), Config(64, 64, 64, 4, 3, blocks=2)),
    ("sm_80", "tf32"): (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3, blocks=2)),
    ("sm_80", "ieee"): (Config(128, 64, 16, 8, 2), Config(64, 32, 16, 4, 2, blocks=2)),
    ("sm_90", "half"): (Config(256, 128, 128, 8, 2, halves=True, descriptors=True), Config(64, 64, 64, 4, 3, blocks=2)),
    ("sm_90", "tf32"): (Config(128, 128, 64, 8, 2, halves=True, descriptors=True), Config(64, 64, 32, 4, 3, blocks=2)),
    ("sm_90", "ieee"): (Config(128, 64, 16, 8, 2), Config(64, 32, 16, 4, 2, blocks=2)),
    ("sm_100", "half"): (
        Config(128, 128, 128, 8, 3, halves=True, descriptors=True),
        Config(64, 64, 64, 4, 3, blocks=2),
    ),
    ("sm_100", "tf32"): (Config(128, 128, 64, 8, 3, halves=True, descriptors=True), Config(64, 64, 32, 4, 3, blocks=2)),
    ("sm_100", "ieee"): (Config(128, 64, 16, 8, 2), Config(64, 32, 16, 4, 2, blocks=2)),
    ("gfx9", "half"): (Config(128, 128, 64, 8, 2), Config(64, 64, 64, 4, 2, blocks=2)),
    ("gfx9", "tf32"): (Config(128, 64, 32, 8, 2), Config(64, 64, 32, 4, 2, blocks=2)),
    ("gfx9", "ieee"): (Config(128, 64, 16, 8, 2), Config(64, 64, 16, 4, 2, blocks=2)),
}


# Triton before 3.8 needs more registers for the same tile: some that fit with 3.8 would spill. The functions that fit a
# configuration to what a kernel is asked for (config_for and its like) look at this where one shape cannot serve all.
HAS_OLD_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)

# Of one multiprocessor of an A100, an H100 SXM, a B200 and an MI300X, per clock. FLOP by kind of product as their data
# sheets have them; bytes from L2 as microbenchmarks reach them, which is less than the peak.
_FLOP = {
    "sm_80": {"half": 2048, "tf32": 1024, "ieee": 128},
    "sm_90": {"half": 4096, "tf32": 2048, "ieee": 256},
    "sm_100": {"half": 8192, "tf32": 4096, "ieee": 256},
    "gfx9": {"half": 2048, "tf32": 1024, "ieee": 256},
}
_L2_BYTES = 32
_INSTRUCTIONS = 128  # of a thread, issued
_EPILOGUE_INSTRUCTIONS = 24  # of an element: more than sigmoid's, less than those of softmax with ids
_START_CLOCKS = 2000


def clocks(config: Config, family: str, kind: str, multiprocessors: int, m: int, n: int, width: int) -> float:
    """What a panel [m, width] against [n, width] takes by the model."""
    elements = config.block_m * config.block_n
    depth = math.ceil(width / config.block_d) * config.block_d
    product = 2 * elements * depth / _FLOP[family][kind]
    load = (config.block_m + config.block_n) * depth * (2 if kind == "half" else 4) / _L2_BYTES
    epilogue = elements * _EPILOGUE_INSTRUCTIONS / _INSTRUCTIONS
    tiles = math.ceil(m / config.block_m) * math.ceil(n / config.block_n)
    fullest = math.ceil(tiles / multiprocessors)
    alone = max(product, load) + epilogue + _START_CLOCKS
    return max(fullest * max(product, load, epilogue), math.ceil(fullest / config.blocks) * alone)


@functools.lru_cache(maxsize=1024)
def modelled(family: str, kind: str, multiprocessors: int, m: int, n: int, width: int) -> Config:
    """The configuration for rows that are aligned with the fewest clocks, the first of equals."""
    return min(CONFIGS[family, kind], key=lambda c: clocks(c, family, kind, multiprocessors, m, n, width))


def choose_config(
    kernel: str,
    x: Tensor,
    y: Tensor,
    grad: Tensor | None,
    launch: Callable[[Config], Any],
    *,
    has_ids: bool = False,
) -> Config:
    """The entry of CONFIGS for these panels, as modelled, or as measured where that is asked for.

    Args:
        kernel: its name.
        x: rows of the panel [m, D].
        y: its columns [n, D].
        grad: [m, n], what is written, or None.
        launch: runs the kernel with a configuration, in a way that may be repeated.
        has_ids: whether pairs are compared by ids.
    """
    family, _, multiprocessors = device_traits(x.device)
    kind, (m, width), n = product_kind(x), x.shape, y.shape[0]
    if not all(t is None or is_aligned(t) for t in (x, y, grad)):
        return CONFIGS[family, kind][-1]
    wants = f"{' ids' if has_ids else ''}{' gradient' if grad is not None else ''}"
    found = measured(kernel, x, y, wants, CONFIGS[family, kind], launch)
    return found or modelled(family, kind, multiprocessors, m, n, width)


def measured(
    kernel: str, x: Tensor, y: Tensor, wants: str, configs: Sequence[AnyConfig], launch: Callable[[AnyConfig], Any]
) -> AnyConfig | None:
    """The fastest of several for panels x [m, D] and y [n, D] of this class of shapes; None where nobody asks for
    measurements, or none can be made now. ``wants`` is what else decides, in words."""
    if not autotune.is_wanted(x.device):
        return None
    rows, cols = (1 << (t.shape[0] - 1).bit_length() for t in (x, y))
    shapes = f"{x.dtype} {product_kind(x)}{wants} {rows} x {cols} x {x.shape[1]}"
    return autotune.fastest(kernel, shapes, x.device, configs, launch)


def narrowed(config: Config, held: int) -> Config:
    """The configuration with at most 128 rows and so few columns that a thread of NVIDIA holds at most so many
    similarities, all at a time if they are 32."""
    rows = min(config.block_m, 128)
    columns = min(config.block_n, held * 32 * config.num_warps // rows)
    return replace(config, block_m=rows, block_n=columns, halves=config.halves and held > 32)


@functools.cache
def device_traits(device: torch.device) -> tuple[str, bool, int]:
    """(chip family in CONFIGS, whether the chip multiplies tf32, multiprocessors)."""
    if device.type != "cuda":
        return "sm_80", True, 1  # the interpreter
    properties = torch.cuda.get_device_properties(device)
    multiprocessors = properties.multi_processor_count
    if torch.version.hip is not None:
        return "gfx9", properties.gcnArchName.startswith("gfx942"), multiprocessors
    # Chips between and beyond the three (Ada, consumer Blackwell) take what suits sm_80: its configurations also fit
    # into their 99 KB of shared memory.
    return {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80"), properties.major >= 8, multiprocessors


def product_kind(features: Tensor) -> str:
    """How features are multiplied: "half" if of 16 bits, else as torch multiplies fp32 just now: "ieee" or "tf32"."""
    if features.dtype != torch.float32:
        return "half"
    # Set by torch.set_float32_matmul_precision too, whose getter raises once this newer setting has been used.
    wanted = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if wanted and device_traits(features.device)[1] else "ieee"


def is_aligned(matrix: Tensor) -> bool:
    """Whether each row starts at a multiple of 16 bytes and elements, and is contiguous, beside the others and not
    empty."""
    (_, width), (rows_apart, features_apart) = matrix.shape, matrix.stride()
    return features_apart == 1 and rows_apart % 16 == 0 and rows_apart >= width > 0 and matrix.data_ptr() % 16 == 0
