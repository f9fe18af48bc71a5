"""Write what the compiled kernels cost: the budgets beside this file, and docs/gpu_static.md, which is made of them.

python tests/triton_kernels/report.py                                    every budget, and the report
python tests/triton_kernels/report.py --text                             the report alone, of the budgets that are there
python tests/triton_kernels/report.py --kernel sigmoid --chip sm_90      only print the figures of these
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import pathlib
from dataclasses import dataclass
from typing import Any

FOLDER = pathlib.Path(__file__).parent
REPORT = FOLDER.parents[1] / "docs" / "gpu_static.md"
OPS = ("sigmoid", "softmax", "row_softmax", "key_softmax", "koleo", "dino", "sinkhorn", "queue")
WIDTH = 768  # of features, for which the budgets count


@dataclass(frozen=True)
class Peak:
    """Of a chip, as published. Rates are per clock and multiprocessor, in operations of one thread."""

    name: str
    multiprocessors: int
    clock_ghz: float
    matrix_tflops: float  # dense, 16-bit operands, fp32 accumulators
    dram_gb_per_s: float
    cache_gb_per_s: float
    issue: int = 128
    special: int = 16


PEAKS = {
    "sm_80": Peak("A100 SXM 80 GB", 108, 1.41, 312, 2039, 7219),
    "sm_90": Peak("H100 SXM", 132, 1.83, 989, 3350, 9370),
    "sm_100": Peak("B200", 148, 1.85, 2250, 8000, 9472),
    "gfx942": Peak("MI300X", 304, 2.10, 1307, 5300, 17200, issue=64, special=16),
}

INTRODUCTION = """# Static figures of the GPU kernels

Written by `python tests/triton_kernels/report.py` from the budgets in `tests/triton_kernels/*_budget.json` and the
host's times in `host_time.json`, which `host_time.py` beside them measures; a test fails if the page differs.

**Nothing on this page was measured on a GPU.** There are three kinds of figures:

- *Read or counted from the machine code* that {compiler} emits for each shipped configuration:
  registers, spills, shared memory, the matrix instruction, and the instructions that one usual program executes. Those
  are counted by an interpreter that follows the code with the sizes of a real launch (`tests/triton_kernels/flow.py`
  says how): an inner tile that meets neither an edge nor a diagonal, D = {width} where features are multiplied
  ({width_odd} where rows are not aligned), a branch on data taken on its shorter side. They are exact for that way and
  say nothing of the time that an instruction waits.
- *A model*: times and fractions below, each the largest of five quotients of a count and a published peak, as if
  everything overlapped perfectly and every peak were reached. A kernel will be slower than its model; what the model
  can show is what limits it at best, and that a change made it worse. The step as a whole is modelled further below.
- *Measured on a CPU*: what it costs the host to launch a step, with the launches left out.

Continuous integration compares the counts with these budgets (5%), and asserts: no spills, no atomics, shared memory
within the chip's limit, the intended number of blocks on a multiprocessor, wgmma (HGMMA) on sm_90 and tcgen05 (UTC*MMA)
on sm_100 for products of 16 bits and tf32, and none where fp32 is to stay fp32.
"""

PEAKS_TEXT = """## Peaks that the model divides by

| chip | multiprocessors | clock, GHz | 16-bit matrix, TFLOP/s | memory, GB/s | cache, GB/s | issue | special |
|---|---|---|---|---|---|---|---|
{rows}

