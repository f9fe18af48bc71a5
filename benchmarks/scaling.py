"""A model on paper of contrastive losses over many GPUs: bytes, memory and time of a step on one of them.

`python benchmarks/scaling.py` prints the tables of docs/scaling.md. Nothing in them was measured: products run at a
share of the tensor cores' peak, and elementwise passes at the memory's bandwidth. A collective uses the network of all
GPUs of a node at once; of a ring, one GPU's, wherever a block passes from node to node. Each block that is looked at
costs the host some launches, and no step is shorter than these.
"""

from __future__ import annotations

from dataclasses import dataclass

NODE = 8  # GPUs
FP32, BF16 = 4, 2  # bytes


@dataclass(frozen=True)
class Machine:
    """Of an H100 in a node of eight, with 400 Gbit/s to the network each."""

    flop_per_s: float = 600e12  # 60% of the peak in bf16
    memory_bytes_per_s: float = 3.0e12
    node_bytes_per_s: float = 350e9
    network_bytes_per_s: float = 45e9
    block_s: float = 150e-6  # of the host

    def link(self, gpus: int, is_ring: bool) -> float:
        if gpus <= NODE:
            return self.node_bytes_per_s
        return self.network_bytes_per_s if is_ring else min(self.node_bytes_per_s, NODE * self.network_bytes_per_s)


@dataclass(frozen=True)
class Way:
    """How a loss is computed over W ranks of B rows; a unit is a product of B x D by D x N, 2 B N D FLOP.

    ``features`` and ``gradients`` tell how often the features of all ranks, of one side, come to a rank, and their
    gradients leave it.
    """

    name: str
    units: float
    features: int
    gradients: int
    gradient_bytes: int  # of an element on the wire
    passes: float  # over the B x N matrix in fp32, where it is written
    kept: str  # what a rank holds beside its own rows: features in bf16 and, of B N, a matrix in fp32
    is_ring: bool
    overlaps: bool
    blocks: tuple[int, int]  # that are looked at: so many, and so many to each other rank
    vectors: int = 0  # floats of each row and each column, that travel and are held


WAYS = {
    "CLIP": (
        Way("ours, gather", 6, 2, 0, 0, 0, "2 N D", False, True, (10, 0), 8),
        Way("ours, ring", 6, 4, 0, 0, 0, "4 B D", True, True, (2, 4), 8),
        Way("open_clip, local_loss and gather_with_grad", 6, 2, 2, BF16, 16, "2 N D + 4 B N", False, False, (4, 0)),
    ),
    "SigLIP": (
        Way("ours, gather", 4, 2, 0, 0, 0, "2 N D", False, True, (5, 0)),
        Way("ours, ring", 4, 2, 0, 0, 0, "4 B D", True, True, (1, 2)),
        Way("open_clip, bidir", 3, 1, 1, BF16, 12, "N D + 2 B N", True, False, (1, 1)),
        Way("chunks kept, gradients passed on in bf16", 3, 1, 1, BF16, 0, "2 N D", True, False, (1, 1)),
    ),
}


def held_bytes(way: Way, rows: int, gpus: int, width: int) -> float:
    """What is kept, and two gradients in fp32. Beside them is one tile: at most 64 MB unless it is asked for."""
    total = rows * gpus
    sizes = {"N D": total * width * BF16, "B D": rows * width * BF16, "B N": rows * total * FP32}
    kept = 0.0
    for term in way.kept.split(" + "):
        number, _, what = term.partition(" ") if term[0].isdigit() else ("1", "", term)
        kept += int(number) * sizes[what]
    return kept + 2 * rows * width * FP32 + way.vectors * total * FP32


def step_seconds(way: Way, rows: int, gpus: int, width: int, machine: Machine) -> tuple[float, float, float]:
    """Of products and passes over the matrix, of what travels, and of both as far as they overlap."""
    total = rows * gpus
    work = way.units * 2 * rows * total * width / machine.flop_per_s
    work += way.passes * rows * total * FP32 / machine.memory_bytes_per_s
    moved = travelling_bytes(way, rows, gpus, width) / machine.link(gpus, way.is_ring)
    own = work / gpus  # the block that is there already
    if not way.overlaps:
        step = work + moved
    elif way.is_ring:  # each block but the last travels while another is worked on
        step = own + max(work - own, moved)
    else:
        step = max(own, moved) + work - own
    return work, moved, max(step, (way.blocks[0] + way.blocks[1] * (gpus - 1)) * machine.block_s)


def travelling_bytes(way: Way, rows: int, gpus: int, width: int) -> float:
    """That come to a rank, or leave it, the larger."""
    others = rows * (gpus - 1)
    return others * (width * (way.features * BF16 + way.gradients * way.gradient_bytes) + way.vectors * FP32)


def table(loss: str, rows: int, width: int = 768, machine: Machine | None = None) -> list[str]:
    machine = machine or Machine()
    lines = ["| GPUs | way | on the wire, MB | held, MB | products, ms | wire, ms | step, ms |", "|" + "---|" * 7]
    for gpus in (8, 64, 256, 1024):
        for way in WAYS[loss]:
            work, moved, step = step_seconds(way, rows, gpus, width, machine)
            sizes = (travelling_bytes(way, rows, gpus, width), held_bytes(way, rows, gpus, width))
            numbers = [f"{size / 1e6:,.0f}" for size in sizes] + [f"{1e3 * s:,.1f}" for s in (work, moved, step)]
            lines.append(f"| {gpus} | {way.name} | " + " | ".join(numbers) + " |")
    return lines


def text() -> str:
    parts = []
    for loss in WAYS:
        for rows in (512, 4096):
            parts += [f"### {loss}, {rows:,} rows a GPU, D = 768, bf16", "", *table(loss, rows), ""]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    print(text(), end="")
