"""The page docs/benchmarks.md, its pictures, and the figures that README and docs print, all from committed results.

    python benchmarks/evidence.py

reads benchmarks/results/<machine>/*.json and nothing else, and refuses them if they cannot be sound. In other pages it
fills what stands between two comments, `<!-- bench: WHAT -->` and `<!-- /bench -->`; `Figures.of` lists what there is.
With `--is-idle` it only says whether the machine is idle enough to measure.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

from ssl_kernels.bench import results, suite
from ssl_kernels.bench.problem import Op
from ssl_kernels.bench.results import LABELS, Result, Row
from ssl_kernels.trainers.evaluation.compare import spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE, IMAGES = ROOT / "benchmarks/results", ROOT / "docs/benchmarks.md", ROOT / "docs/images"
CARD_GB = 24  # of the GPU that a batch is asked to fit
MOST_OF_GEMM = 1.25  # a share that noise explains
MARKER = re.compile(r"(<!-- bench: (.+?) -->)(.*?)(<!-- /bench -->)", re.DOTALL)

HEAD = """\
# Benchmarks

`make bench-report` wrote this page and its pictures from the results in `benchmarks/results/`.
`ssl-kernels bench` measures the same on your machine; `ssl-kernels bench --quick` takes a few minutes.

- Each loss is called as a trainer calls it, forward and backward where nothing else is said, in fp32 where the shape
  does not name another type.
- Outputs are compared first: nobody is timed whose value or gradients differ from those of the formula.
- Times are relative to ours: 2.0x means twice as slow. Ours takes a step before each step of another implementation, so
  that whatever slows the machine down slows down both. The fastest step of each counts.
- "eager" is the formula in plain PyTorch, "torch.compile" is what that makes of it.
- Memory is the peak of a step in MB, above what the process holds before it. Inputs do not count, gradients do.
- The machine's limit is measured in the same run: how fast it multiplies fp32 matrices of that depth, through
  `torch.mm` and through the fastest product in the same torch, how fast it copies memory, and how many exponentials
  `torch.exp` computes within the caches. Our share of it counts only the work that the loss cannot do without.
- A peer that is not installed, or cannot do a shape, is named with the reason.
"""

# Of each op: what the loss cannot do without, and who is who.
NOTES = {
    "sigmoid": """\
The loss needs one product of 2 B² D FLOP; loss and gradients need three.
""",
    "clip": """\
Loss and gradients need three products of 2 B² D FLOP. Ours takes a fourth for each tile that it did not keep from its
first pass; "ours, no tile kept" may keep none.
""",
    "nt_xent": """\
N is the number of images, each of which is seen twice. Similarities are symmetric, so that ours computes half of the
2N x 2N matrix.
""",
    "metric_learning": """\
M rows with labels, and all pairs of them. Similarities are symmetric. pytorch-metric-learning's NT-Xent compares each
positive with each negative pair, so that it takes no more rows.
""",
    "row_softmax": """\
M queries, and N candidates of which M are positives and the others hard negatives. Loss and gradients need three
products of 2 M N D FLOP. Ours takes no more where a tile of all candidates fits its workspace; with a workspace of 4 MB
it may take a fourth, to form smaller tiles twice. Five prefixes of the features take ours no more products; a guide has
D / 2 features, and its product is taken once.
""",
    "info_nce": """\
B queries meet the K keys of a queue. Loss and gradient need two products of 2 B K D FLOP. "MoCo's code" copies the
queue first, as MoCo does; "eager" does not.
""",
    "queue": """\
B new keys replace the oldest of K. At the least, B rows are read and written.
""",
    "dino": """\
The student sees all crops, and the teacher two. At the least, the logits of both are read, one exponential is computed
for each of them, and the gradient is written. "DINO's loop" goes over pairs of crops, as DINO's own code does.
""",
    "ibot": """\
N masked patches and K prototypes, once with Sinkhorn-Knopp, where "eager" is DINOv2's formulas, and once with a centre,
which is all that lightly has.
""",
    "sinkhorn": """\
N samples and K prototypes in three iterations. "eager" is DINOv2's formula, which writes the assignment. Ours gives a
centre of K numbers instead; "ours, written out" writes the assignment, too.
""",
    "koleo": """\
Similarities are symmetric, so that half of the B x B matrix is all that has to be computed.
""",
    "vicreg": """\
The covariance of n samples is a D x D matrix. Where n is much smaller than D, ours goes through the n x n matrix.
""",
    "barlow_twins": """\
As for VICReg, with the correlation between the two views.
""",
    "ema": """\
At the least, both models are read and the teacher is written. A loop over parameters goes through them several times.
""",
    "small": """\
