"""Long CPU work in calls that are short enough for Ctrl-C.

Python looks for signals between two calls of a kernel, never within one. A kernel that would run for seconds is called
over one range of rows after the other, so that KeyboardInterrupt, or whatever else a signal's handler does, waits for
one range only.
"""

from __future__ import annotations

import torch

_ELEMENTS_PER_THREAD = 2**23  # some tens of milliseconds, beside which a call costs nothing


def spans(rows: int, elements: int) -> list[tuple[int, int]]:
    """Ranges (begin, end) that cover ``rows`` rows of so many elements each, a multiple of 8 rows where many fit."""
    if 0 < rows * elements <= _ELEMENTS_PER_THREAD:
        return [(0, rows)]
    step = max(1, _ELEMENTS_PER_THREAD * torch.get_num_threads() // max(1, elements))
    step = step // 8 * 8 or step
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
