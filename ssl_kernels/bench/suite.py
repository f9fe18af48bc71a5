"""The ops that are measured, the cases of a run, and what pytest runs for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ssl_kernels.bench.clip import CLIP
from ssl_kernels.bench.dino import DINO, DINO_16_BITS
from ssl_kernels.bench.ema import EMA, EMA_16_BITS
from ssl_kernels.bench.ibot import WITH_CENTER, WITH_SINKHORN
from ssl_kernels.bench.info_nce import INFO_NCE
from ssl_kernels.bench.koleo import KOLEO
from ssl_kernels.bench.metric_learning import METRIC_NT_XENT, METRIC_SUP_CON
from ssl_kernels.bench.nt_xent import NT_XENT
from ssl_kernels.bench.problem import Case
from ssl_kernels.bench.queue import QUEUE
from ssl_kernels.bench.row_softmax import ROW_GUIDE, ROW_PREFIXES, ROW_SOFTMAX
from ssl_kernels.bench.sigmoid import SIGMOID
from ssl_kernels.bench.sinkhorn import SINKHORN
from ssl_kernels.bench.small import SMALL
from ssl_kernels.bench.vicreg import BARLOW_TWINS, VICREG

OPS = (
    *(SIGMOID, CLIP, NT_XENT, METRIC_NT_XENT, METRIC_SUP_CON, INFO_NCE, QUEUE),
    *(ROW_SOFTMAX, ROW_PREFIXES, ROW_GUIDE),
    *(DINO, DINO_16_BITS, WITH_SINKHORN, WITH_CENTER, SINKHORN),
    *(KOLEO, VICREG, BARLOW_TWINS, EMA, EMA_16_BITS, SMALL),
)
NAMES = tuple(dict.fromkeys(op.name for op in OPS))
SIZES = ("full", "quick", "tiny")  # tiny says that it runs, not how fast
MOST_DENSE = 8192  # rows of a matrix that a formula keeps several times over


def cases(names: Sequence[str] = NAMES, size: str = "full") -> list[Case]:
    """What a run measures, each case once, in the order of the ops and of what a reader looks for first."""
    found = []
    for op in (op for op in OPS if op.name in names):
        shapes = list(op.tiny if size == "tiny" else op.quick or op.shapes[:1] if size == "quick" else op.shapes)
        providers = [name for name in op.providers if size != "quick" or name != "compile"]
        for shape in shapes:
            modes = op.modes[-1:] if size == "quick" or shape != shapes[0] else op.modes
            found += [Case(op, shape, provider, mode) for mode in modes for provider in providers]
        for shape in op.sweep if size == "full" else ():
            swept = ("ours", op.peer, "eager") if op.rows(*shape) <= MOST_DENSE else ("ours",)
            found += [Case(op, shape, provider, op.modes[-1]) for provider in swept if shape not in shapes]
    return found


def bench_op(measure: Callable[[Case], None], case: Case) -> None:
    """What pytest runs, of `cases()`, by the fixture of `plugin.py`."""
    measure(case)