At small batches a loss costs what happens around its kernels. All use one thread; below 1.0x the peer is faster. The
peers are the losses of open_clip for CLIP and SigLIP, MoCo's code for InfoNCE and MoCo v3, and otherwise lightly's.
""",
}


@dataclass(frozen=True)
class Figures:
    """What one machine's results say."""

    found: dict[str, Result]
    trainings: list[dict[str, Any]]

    def of(self, what: str) -> str:
        """The text of a marker. Its parts are separated by semicolons.

        On lines of their own: `summary`; `table; OP`; `trainings; COMMAND`. Within a line: `machine`;
        `time; OP; SHAPE; PROVIDER`; `memory; OP; SHAPE; PROVIDER`; `limit; OP; SHAPE`; `fits; OP; PROVIDER`.
        """
        kind, *names = (part.strip() for part in what.split(";"))
        try:
            if kind in ("summary", "table", "trainings"):
                text: str = {"summary": self.summary, "table": self.table, "trainings": self.training}[kind](*names)
                return f"\n\n{text}\n"
            if kind in ("machine", "fits"):
                return {"machine": self.machine, "fits": self.fits}[kind](*names)
            if kind in ("time", "memory", "limit"):
                row = self.row(*names[:2])
                text = {"time": row.time, "memory": row.memory, "limit": lambda: f"{row.limit:.0%}"}[kind](*names[2:])
                if not text or not text[0].isdigit():
                    raise LookupError(text or "not measured")
                return f"{text} MB" if kind == "memory" else text
        except (LookupError, TypeError) as error:
            raise LookupError(f"<!-- bench: {what} -->: {error}") from None
        raise LookupError(f"<!-- bench: {what} -->: expected what `Figures.of` of benchmarks/evidence.py lists")

    def row(self, name: str, shape: str) -> Row:
        """In the mode that does most, which is measured last."""
        rows = {row.shape: row for row in results.rows(self.found[name])}
        if shape not in rows:
            raise LookupError(f"expected a shape of {', '.join(rows)}, got {shape!r}")
        return rows[shape]

    def machine(self) -> str:
        """Where and with what; each op was measured in one run, ops perhaps on different days."""
        first = next(iter(self.found.values()))
        machine, versions = first["machine"], first["versions"]
        days = sorted({result["measured"] for result in self.found.values()})
        return (
            f"{machine['processor']} ({machine['instruction_set']}), {machine['threads']} threads, "
            f"{machine['ram_gb']} GB, torch {versions['torch']}, measured {' to '.join({days[0]: 0, days[-1]: 0})}"
        )

    def summary(self) -> str:
        """One line to each op, at its first shape."""
        head = ["", "shape", "peer", "its time", "eager", "torch.compile", "of the limit", "MB ours", "MB peer"]
        lines = []
        for op in (op for op in suite.OPS if op.name in self.found and op.name != "small"):
            row = self.row(op.name, op.describe(*op.shapes[0]) + op.suffix)
            peer = "" if row.peer == "eager" else row.peer
            times = [row.time(peer), row.time("eager"), row.time("compile")]
            limit = "" if row.limit is None else f"{row.limit:.0%}"
            memory = [row.memory("ours"), row.memory(peer or "eager")]
            lines.append([op.title, row.shape, LABELS.get(peer, peer), *times, limit, *memory])
        return markdown(head, lines, left=3)

    def table(self, name: str) -> str:
        """Everything of one op but its sweep."""
        rows = [row for row in results.rows(self.found[name]) if not row.ours.get("only_swept")]
        providers = list(dict.fromkeys(name for row in rows for name in row.others))
        limits = list(dict.fromkeys(limit for row in rows for limit in row.limits))
        remembered = [name for name in ("ours", *providers) if any(row.memory(name) for row in rows)]
        head = ["shape", "", "ours, ms", *(LABELS.get(name, name) for name in providers), *limits]
        lines = [
            [row.shape, row.mode, results.milliseconds(row.ours), *map(row.time, providers)]
            + [f"{row.limits[name]:.0%}" if name in row.limits else "" for name in limits]
            + [row.memory(name) for name in remembered]
            for row in rows
        ]
        return markdown([*head, *(f"MB {LABELS.get(name, name)}" for name in remembered)], lines, left=2)

    def fits(self, name: str, provider: str) -> str:
        """The batch at which memory reaches that of the card, by growth as a + c B² through the two largest batches.

        To two digits, for it is an extrapolation.
        """
        measured = peaks(self.found[name], provider)
        if len(measured) < 2:
            raise LookupError(f"{provider} was measured at {len(measured)} batches")
        (b1, mb1), (b2, mb2) = measured[-2:]
        c = (mb2 - mb1) / (b2**2 - b1**2)
        batch = math.sqrt((CARD_GB * 1024 - mb2) / c + b2**2)
        return f"{float(f'{batch:.2g}'):,.0f}"

    def training(self, command: str) -> str:
        """A line to each figure of the runs of a trainer: over its seeds, and what it is to be judged by."""
        runs = [run["figures"] for run in self.trainings if run["command"] == command]
        if not runs:
            raise LookupError(f"of {sorted({run['command'] for run in self.trainings})}, got {command!r}")
        columns = list(dict.fromkeys(column for run in runs for figure in run.values() for column in figure))
        lines = [[name, *(spread([run[name].get(c) for run in runs]) for c in columns)] for name in runs[0]]
        return markdown(["", *(column.replace("_", " ") for column in columns)], lines, left=1)

    def page(self) -> str:
        """The machine's part of the page."""
        first = next(iter(self.found.values()))
        parts = [f"## {first['machine']['processor']}\n\n{self.machine()}.\n", of_run(first), self.summary()]
        if swept := swept_ops(self):
            parts += ["### Time and memory as the batch grows\n", SWEEP]
        for op in swept:
            width = f"D = {op.sweep[0][1]}, {LABELS.get(op.peer, op.peer)}'s"
            picture = f"![Memory and time of {op.title} against the batch](images/{picture_name(op)})"
            fits = f"{op.peer}'s would fill {CARD_GB} GB at a batch of {self.fits(op.name, op.peer)} (extrapolated).\n"
            parts += [f"#### {op.title}, {width} and ours\n", picture + "\n", self.sweep(op), fits]
        for op in first_ops():
            if op.name in self.found:
                said = of_run(self.found[op.name])
                note = NOTES[op.name] if said == of_run(first) else f"{NOTES[op.name]}\n{said}"
                parts += [f"### {op.title}\n", note, self.table(op.name)]
        return "\n".join(parts)

    def sweep(self, op: Op) -> str:
        swept = [row for row in results.rows(self.found[op.name]) if "batch" in row.ours]
        rows = sorted(swept, key=lambda row: row.ours["batch"])
        others = [op.peer, "eager"]
        lines = [
            [f"{row.ours['batch']:,}", results.milliseconds(row.ours), *map(row.time, others)]
            + [row.memory(name) for name in ("ours", *others)]
            for row in rows
        ]
        return markdown(["B", "ours, ms", *others, "MB ours", *(f"MB {name}" for name in others)], lines, left=0)


