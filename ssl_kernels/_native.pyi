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
    row_ids: NDArray[np.int64] | None = None,
    col_ids: NDArray[np.int64] | None = None,
    ignore_same_id: bool = False,
    positive: int = 0,
    excluded: int = ...,
    *,
    row_side: NDArray[np.float32],
    col_side: NDArray[np.float32],
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
def koleo_panel(
    tile: NDArray[np.float32],
    best: NDArray[np.float32],
    neighbor: NDArray[np.int64],
    first_row: int,
    first_col: int,
    isa: str | None = None,
) -> None: ...
def enqueue(
    queue: NDArray[Any], pointer: int, keys: NDArray[Any], normalize: bool = False, isa: str | None = None
) -> int: ...
def ema_update(
    targets: list[NDArray[Any]],
    sources: list[NDArray[Any]],
    momentum: float,
    copies: list[NDArray[Any]] = ...,
    parts: int = 1,
    isa: str | None = None,
) -> None: ...
def dino(
    students: NDArray[Any],
    teachers: NDArray[Any],
    center: NDArray[np.float32] | None = None,
    weights: NDArray[np.float32] | None = None,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    distinct: bool = True,
    teacher_probs: bool = False,
    stream_gradient: bool = False,
    isa: str | None = None,
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.float32]]: ...
def sinkhorn_column_lse(
    rows: NDArray[Any], temp: float, isa: str | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def sinkhorn_column_sums(
    rows: NDArray[Any], center: NDArray[np.float32] | None, temp: float, isa: str | None = None
) -> NDArray[np.float32]: ...
def centered_softmax(
    rows: NDArray[Any], center: NDArray[np.float32] | None, temp: float, isa: str | None = None
) -> NDArray[np.float32]: ...
