"""Inputs and oracles that the tests of the tile kernels share."""

from __future__ import annotations

import mmap
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ["none", "positive", "ignore"]
NOWHERE = 2**40  # a diagonal that meets no panel
# Relative rounding error of each dtype, in which gradient tiles are stored.
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Half of the smallest spacing; fp32 below the normal range may be flushed to zero, and so may bf16.
TINY = {torch.float32: 2**-125, torch.bfloat16: 2**-125, torch.float16: 2**-25}


def features(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=1).to(dtype)


def rows_far_apart(rows: int, width: int) -> Tensor:
    """Zeros in bf16, each row 2^30 elements from the last: its number times the stride overflows 32 bits."""
    stride = 2**30
    size = 2 * ((rows - 1) * stride + width)
    with tempfile.TemporaryFile() as sparse:  # takes no more room than what is written
        sparse.truncate(size)
        flat = torch.frombuffer(mmap.mmap(sparse.fileno(), size), dtype=torch.bfloat16)
    return flat.as_strided((rows, width), (stride, 1))


def tile_with_padding(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for G of a panel, within a wider matrix that is full of sevens."""
    return torch.full((rows, -(-columns // 16) * 16 + 16), 7.0, dtype=dtype)[:, :columns]


def assert_only_padding_is_overwritten(tile: Tensor) -> None:
    """Behind its last column what is stored in pieces of 16 bytes may have been written, and nothing else."""
    rows, columns = tile.shape
    piece = 16 // tile.itemsize
    whole = tile.as_strided((rows, tile.stride(0)), (tile.stride(0), 1))
    assert (whole[:, -(-columns // piece) * piece :] == 7).all()


def make_ids(kind: str, m: int, n: int, values: int = 5) -> tuple[Tensor, Tensor] | None:
    if kind == "none":
        return None
    # Beyond 2^32, and equal in their low halves: a comparison in 32 bits would find them all the same.
    return torch.randint(values, (m,)) * 2**33, torch.randint(values, (n,)) * 2**33


def cut_to_tf32(x: Tensor) -> Tensor:
    bits = x.numpy().view(np.uint32)
    return torch.from_numpy((bits & 0xFFFFE000).view(np.float32))


def pair_masks(
    m: int, n: int, ids: tuple[Tensor, Tensor] | None, ignore_same_id: bool, positive: int, excluded: int
) -> tuple[Tensor, Tensor]:
    """Which pairs are positive, and which are kept."""
    is_positive, kept = torch.zeros(m, n, dtype=torch.bool), torch.ones(m, n, dtype=torch.bool)
    for i in range(m):
        if 0 <= i + positive < n:
            is_positive[i, i + positive] = True
    if ids is not None:
        same = ids[0][:, None] == ids[1][None, :]
        if ignore_same_id:
            kept = is_positive | ~same
        else:
            is_positive = is_positive | same
    for i in range(m):
        if 0 <= i + excluded < n:
            kept[i, i + excluded] = False
    return is_positive & kept, kept


def shipped(configs: dict[tuple[str, str], Any], kind: str) -> list[Any]:
    """Every shape of tile for a kind of product. Warps, stages and blocks mean nothing to the interpreter."""
    found = [c for (_, its_kind), choices in configs.items() if its_kind == kind for c in choices]
    unseen = {"num_warps": 4, "num_stages": 2} | ({"blocks": 1} if hasattr(found[0], "blocks") else {})
    return list(dict.fromkeys(replace(c, **unseen) for c in found))
