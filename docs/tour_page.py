"""Writes tour.md and its pictures: runs the cells of tour.py and puts what they print below them.

    python docs/tour_page.py

Prose and pictures are plain Markdown, so that the page reads alike on a code host and in the documentation.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

from PIL import Image

SOURCE = Path(__file__).with_name("tour.py")


def cells(source: str) -> list[tuple[bool, str]]:
    """The cells of a script in jupytext's percent format: whether each is prose, and its text."""
    parts = re.split(r"^# %%( \[markdown\])?\n", source, flags=re.MULTILINE)
    return [
        (bool(mark), re.sub(r"^# ?", "", text, flags=re.MULTILINE).strip() if mark else text.strip())
        for mark, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def page(source: str) -> tuple[str, dict[str, object]]:
    """The page, and the names that the cells left behind. Pictures go to the folder `tour` of the current one."""
    names: dict[str, object] = {"__name__": "tour"}
    blocks = []
    for is_prose, text in cells(source):
        if is_prose:
            blocks.append(text)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "tour.py", "exec"), names)
        blocks.append(f"```python\n{text}\n```")
        if printed.getvalue():
            blocks.append(f"```text\n{printed.getvalue().rstrip()}\n```")
    return "\n\n".join(blocks) + "\n", names


if __name__ == "__main__":
    os.chdir(SOURCE.parent)
    SOURCE.with_suffix(".md").write_text(page(SOURCE.read_text())[0])
    for path in Path("tour").glob("*.png"):  # a palette takes a third of the bytes
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
