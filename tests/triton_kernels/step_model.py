"""A model of a whole step on a GPU: its panels, what it launches, what that costs the host and the device.

Panels come from the code that cuts them, for a chip that need not be there; launches are counted by rules that
test_launches.py holds against the code; host times are those of host_time.json; device times are made of the same
figures of compiled kernels and published rates as the rest of the report.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fake_device
import torch
from report import PEAKS, Peak, Work, load, tile_work

from ssl_kernels.kernels import configs, key_softmax
from ssl_kernels.ops import panel_shape, panels
from ssl_kernels.settings import CUDA_WORKSPACE_MB

CHIPS = ("sm_90", "sm_80", "sm_100")
BATCHES = (1024, 4096, 16_384, 65_536)
WIDTHS = (256, 512, 768, 1152)
LOSSES = ("SigLIP", "CLIP", "NT-Xent", "InfoNCE")
KEYS = 65_536  # of InfoNCE
HOST = pathlib.Path(__file__).with_name("host_time.json")
_GPU = torch.device("cuda:0")
_NARROW = 64  # features, for which tiles are sized to the L2
_WORKSPACE = int(CUDA_WORKSPACE_MB * 2**20)
_WAITING = _WORKSPACE // 2  # bytes of partial sums


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    on_diagonal: bool = False


@dataclass(frozen=True)
class Step:
    """What the model knows of one step, forward and backward."""

    panels: int  # for gradients, or of the one launch where there is no other
    launches: int
    host_ms: float
    device_ms: float


def cut(loss: str, batch: int, width: int, chip: str, bytes_per_element: int, before: bool) -> list[list[Tile]]:
    """Tiles by panel of rows. ``before``: as they were when every tile was sized to the L2."""
    symmetric = loss == "NT-Xent"
    rows, seam = (2 * batch, batch) if symmetric else (batch, 0)
    workspace, features = (64 * 2**20, _NARROW) if before else (_WORKSPACE, width)
    with fake_device.device(chip):
        m, n = panel_shape.panel_shape(rows, rows, features, bytes_per_element, _GPU, workspace, symmetric)
    row_panels, col_panels = panels._cut(rows, m, seam), panels._cut(rows, n, seam)
    return [
        [
            Tile(row.stop - row.start, col.stop - col.start, symmetric and a == b)
            for b, col in enumerate(col_panels)
            if b >= a or not symmetric
        ]
        for a, row in enumerate(row_panels)
    ]


def additions(tiles: Iterable[Tile], columns: int, stats: int, block_n: int) -> int:
    """How often partial sums of one panel of rows are added up: once, unless they have no room."""
    used = capacity = found = 0
    for tile in tiles:
        size = 4 * stats * tile.rows * math.ceil(tile.columns / block_n)
        capacity = capacity or max(size, min(_WAITING, size * math.ceil(columns / tile.columns)))
        if used + size > capacity:
            found, used = found + 1, 0
        used += size
    return found + 1


@dataclass(frozen=True)
class Part:
    """Launches of one kind: what they do each, and how many there are."""

    kind: str  # of launch, as host_time.json has it
    work: Work
    count: int = 1
    idle: float = 1.0  # what the last wave adds


def block(chip: str, tile: Tile, width: int) -> configs.Config:
    return configs.modelled(chip, "half", PEAKS[chip].multiprocessors, tile.rows, tile.columns, width)


def kernel(chip: str, case: str, tile: Tile, width: int, written: int, before: bool) -> Part:
    """A visit to a tile; ``written`` are the bytes of G, which stay in cache where they did."""
    op = "sigmoid" if case.startswith("large") else "softmax"
    chosen = block(chip, tile, width)
    figures = _budget(op)[f"{chip}-half-bf16-{case}"]
    shape = chosen.block_m, chosen.block_n
    work = tile_work(figures, tile.rows, tile.columns, width, shape, written > 0 and before)
    if not before:
        work += Work(dram_bytes=tile.rows * tile.columns * written)
    slots = PEAKS[chip].multiprocessors * chosen.blocks
    blocks = math.ceil(tile.rows / shape[0]) * math.ceil(tile.columns / shape[1])
    idle = math.ceil(blocks / slots) * slots * shape[0] * shape[1] / (tile.rows * tile.columns)
    kind = "sigmoid" if op == "sigmoid" else case.partition("-")[0]
    return Part(kind, work, idle=idle)


def products(chip: str, tile: Tile, width: int, before: bool) -> Iterator[Part]:
    """G Y, and G^T X but for tiles on the diagonal, each added to what is there in fp32."""
    peak = PEAKS[chip]
    m, n = tile.rows, tile.columns
    shapes = [(m, width, n), (width, n, m)][: 1 if tile.on_diagonal else 2]
    for rows, columns, depth in shapes:
        clocks = panel_shape.product_clocks(rows, columns, depth, peak.multiprocessors)
        ideal = 2 * m * n * width / (panel_shape._FLOP * peak.multiprocessors)
        read = 2 * m * n * width * (1 / panel_shape._TILE[0] + 1 / panel_shape._TILE[1])
        gradient = 8 * (m if depth == n else n) * width
        in_memory = gradient + (0 if before else 2 * m * n)
        yield Part("product", Work(m * n * width, dram_bytes=in_memory, cache_bytes=read), idle=clocks / ideal)


def parts(loss: str, batch: int, width: int, chip: str, before: bool) -> list[Part]:
    """All launches but those that every step has, whatever its size."""
    if loss == "InfoNCE":
        return [_over_keys(chip, batch, width)]
    found: list[Part] = []
    passes = ["large-plain"] if loss == "SigLIP" else ["stats-large-plain", "grad-large-plain"]
    for case in passes:
        makes_gradients = not case.startswith("stats")
        stats = 3 if loss == "SigLIP" else 1 if makes_gradients else 4
        rows = cut(loss, batch, width, chip, 2 if makes_gradients else 0, before)
        columns = sum(tile.columns for tile in rows[0])
        for tiles in rows:
            chosen = block(chip, tiles[0], width)
            sums = Work(dram_bytes=8 * stats * tiles[0].rows * sum(t.columns for t in tiles) / chosen.block_n)
            merged = len(tiles) if before else additions(tiles, columns, stats, chosen.block_n)
            for tile in tiles:
                found.append(kernel(chip, case, tile, width, 2 * makes_gradients, before))
                if makes_gradients:
                    found += products(chip, tile, width, before)
                    small = (7 if loss != "SigLIP" else 0) if before else 0  # shares, and a copy of sums
                    found.append(Part("other operation", Work(), small + tile.on_diagonal))
                elif not tile.on_diagonal:
                    by_column = Work(dram_bytes=8 * stats * tile.columns * tile.rows / chosen.block_m)
                    found.append(Part("merge", by_column))
                found.append(Part("panel", Work()))
            found.append(Part("other operation", sums, 2 * merged) if makes_gradients else Part("merge", sums, merged))
    if before and loss != "InfoNCE":
        sides = 2 * batch * width
        found.append(Part("other operation", Work(dram_bytes=8 * sides), 2))  # a division by one
    return found


def _over_keys(chip: str, batch: int, width: int) -> Part:
    """InfoNCE's one kernel: for every 256 columns of the mean, similarities are made anew."""
    deep = key_softmax.CONFIGS[chip, "half"][1]
    assert deep.block_d is not None
    figures, chunks = _budget("key_softmax")[f"{chip}-half-bf16-bf16-deep-mean"], math.ceil(width / deep.block_e)
    elements = batch * KEYS * chunks
    mean = min(width, deep.block_e)
    read = (1 / deep.block_m + 1 / deep.block_n) * width * 2 + mean * 2 / deep.block_m
    instructions = figures["before"] + figures["after"] + figures["loop"] * width / 512  # features of the budget
    work = Work(
        elements * (width + mean),
        elements * instructions,
        elements * figures["special_functions"],
        (batch + KEYS) * width * 2,
        elements * read,
    )
    return Part("keys and merge", work)


