"""The figures that training on the embedded data must reach, in a few minutes each.

`python tests/check_demo.py runs/demo runs/clip ...`, after `make demo` and `ssl-kernels train ...` with no other
arguments than `--data openmoji` for a trainer of images alone, or `--epochs`: a run is held to the figures of the most
epochs below that are not more than its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

Required = dict[str, tuple[float, float | None]]


class Level(NamedTuple):
    """What a run must reach."""

    # By the figure's name: the least value, and by how much it must be above what is had without learning.
    figures: Required
    loss_share: float = 1.0  # of the first step's loss, which the last step's must be below


# By epochs. Those of short runs lie where a broken method does not come: captions of other images leave retrieval at
# chance, and a teacher that is never updated leaves the loss above .92 of what it was, in MoCo and in DINO.
IMAGE_TEXT = {
    40: Level(
        {
            "text->image R@1": (0.50, 0.0),
            "image->text R@1": (0.50, 0.0),
            "combinations: text->image R@1": (0.80, 0.0),
            "combinations: image->text R@1": (0.80, 0.0),
            "novel concepts: text->image R@1": (0.04, None),
            "novel concepts: image->text R@1": (0.04, None),
            "zero-shot skin tone of five": (0.75, None),
        },
        loss_share=0.2,
    ),
    6: Level({"text->image R@1": (0.25, None), "image->text R@1": (0.25, None)}, loss_share=0.5),
    1: Level({}),
}
IMAGES = {
    14: Level(
        {
            "10 labels a class, 1-NN": (0.81, 0.04),
            "distorted query, 5-NN": (0.82, 0.15),
            "clean query, 5-NN": (0.93, 0.0),
            "instance retrieval R@1": (0.65, 0.2),
        }
    ),
    4: Level({"10 labels a class, 1-NN": (0.70, None), "instance retrieval R@1": (0.60, None)}, loss_share=0.85),
}
DINO = {
    12: Level(
        {
            "10 labels a class, 1-NN": (0.78, 0.04),
            "distorted query, 5-NN": (0.74, 0.1),
            "clean query, 5-NN": (0.93, 0.0),
            "instance retrieval R@1": (0.50, 0.1),
        }
    ),
    4: Level({"10 labels a class, 1-NN": (0.70, None)}, loss_share=0.8),
}
LARGEST_LOSS_DIFFERENCE = 1e-5
LONGEST_S = 300


def shortfalls(figures: dict[str, dict[str, Any]], required: Required) -> list[str]:
    low = []
    for name, (least, margin) in required.items():
        value = figures[name]["model"]
        if not value >= least:
            low.append(f"{name}: {value:.3f} < {least}")
        if margin is not None:
            trivial = figures[name]["baseline"] if "baseline" in figures[name] else figures[name]["raw"]
            if not value >= trivial + margin:
                low.append(f"{name}: {value:.3f} is not {margin} above {trivial:.3f}, which takes no learning")
    return low


def main(folder: str) -> int:
    summary = json.loads((Path(folder) / "summary.json").read_text())
    figures = {figure["name"]: figure for figure in summary["figures"]}
    config = json.loads((Path(folder) / "config.json").read_text())
    of_texts = "text->image R@1" in figures
    levels = IMAGE_TEXT if of_texts else DINO if "prototypes" in config else IMAGES
    level = levels[max((epochs for epochs in levels if epochs <= config["epochs"]), default=min(levels))]
    required = {name: least for name, least in level.figures.items() if of_texts or name in figures}
    low = shortfalls(figures, required) if required or of_texts else ["no figure to judge it by"]
    if of_texts and not summary["loss_difference"] <= LARGEST_LOSS_DIFFERENCE:
        low.append(f"loss against the reference: {summary['loss_difference']:.1e} > {LARGEST_LOSS_DIFFERENCE:.0e}")
    if not summary["loss_last"] < level.loss_share * summary["loss_first"]:
        low.append(f"loss: {summary['loss_first']:.2f} -> {summary['loss_last']:.2f}, not below {level.loss_share}")
    if summary["total_s"] > LONGEST_S:  # no failure: a busy machine says nothing about the code
        print(f"warning: {folder} took {summary['total_s']:.0f} s, more than {LONGEST_S} s")
    print(f"{folder}:", "; ".join(low) or f"all {len(required)} figures reached in {summary['total_s']:.0f} s")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(max([main(folder) for folder in sys.argv[1:]]))