The last two columns, instructions and special functions (exponentials, reciprocal roots), are per clock and
multiprocessor, in operations of one thread. Sources: NVIDIA's A100 and H100 architecture papers and data sheets,
NVIDIA's HGX B200 data sheet (half of the sparse rate), AMD's MI300X data sheet; rates of instructions from the table of
arithmetic throughput in the CUDA C++ Programming Guide and from AMD's CDNA 3 instruction set reference (each of the
four vector units of a compute unit issues one wave of 64 in four clocks). The clock is the boost clock; for H100 and
B200 it is that at which the published matrix rate follows from the units. Cache: for A100 the 5,120 bytes per clock of
its architecture paper; H100 and B200 are given the same per clock, which NVIDIA does not publish; for MI300X the peak
of its Infinity Cache.
"""


def load(op: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((FOLDER / f"{op}_budget.json").read_text())
    return record


def measure(op: str) -> str:
    """Compile all cases of an op, execute them and write their budget."""
    module = importlib.import_module(f"test_{op}_aot")
    module.BUDGET.write(module.cases())
    return op


@dataclass(frozen=True)
class Work:
    """Of one launch, or of several that follow each other."""

    multiply_adds: float = 0
    instructions: float = 0  # of a thread
    special: float = 0
    dram_bytes: float = 0
    cache_bytes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def milliseconds(self, peak: Peak) -> dict[str, float]:
        clocks = peak.multiprocessors * peak.clock_ghz * 1e6  # in a millisecond
        return {
            "tensor cores": 2 * self.multiply_adds / (peak.matrix_tflops * 1e9),
            "issue slots": self.instructions / (clocks * peak.issue),
            "special functions": self.special / (clocks * peak.special),
            "memory": self.dram_bytes / (peak.dram_gb_per_s * 1e6),
            "cache": self.cache_bytes / (peak.cache_gb_per_s * 1e6),
        }


def tile_work(figures: dict[str, Any], rows: int, columns: int, width: int, block: tuple[int, int], tile: bool) -> Work:
    """A kernel that visits rows x columns similarities in 16 bits; with ``tile`` it writes the gradient tile, which
    panels of the driver keep in cache."""
    elements = rows * columns
    instructions = figures["before"] + figures["after"] + figures["loop"] * width / WIDTH
    read = (1 / block[0] + 1 / block[1]) * width * 2
    return Work(
        elements * width,
        elements * instructions,
        elements * figures["special_functions"],
        (rows + columns) * width * 2,
        elements * (read + 2 * tile),
    )


def row_work(figures: dict[str, Any], elements: float, dram_bytes: float) -> Work:
    return Work(0, elements * figures["instructions"], elements * figures["special_functions"], dram_bytes, 0)


def _blocks() -> dict[str, tuple[int, int]]:
    """Tile of 16-bit features by chip."""
    from ssl_kernels.kernels.configs import CONFIGS

    families = {"gfx942": "gfx9"}
    large = {chip: CONFIGS[families.get(chip, chip), "half"][0] for chip in PEAKS}
    return {chip: (config.block_m, config.block_n) for chip, config in large.items()}


def works(chip: str, budgets: dict[str, dict[str, Any]]) -> dict[str, Work]:
    """What the model knows of each kernel at its named shape."""
    block = _blocks()[chip]
    found = {}
    batch = 32768
    kernels = {
        "sigmoid, loss only": ("sigmoid", f"{chip}-half-bf16-large-loss_only", False),
        "sigmoid, gradient tile": ("sigmoid", f"{chip}-half-bf16-large-plain", True),
        "softmax, statistics": ("softmax", f"{chip}-half-bf16-stats-large-plain", False),
        "softmax, gradient tile": ("softmax", f"{chip}-half-bf16-grad-large-plain", True),
        "softmax over rows, statistics": ("row_softmax", f"{chip}-half-bf16-stats-large-plain", False),
        "softmax over rows, gradient tile": ("row_softmax", f"{chip}-half-bf16-grad-large-plain", True),
    }
    for name, (op, case, tile) in kernels.items():
        for width in (512, 768, 1152):
            shape = f"{name}: B {batch:,}, D {width:,}"
            found[shape] = tile_work(budgets[op]["cases"][case], batch, batch, width, block, tile)
    queries, keys, width = 4096, 65536, 128
    figures = budgets["key_softmax"]["cases"][f"{chip}-half-bf16-bf16-whole-mean"]
    elements = queries * keys
    found[f"softmax over keys with mean: {queries:,} queries, {keys:,} keys, D {width}"] = Work(
        2 * elements * width,
        elements * figures["instructions"],
        elements * figures["special_functions"],
        (queries + keys) * width * 2,
        elements * width * 2 / 128,
    )
    dino, sinkhorn = budgets["dino"]["cases"], budgets["sinkhorn"]["cases"]
    stats = sinkhorn[f"{chip}-row_stats-bf16-even"]
    for name, rows, crops, teachers, variant in (
        ("DINO: 64 x (2 + 8) crops, K 65,536", 64, 10, 2, "plain"),
        ("iBOT: 4,096 patches, K 65,536", 4096, 1, 1, "one_crop"),
    ):
        student, teacher = rows * crops * 65536, rows * teachers * 65536
        found[f"{name}, bf16"] = (
            row_work(stats, teacher, 2 * teacher)
            + row_work(dino[f"{chip}-forward-bf16-bf16-even-{variant}"], student, 2 * (student + teacher))
            + row_work(dino[f"{chip}-grad-bf16-bf16-even-{variant}"], student, 2 * (2 * student + teacher))
        )
    elements = 4096 * 65536
    found["Sinkhorn-Knopp, sums of columns: 4,096 x 65,536, bf16"] = row_work(stats, elements, 2 * elements) + row_work(
        sinkhorn[f"{chip}-column_sums-bf16-even"], elements, 2 * elements
    )
    queue = budgets["queue"]["cases"][f"{chip}-aligned"]
    found["queue: 4,096 normalised fp32 keys of D 256 to bf16"] = row_work(queue, 4096 * 256, 4096 * 256 * 6)
    found["EMA: 44 M parameters in fp32"] = Work(dram_bytes=44e6 * 12)
    return found


def kernel_table(op: str, cases: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"### {op}\n",
        "| chip-case | instructions: before + loop + after | special functions | global memory | shared memory"
        " | registers | shared KiB | blocks | matrix instruction |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, f in cases.items():
        lines.append(
            f"| {name} | {f['instructions']:.1f}: {f['before']:.1f} + {f['loop']:.1f} + {f['after']:.1f}"
            f" | {f['special_functions']:.2f} | {f['global_memory']:.2f} | {f['shared_memory']:.2f} | {f['registers']}"
            f" | {f['shared_bytes'] / 1024:.1f} | {f['blocks']} | {f['matrix'] or '-'} |"
        )
    return "\n".join(lines) + "\n"


def model_table(chip: str, found: dict[str, Work]) -> str:
    peak = PEAKS[chip]
    lines = [
        f"### {peak.name} (model)\n",
        "| kernel and shape | model, ms | bound by | tensor cores | issue slots | special functions | memory | cache"
        " | of the matrix rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, work in found.items():
        times = work.milliseconds(peak)
        bound = max(times, key=times.__getitem__)
        share = f"{times['tensor cores'] / times[bound]:.0%}" if work.multiply_adds else "-"
        parts = " | ".join(f"{time:.3g}" if time else "-" for time in times.values())
        lines.append(f"| {name} | {times[bound]:.3g} | {bound} | {parts} | {share} |")
    return "\n".join(lines) + "\n"


def cuda_table() -> str:
    """Of the kernels in CUDA C++, from the budget that their own tests keep."""
    record = json.loads((FOLDER.parent / "cuda" / "budget.json").read_text())
    chips = record["instructions_per_element"]
    lines = [
        "### ema and queue in CUDA C++\n",
        f"Compiled by {record['compiler']}. Static instructions per element: every one in the code counts once.\n",
        f"| kernel | {' | '.join(chips)} |",
        "|---|" + "---|" * len(chips),
    ]
    for source in next(iter(chips.values())):
        for kernel in next(iter(chips.values()))[source]:
            figures = " | ".join(f"{chips[chip][source][kernel]}" for chip in chips)
            lines.append(f"| `{kernel}` | {figures} |")
    return "\n".join(lines) + "\n"


def text() -> str:
    """The report, from the budgets and the host's times alone."""
    import step_model  # here: it takes the figures of this module

    budgets = {op: load(op) for op in OPS}
    rows = "\n".join(
        f"| {p.name} ({chip}) | {p.multiprocessors} | {p.clock_ghz} | {p.matrix_tflops:,} | {p.dram_gb_per_s:,}"
        f" | {p.cache_gb_per_s:,} | {p.issue} | {p.special} |"
        for chip, p in PEAKS.items()
    )
    introduction = INTRODUCTION.format(compiler=budgets["sigmoid"]["compiler"], width=WIDTH, width_odd=WIDTH + 3)
    parts = [introduction, PEAKS_TEXT.format(rows=rows)]
    parts.append(
        "## Model of the time at named shapes\n\nEvery figure of these tables is a model, none a measurement. The five"
        " columns of times, in milliseconds, are what\neach resource takes alone. Gradient tiles are taken to stay in"
        " cache; the products with them that make dX and dY are\nthe library's, and not in here but in the model of"
        " a whole step. Memory is what must be read and written once.\n"
    )
    parts += [model_table(chip, works(chip, budgets)) for chip in PEAKS]
    parts.append(step_model.section())
    parts.append(
        "## Figures of the code\n\nInstructions, special functions and accesses to memory are those of one thread per"
        " element: of the similarity matrix,\nof a student's logits, of the logits that are normalised, of the keys. An"
        " instruction that copies a whole block to\nshared memory counts as one. No configuration spills. Blocks are"
        " those that a multiprocessor holds at a time.\n"
    )
    parts += [kernel_table(op, budgets[op]["cases"]) for op in OPS]
    parts.append(cuda_table())
    return "\n".join(parts)