# Launches of a step that do not depend on its size, as test_launches.py counts them: operations of torch, and the
# kernels of what is made of the statistics.
FIXED = {"SigLIP": 9, "CLIP": 10, "NT-Xent": 11, "InfoNCE": 4}


@functools.cache
def step(loss: str, batch: int, width: int, chip: str, before: bool = False) -> Step:
    found, peak = parts(loss, batch, width, chip, before), PEAKS[chip]
    launched = [part for part in found if part.kind != "panel"]
    launches = sum(part.count for part in launched) + FIXED[loss] + (loss == "InfoNCE")
    start = configs._START_CLOCKS / (peak.clock_ghz * 1e6)
    device = sum(_time(part, peak) + start * part.count for part in launched) + FIXED[loss] * start
    sides = (1 if loss == "InfoNCE" else 2) * batch * width
    device += Work(dram_bytes=6 * sides).milliseconds(peak)["memory"]  # gradients, cast last
    gradient_tiles = sum(part.kind in ("sigmoid", "grad", "keys and merge") for part in found)
    return Step(gradient_tiles, launches, host_ms(loss, found, before), device)


def _time(part: Part, peak: Peak) -> float:
    times = part.work.milliseconds(peak)
    memory = times.pop("memory")
    return max(memory, max(times.values()) * part.idle)


