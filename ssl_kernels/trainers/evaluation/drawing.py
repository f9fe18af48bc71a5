"""What the pictures of a run have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssl_kernels.trainers.checkpoints import write_atomically
from ssl_kernels.trainers.evaluation.fonts import Fonts


def wrap(text: str, width: int, most: int) -> str:
    """A text in lines of so many columns, of which a Chinese character takes two; what is beyond `most` is cut off."""
    from rich.console import Console
    from rich.text import Text

    lines = [line.plain.rstrip() for line in Text(" ".join(text.split())).wrap(Console(width=width), width)]
    if len(lines) > most:
        lines[most - 1] = f"{lines[most - 1][: -1 if len(lines[most - 1]) >= width else None]}…"
    return "\n".join(lines[:most])


def new_figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """A figure that no window shows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def drawn_in(fonts: Fonts) -> Any:
    import matplotlib

    return matplotlib.rc_context({"font.family": fonts.families})


def save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
