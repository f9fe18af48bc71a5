"""The figures that training on the embedded data must reach, in a few minutes each.

`python tests/check_demo.py runs/demo runs/clip ...`, after `make demo` and `ssl-kernels train ...` with no other
arguments than `--data openmoji` for a trainer of images alone, or `--epochs`: a run is held to the figures of the most
epochs below that are not more than its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Required = dict[str, tuple[float, float | None]]

# By epochs, then by the figure's name: the least value, and by how much it must be above what is had without learning.
# Those of short runs lie where a broken method does not come: captions of other images, a teacher that is never
# updated, views that are identical.
IMAGE_TEXT: dict[int, Required] = {
    40: {
        "text->image R@1": (0.50, 0.0),
        "image->text R@1": (0.50, 0.0),
        "combinations: text->image R@1": (0.80, 0.0),
        "combinations: image->text R@1": (0.80, 0.0),
        "novel concepts: text->image R@1": (0.04, None),
        "novel concepts: image->text R@1": (0.04, None),
        "zero-shot skin tone of five": (0.75, None),
    },
    6: {"text->image R@1": (0.25, None), "image->text R@1": (0.25, None)},
    1: {},
}
IMAGES: dict[int, Required] = {
    14: {
        "10 labels a class, 1-NN": (0.81, 0.04),
        "distorted query, 5-NN": (0.82, 0.15),
        "clean query, 5-NN": (0.93, 0.0),
        "instance retrieval R@1": (0.65, 0.2),
    },
    4: {
        "10 labels a class, 1-NN": (0.70, None),
        "instance retrieval R@1": (0.50, None),
    },
}
DINO: dict[int, Required] = {
    12: {
        "10 labels a class, 1-NN": (0.78, 0.04),
        "distorted query, 5-NN": (0.74, 0.1),
        "clean query, 5-NN": (0.93, 0.0),
        "instance retrieval R@1": (0.50, 0.1),
    },
    4: {"10 labels a class, 1-NN": (0.70, None)},
}
LARGEST_LOSS_DIFFERENCE = 1e-5
LARGEST_LOSS_SHARE = {40: 0.2, 6: 0.5, 1: 1.0}  # of the first step's loss, by the epochs of IMAGE_TEXT
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
    by_epochs = IMAGE_TEXT if of_texts else DINO if "prototypes" in config else IMAGES
    epochs = max((number for number in by_epochs if number <= config["epochs"]), default=0)
    required = {k: v for k, v in by_epochs.get(epochs, {}).items() if of_texts or k in figures}
    low = shortfalls(figures, required) if required or of_texts else ["no figure to judge it by"]
    if of_texts:
        if not summary["loss_difference"] <= LARGEST_LOSS_DIFFERENCE:
            low.append(f"loss against the reference: {summary['loss_difference']:.1e} > {LARGEST_LOSS_DIFFERENCE:.0e}")
        if not summary["loss_last"] < LARGEST_LOSS_SHARE[epochs] * summary["loss_first"]:
            low.append(f"loss: {summary['loss_first']:.2f} -> {summary['loss_last']:.2f}")
    if summary["total_s"] > LONGEST_S:  # no failure: a busy machine says nothing about the code
        print(f"warning: {folder} took {summary['total_s']:.0f} s, more than {LONGEST_S} s")
    print(f"{folder}:", "; ".join(low) or f"all {len(required)} figures reached in {summary['total_s']:.0f} s")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(max([main(folder) for folder in sys.argv[1:]]))