def host_ms(loss: str, found: Iterable[Part], before: bool) -> float:
    """What was measured of a step of one panel, and what the others add."""
    record = host_record()
    cost, small = _units(record["microseconds"], before), _units(record["microseconds"], False)
    one_panel = parts(loss, 64, 64, "sm_90", False)
    more = _total(found, cost) - _total(one_panel, small)
    return float(record["step of one panel"][loss] + more) / 1000


def _total(found: Iterable[Part], cost: dict[str, float]) -> float:
    counts: Counter[str] = Counter()
    for part in found:
        counts[part.kind] += part.count
    return sum(cost[kind] * count for kind, count in counts.items())


def _units(measured: dict[str, float], before: bool) -> dict[str, float]:
    """Microseconds of a launch by its kind. Before, each made its descriptors, memory, views and choices anew."""
    if not before:
        return measured
    other = measured["other operation"]
    return measured | {
        "sigmoid": measured["sigmoid and sums, alone"] - 2 * other,
        "grad": measured["grad and sums, alone"] - 2 * other,
        "stats": measured["stats and sums, alone"] - measured["merge"],
        "panel": measured["panel"] + 6 * measured["view or allocation"],
    }


@functools.cache
def host_record() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(HOST.read_text())
    return record


@functools.cache
def _budget(op: str) -> dict[str, Any]:
    cases: dict[str, Any] = load(op)["cases"]
    return cases


