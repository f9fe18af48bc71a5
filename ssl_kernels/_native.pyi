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