SWEEP = f"""\
The others keep several matrices of B x B numbers, so that their memory grows with the square of the batch; ours grows
with the batch. They are measured up to {suite.MOST_DENSE:,} rows of that matrix. The batch that would fill {CARD_GB} GB
is extrapolated: memory is taken to grow as a + c B², with a and c from their two largest batches. That is
the memory of the loss alone, without the model.
"""


def of_run(result: Result) -> str:
    """With what an op was measured."""
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".\n"


def is_busy(load: float, cpus: int) -> bool:
    """Whether other programs are at work on a machine."""
    return load > cpus / 2


def unsound(found: Sequence[Figures]) -> Iterator[str]:
    """By file and row, what cannot be printed: a short run, one beside other programs, or more than a machine can do.

    Ours may be faster than the rates of copying and of exponentials: small problems lie in caches, and torch.exp need
    not be the fastest.
    """
    for result, name in ((result, name) for figures in found for name, result in figures.found.items()):
        machine = result["machine"]
        file = f"{machine['name']}/{name}.json"
        if result["size"] != "full":
            yield f"{file}: expected a full run, got a {result['size']} one"
        if is_busy(machine["load_before"], machine["cpus"]):
            yield f"{file}: expected a load of at most {machine['cpus'] / 2}, got {machine['load_before']}"
        for row in results.rows(result):
            share = row.limits.get("of the fastest GEMM", 0.0)
            if share > MOST_OF_GEMM:
                yield f"{file}: {row.shape}, {row.mode}: {share:.0%} of the fastest GEMM"


def first_ops() -> list[Op]:
    """Of the ops that share a name, the first."""
    return [op for k, op in enumerate(suite.OPS) if op.name not in [other.name for other in suite.OPS[:k]]]


def swept_ops(figures: Figures) -> list[Op]:
    """Whose batch was grown, on a system that tells of memory."""
    return [op for op in first_ops() if op.name in figures.found and len(peaks(figures.found[op.name], op.peer)) > 1]


def picture_name(op: Op) -> str:
    return f"{op.title.lower().replace('-', '_')}_memory_time.svg"


def swept_runs(result: Result, provider: str) -> list[results.Run]:
    return sorted((r for r in result["runs"] if r["provider"] == provider and "batch" in r), key=lambda r: r["batch"])


