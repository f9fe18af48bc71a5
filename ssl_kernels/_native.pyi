from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, Any]: ...
def sigmoid_panel(
    tile: NDArray[np.float32],
    stats: NDArray[np.float64],
    scale: float,
    bias: float,
    row_ids: NDArray[np.int64] | None = None,
    col_ids: NDArray[np.int64] | None = None,
    ignore_same_id: bool = False,
    diagonal: int = 0,
    write_grad: bool = True,
    isa: str | None = None,
) -> None: ...
def softmax_stats(
    tile: NDArray[np.float32],
    row_stats: NDArray[np.float64],
    col_stats: NDArray[np.float64] | None,
    scale: float,
    row_ids: NDArray[np.int64] | None = None,
    col_ids: NDArray[np.int64] | None = None,
    ignore_same_id: bool = False,
    positive: int = 0,
    excluded: int = ...,
    parts: int = 1,
    isa: str | None = None,
) -> None: ...
def softmax_grad(
    tile: NDArray[np.float32],
    stats: NDArray[np.float64],
    scale: float,
    row_lse: NDArray[np.float64],
    col_lse: NDArray[np.float64],
    row_weight: NDArray[np.float32],
    col_weight: NDArray[np.float32],
    row_target: NDArray[np.float32],
    col_target: NDArray[np.float32],
    row_uniform: NDArray[np.float32] | None = None,
    col_uniform: NDArray[np.float32] | None = None,
    row_ids: NDArray[np.int64] | None = None,
    col_ids: NDArray[np.int64] | None = None,
    ignore_same_id: bool = False,
    positive: int = 0,
    excluded: int = ...,
    write: bool = True,
    isa: str | None = None,
) -> None: ...
def key_softmax_panel(
    tile: NDArray[np.float32],
    stats: NDArray[np.float64],
    mean: NDArray[np.float32] | None,
    scale: float,
    isa: str | None = None,
) -> None: ...
def enqueue(
    queue: NDArray[Any], pointer: int, keys: NDArray[Any], normalize: bool = False, isa: str | None = None
) -> int: ...
