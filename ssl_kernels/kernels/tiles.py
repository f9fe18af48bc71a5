"""What the kernels that visit the similarity matrix tile by tile have in common.

A panel is x [m, D] against y [n, D]. Each program forms one tile x_i . y_j in an fp32 accumulator and hands it to the
epilogue of its loss; how the matrix is cut depends on the chip and on the kind of product alone, so one table of
configurations serves all of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


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


# Every shipped configuration, by chip family and by kind of product: each is emulated by the tests, and compiled with
# no spills. The first of a pair is for full panels of features whose rows are aligned; the second, with a smaller tile,
# for the rest (see choose_config). One thread holds 32 similarities, or 64 where it can take them half by half.
CONFIGS: dict[tuple[str, str], tuple[Config, Config]] = {
    ("sm_80", "half"): (Config(128, 128, 32, 8, 3, halves=True), Config(64, 64, 64, 4, 3)),
    ("sm_80", "tf32"): (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3)),
    ("sm_80", "ieee"): (Config(128, 64, 16, 8, 2), Config(64, 32, 16, 4, 2)),
    ("sm_90", "half"): (Config(256, 128, 128, 8, 2, halves=True, descriptors=True), Config(64, 64, 64, 4, 3)),
    ("sm_90", "tf32"): (Config(128, 128, 64, 8, 2, halves=True, descriptors=True), Config(64, 64, 32, 4, 3)),
    ("sm_90", "ieee"): (Config(128, 64, 16, 8, 3), Config(64, 32, 16, 4, 2)),
    ("sm_100", "half"): (Config(128, 128, 128, 8, 3, halves=True, descriptors=True), Config(64, 64, 64, 4, 3)),
    ("sm_100", "tf32"): (Config(128, 128, 64, 8, 3, halves=True, descriptors=True), Config(64, 64, 32, 4, 3)),
    ("sm_100", "ieee"): (Config(128, 64, 16, 8, 2), Config(64, 32, 16, 4, 2)),
    ("gfx9", "half"): (Config(128, 128, 64, 8, 2), Config(64, 64, 64, 4, 2)),
    ("gfx9", "tf32"): (Config(128, 64, 32, 8, 2), Config(64, 64, 32, 4, 2)),
    ("gfx9", "ieee"): (Config(128, 64, 16, 8, 2), Config(64, 64, 16, 4, 2)),
}


@triton.jit
def locate_tile(program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column block of a program. Programs walk down GROUP_M row blocks before they move to the next column
    block, so that those in flight share rows of x and of y in L2."""
    blocks_m = tl.cdiv(m, BLOCK_M).to(tl.int32)
    blocks_n = tl.cdiv(n, BLOCK_N).to(tl.int32)
    group = program // (GROUP_M * blocks_n)
    within = program % (GROUP_M * blocks_n)
    group_size = min(blocks_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % group_size, within // group_size


@triton.jit
def similarities(
    X,  # [m, D], or a descriptor of it in blocks [BLOCK_M, BLOCK_D]
    Y,  # [n, D], likewise in blocks [BLOCK_N, BLOCK_D]
    m,
    n,
    D,
    first_row,
    first_col,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    EVEN_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x_i . y_j of a tile, [BLOCK_M, BLOCK_N] fp32; zero beyond the panel, unless infinity meets the padding there.

    By pointers each step of the product costs a thread addresses, masks and copies: 22 instructions per element of a
    tile of 128 x 128 at D = 768 on sm_90, more than all of the sigmoid loss. By descriptors it costs 5, of a tile of
    256 x 128, and zeros beyond the panel are filled in.
    """
    raw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if isinstance(X, tl.tensor_descriptor):
        tl.assume(D > 0)  # or zeros would be made twice
        for d in range(0, D, BLOCK_D):
            x = X.load([first_row.to(tl.int32), d])
            y = Y.load([first_col.to(tl.int32), d])
            raw = tl.dot(x, tl.trans(y), raw, input_precision=INPUT_PRECISION)
    else:
        rows = first_row + tl.arange(0, BLOCK_M)
        cols = first_col + tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_D)
        row_ok = rows < m
        col_ok = cols < n
        x_at = X + rows[:, None] * stride_xm + depth[None, :].to(tl.int64) * stride_xd
        y_at = Y + cols[None, :] * stride_yn + depth[:, None].to(tl.int64) * stride_yd
        for d in range(0, D, BLOCK_D):
            if EVEN_D:
                x = tl.load(x_at, mask=row_ok[:, None], other=0.0)
                y = tl.load(y_at, mask=col_ok[None, :], other=0.0)
            else:
                x = tl.load(x_at, mask=row_ok[:, None] & (depth < D - d)[None, :], other=0.0)
                y = tl.load(y_at, mask=col_ok[None, :] & (depth < D - d)[:, None], other=0.0)
            raw = tl.dot(x, y, raw, input_precision=INPUT_PRECISION)
            x_at += BLOCK_D * tl.cast(stride_xd, tl.int64)
            y_at += BLOCK_D * tl.cast(stride_yd, tl.int64)
    return raw


@triton.jit
def split_columns(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


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


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Kernels launched inside go to ``device``, whichever is current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def product_kind(features: Tensor) -> str:
    """How features are multiplied: "half" if of 16 bits, else as torch multiplies fp32 just now: "ieee" or "tf32"."""
    if features.dtype != torch.float32:
        return "half"
    # Set by torch.set_float32_matmul_precision too, whose getter raises once this newer setting has been used.
    wanted = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if wanted and device_traits(features.device)[1] else "ieee"


def choose_config(x: Tensor, y: Tensor, grad: Tensor | None) -> Config:
    """The entry of CONFIGS for these panels.

    The large tile needs rows that are aligned for wide loads and stores, which keep addresses in few registers, and
    enough tiles to occupy the chip. A model meets these two tiles only, so nothing is compiled after the first steps.
    """
    family, _, multiprocessors = device_traits(x.device)
    large, small = CONFIGS[family, product_kind(x)]
    tiles = triton.cdiv(x.shape[0], large.block_m) * triton.cdiv(y.shape[0], large.block_n)
    aligned = all(t is None or is_aligned(t) for t in (x, y, grad))
    return large if aligned and tiles >= multiprocessors else small


def narrowed(config: Config, held: int) -> Config:
    """The configuration with at most 128 rows and so few columns that a thread of NVIDIA holds at most so many
    similarities, all at a time if they are 32."""
    rows = min(config.block_m, 128)
    columns = min(config.block_n, held * 32 * config.num_warps // rows)
    return replace(config, block_m=rows, block_n=columns, halves=config.halves and held > 32)


def is_aligned(matrix: Tensor) -> bool:
    """Whether each row starts at a multiple of 16 bytes and elements, and is contiguous and beside the others."""
    rows_apart = matrix.stride(0) % 16 == 0 and matrix.stride(0) >= matrix.shape[1]
    return matrix.stride(1) == 1 and rows_apart and matrix.data_ptr() % 16 == 0


def operands(
    config: Config, x: Tensor, y: Tensor, grad: Tensor | None
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor, Tensor | TensorDescriptor | None]:
    """The three as a kernel takes them: as descriptors of their blocks, or as they are."""
    if not config.descriptors or not all(t is None or is_aligned(t) for t in (x, y, grad)):
        return x, y, grad
    width = config.block_n // 2 if config.halves else config.block_n
    return (
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_d]),
        TensorDescriptor.from_tensor(y, [config.block_n, config.block_d]),
        None if grad is None else TensorDescriptor.from_tensor(grad, [config.block_m, width]),
    )