def peaks(result: Result, provider: str) -> list[tuple[int, float]]:
    """Batch and megabytes."""
    return [(run["batch"], run["peak_mb"]) for run in swept_runs(result, provider) if run.get("peak_mb") is not None]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first ``left`` columns are words and whose others are numbers."""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def machines() -> list[Figures]:
    """Those with results, the one with the most first, which is what other pages print; of equals, the latest."""
    found = []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        trainings = folder / "trainings.json"
        runs = json.loads(trainings.read_text()) if trainings.exists() else []
        if of_ops := results.read(folder, suite.NAMES):
            found.append(Figures(of_ops, runs))
    return sorted(found, key=lambda f: (len(f.found), max(r["measured"] for r in f.found.values())), reverse=True)


def page(found: Sequence[Figures]) -> str:
    return "\n".join([HEAD, *(figures.page() for figures in found)])


def filled(text: str, figures: Figures) -> str:
    """A page of words with its figures in place."""
    return MARKER.sub(lambda match: f"{match[1]}{figures.of(match[2])}{match[4]}", text)


def pages() -> Iterator[Path]:
    """Those that may hold figures of ours."""
    yield ROOT / "README.md"
    yield from sorted(path for path in (ROOT / "docs").rglob("*.md") if path != PAGE)


def draw(op: Op, result: Result, path: Path) -> None:
    """Memory and time against the batch: ours, the peer's and the formula's, on a light page and on a dark one."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    grey, colours = "#808891", {"eager": "#a08f3c", op.peer: "#e0662f", "ours": "#2f81f7"}
    style: dict[str, Any] = {"svg.hashsalt": "ssl_kernels", "svg.fonttype": "none", "font.size": 9}
    style |= dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor", "axes.edgecolor"), grey)
    with mpl.rc_context(style):
        figure, (memory, time) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        for provider, colour in colours.items():
            label = LABELS.get(provider, provider) if provider != "eager" else "plain PyTorch"
            dashes, runs = "--" if provider == "eager" else "-", swept_runs(result, provider)
            batches = [run["batch"] for run in runs]
            memory.plot(batches, [run["peak_mb"] for run in runs], dashes, color=colour, label=label)
            time.plot(batches, [run["seconds"] for run in runs], dashes, color=colour)
        fits = float(Figures({op.name: result}, []).fits(op.name, op.peer).replace(",", ""))
        batch, mb = peaks(result, op.peer)[-1]
        memory.plot([batch, fits], [mb, CARD_GB * 1024], ":", color=colours[op.peer], label="extrapolated")
        memory.axhline(CARD_GB * 1024, color=grey, linewidth=0.8)
        memory.text(swept_runs(result, "ours")[0]["batch"], CARD_GB * 1024, f"{CARD_GB} GB", verticalalignment="bottom")
        for axis, title in ((memory, "peak memory, MB"), (time, "seconds a step")):
            axis.set_xscale("log", base=4)
            axis.set_yscale("log")
            axis.set(xlabel="batch", title=title)
            axis.minorticks_off()
            for scale in (axis.xaxis, axis.yaxis):
                scale.set_major_formatter(lambda value, _: f"{value:,.6g}")
            axis.grid(color=grey, alpha=0.25, linewidth=0.5)
            axis.spines[["top", "right"]].set_visible(False)
        memory.legend(frameon=False)
        metadata = {"Creator": None, "Date": None, "Description": points(op, result)}
        figure.savefig(path, format="svg", transparent=True, metadata=metadata)
        plt.close(figure)


def points(op: Op, result: Result) -> str:
    """What a picture shows, which it carries along, so that a test can tell an old one."""
    series = {
        provider: [[run["batch"], run["peak_mb"], run["seconds"]] for run in swept_runs(result, provider)]
        for provider in ("ours", op.peer, "eager")
    }
    return json.dumps(series)


def main() -> None:
    found = machines()
    if complaints := list(unsound(found)):
        raise SystemExit("\n".join(complaints))
    texts = {PAGE: page(found)} | {path: filled(path.read_text(), found[0]) for path in pages()}
    for path, text in texts.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    IMAGES.mkdir(exist_ok=True)
    for op in swept_ops(found[0]):
        draw(op, found[0].found[op.name], IMAGES / picture_name(op))


if __name__ == "__main__":
    if sys.argv[1:] == ["--is-idle"]:
        load, cpus = os.getloadavg()[0], os.cpu_count() or 1
        sys.exit(
            f"The machine is busy: a load of {load:.1f}, expected at most {cpus / 2}" if is_busy(load, cpus) else 0
        )
    main()