def show(op: str, chip: str | None) -> None:
    import aot

    for case in importlib.import_module(f"test_{op}_aot").cases():
        if chip in (None, case.chip):
            f = case.record()
            print(
                f"{op} {case!s:46} {f['instructions']:7.2f} = {f['before']:5.2f} before + {f['loop']:6.2f} loop +"
                f" {f['after']:5.2f} after; special {f['special_functions']:.2f}, global {f['global_memory']:.2f},"
                f" shared {f['shared_memory']:.2f}; {f['registers']} registers, {f['spills']} spills,"
                f" {f['shared_bytes']} B shared, {f['blocks']} blocks, {f['matrix'] or 'no matrix product'},"
                f" {f['undecided']} branches on data; static {aot.compiled(case).instructions}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=OPS)
    parser.add_argument("--chip", choices=PEAKS)
    parser.add_argument("--text", action="store_true")
    args = parser.parse_args()
    if args.kernel or args.chip:
        for op in [args.kernel] if args.kernel else OPS:
            show(op, args.chip)
        return
    if not args.text:
        with concurrent.futures.ProcessPoolExecutor(2) as pool:
            for op in pool.map(measure, OPS):
                print(f"{op}_budget.json")
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(text())
    print(REPORT)


if __name__ == "__main__":
    main()