_TEXT = """## Model of a whole step

Loss and gradients of bf16 features in one process, forward and backward: SigLIP and CLIP of B pairs, NT-Xent of B
pairs (2 B rows against themselves), InfoNCE of B queries against {keys:,} keys. Nothing of it was measured on a GPU.

- *Panels* are those that make gradients; where the statistics of a softmax are made, they are fewer and larger.
  *Launches* are all that a step gives the device to do. Both are what the code does with fake tensors of these sizes
  on a chip that is not there; a test compares them.
- *Host* is what Python, torch and Triton take to launch it all, with the last call, into the driver, left out. It was
  measured on a CPU, and is a figure of that kind of CPU: {processor}, one thread, {versions}. What the CUDA driver
  and cuBLAS take of each launch comes on top.
- *Device* adds up the launches. Each takes the largest of the quotients of the tables above, but tiles come in whole
  waves of the multiprocessors; the products that make dX and dY are in it, in tiles of {tile_m} x {tile_n} whose
  operands come from the caches; tiles that do not stay in the L2 are written to memory and read twice; and each
  launch takes {start:,} clocks to begin and end.

A step takes the longer of host and device. Cells hold *panels / launches / host, ms / device, ms*, in two lines: as
it was when every tile was sized to the L2, and as it is. Then a panel took five launches: its kernel, two products,
and two operations that added up sums of rows. In the softmax losses it took seven more, and a visit for statistics
three. Now it takes the kernel and the two products (one on the diagonal of NT-Xent, where an operation halves the
sums). The sums of rows are added up once for all panels of the same rows, not once for the whole matrix: kept for all
of it they would take 402 MB at B = 65,536. Below D = {wide} tiles are sized to the L2 as before. InfoNCE has one
kernel and no panels; it makes similarities anew for every 256 columns of the mean, so that its time grows faster than
D. What a step launches whatever its size, for vectors and scalars, is counted in both lines as it is now:
{fixed}.

| one launch, or one step of one panel | host, microseconds: before | now |
|---|---|---|
{units}

{tables}
### At less than the published rates

The model lets every published rate be reached, which no kernel does. For an H100 at B = 65,536 it gives
{wide_ms:.1f} ms for SigLIP at D = 768, {narrow_ms:.1f} ms at D = 512, and {clip_ms:.1f} ms for CLIP at D = 512.
At 70% of all rates they would be {wide_slow:.0f}, {narrow_slow:.0f} and {clip_slow:.0f} ms.
"""


def section() -> str:
    """Of the report."""
    record = host_record()
    siglip, narrow, clip = (step(*at, "sm_90") for at in (("SigLIP", 65_536, 768), ("SigLIP", 65_536, 512),
                                                          ("CLIP", 65_536, 512)))  # fmt: skip
    return _TEXT.format(
        keys=KEYS, fixed=", ".join(f"{count} for {loss}" for loss, count in FIXED.items()),
        processor=record["processor"], versions=record["versions"], tile_m=panel_shape._TILE[0],
        tile_n=panel_shape._TILE[1], start=configs._START_CLOCKS, wide=panel_shape._WIDE, units=_unit_rows(record),
        tables="\n".join(_table(chip) for chip in CHIPS),
        wide_ms=siglip.device_ms, narrow_ms=narrow.device_ms, clip_ms=clip.device_ms, wide_slow=siglip.device_ms / 0.7,
        narrow_slow=narrow.device_ms / 0.7, clip_slow=clip.device_ms / 0.7,
    )  # fmt: skip


def _unit_rows(record: dict[str, Any]) -> str:
    names = {
        "sigmoid": "sigmoid kernel", "grad": "softmax kernel, gradient tile", "stats": "softmax kernel, statistics",
        "merge": "softmax kernel, merging statistics", "keys and merge": "both kernels of InfoNCE",
        "product": "matrix product", "other operation": "other operation of torch",
        "panel": "what drives the panels, to each",
    }  # fmt: skip
    before, now = (_units(record["microseconds"], era) for era in (True, False))
    lines = [f"| {text} | {before[kind]:.1f} | {now[kind]:.1f} |" for kind, text in names.items()]
    lines += [f"| a step of one panel, {loss} | - | {whole:,} |" for loss, whole in record["step of one panel"].items()]
    return "\n".join(lines)


def _table(chip: str) -> str:
    lines = [
        f"### {PEAKS[chip].name} (model of a step)\n",
        "| loss, B | " + " | ".join(f"D = {width:,}" for width in WIDTHS) + " |",
        "|---|" + "---|" * len(WIDTHS),
    ]
    for loss in LOSSES:
        for batch in BATCHES:
            cells = []
            for width in WIDTHS:
                before, now = (_cell(step(loss, batch, width, chip, era)) for era in (True, False))
                cells.append(now if loss == "InfoNCE" else f"{before}<br>{now}")
            lines.append(f"| {loss}, {batch:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(of: Step) -> str:
    return f"{of.panels:,} / {of.launches:,} / {of.host_ms:.2g} / {of.device_ms:.3g}"
