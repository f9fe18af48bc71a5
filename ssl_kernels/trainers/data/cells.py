"""What the cells of a table mean: texts, lists of captions, and files."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

# What other programs write for a missing text: those of pandas, which reads each of them as none.
MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip


def image_path(folder: Path, name: str) -> Path:
    """The file that a table in a folder names, in the spelling of any system."""
    name = name.strip()
    if name.lower().startswith("file://"):
        name = unquote(name[7:])
    path = folder / os.path.expanduser(name)
    if "\\" in name and os.sep == "/" and not os.path.exists(path):
        path = folder / os.path.expanduser(name.replace("\\", "/"))
    return path


def captions_of(value: Any) -> list[str]:
    """The captions in a cell: a text, a list of them, or a list as JSON or Python write it; each once."""
    if isinstance(value, str) and re.match(r"\s*\[\s*['\"]", value):
        value = _list_in(value)
    values: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    return list(dict.fromkeys(text for each in values if (text := text_of(each))))


def _list_in(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return value
    return text


def text_of(value: Any) -> str:
    """A cell as text; "" where it stands for none."""
    if isinstance(value, str):
        text = value if value.isascii() else value.encode("utf-8", "replace").decode()  # JSON may hold half a letter
    else:
        text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else ""
    text = text.strip()
    return "" if text in MISSING else text
