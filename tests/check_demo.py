"""The figures that image-text training on the embedded emoji must reach, with either loss, in a few minutes.

`python tests/check_demo.py runs/demo runs/clip`, after `make demo` and `ssl-kernels train clip`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LEAST = {
    "text->image R@1": 0.50,
    "image->text R@1": 0.50,
    "combinations: text->image R@1": 0.80,
    "combinations: image->text R@1": 0.80,
    "novel concepts: text->image R@1": 0.04,
    "novel concepts: image->text R@1": 0.04,
    "zero-shot skin tone of five": 0.75,
}
LARGEST_LOSS_DIFFERENCE = 1e-5
LONGEST_S = 300


def main(folder: str) -> int:
    summary = json.loads((Path(folder) / "summary.json").read_text())
    figures = {figure["name"]: figure["model"] for figure in summary["figures"]}
    low = [f"{name}: {figures[name]:.3f} < {least}" for name, least in LEAST.items() if not figures[name] >= least]
    baselines = {figure["name"]: figure["baseline"] for figure in summary["figures"]}
    for name in ("text->image R@1", "combinations: text->image R@1", "combinations: image->text R@1"):
        if not figures[name] > baselines[name]:
            low.append(f"{name}: {figures[name]:.3f} is no more than the baseline's {baselines[name]:.3f}")
    if not summary["loss_difference"] <= LARGEST_LOSS_DIFFERENCE:
        low.append(f"loss against the reference: {summary['loss_difference']:.1e} > {LARGEST_LOSS_DIFFERENCE:.0e}")
    if not summary["loss_last"] < 0.2 * summary["loss_first"]:
        low.append(f"loss: {summary['loss_first']:.2f} -> {summary['loss_last']:.2f}")
    if summary["total_s"] > LONGEST_S:  # no failure: a busy machine says nothing about the code
        print(f"warning: the demo took {summary['total_s']:.0f} s, more than {LONGEST_S} s")
    print(f"{folder}:", "; ".join(low) or f"all {len(LEAST)} figures reached in {summary['total_s']:.0f} s")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(max([main(folder) for folder in sys.argv[1:]]))
