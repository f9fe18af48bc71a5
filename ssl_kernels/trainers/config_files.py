"""Options from a file in YAML or JSON, as a command line has them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import tyro
import yaml
from tyro.conf import Positional

from ssl_kernels.trainers.errors import UserError


def arguments(kind: type[Any], path: Path) -> list[str]:
    """The options of a file for a `kind` of configuration. Keys are the options' names, with `-` or `_`.

    Raises `UserError` that names the keys that are none, or the first value that cannot be used.
    """
    values = {str(key).replace("-", "_"): value for key, value in _read(path).items()}
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    unknown = [key for key in values if key not in defaults]
    if unknown:
        near = difflib.get_close_matches(unknown[0], defaults, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--config: {path} has options that this command has not: {', '.join(unknown)}{hint}")
    bare = _positional(kind)
    options = {
        name: [str(value)] if name in bare else _option(name, value)
        for name, value in values.items()
        if value is not None or defaults[name] is not None
    }
    if None in map(values.get, options) or not _parses(kind, [word for words in options.values() for word in words]):
        for name, words in options.items():
            if values[name] is None or not _parses(kind, words):
                raise UserError(
                    f"--config: {path}: {name}: expected a value as --{_flag(name)} takes, got {values[name]!r}"
                )
    return [word for words in options.values() for word in words]


def _positional(kind: type[Any]) -> set[str]:
    """The arguments of a command that have no flag."""
    mark = Positional[str].__metadata__[0]  # type: ignore[attr-defined]
    hints = get_type_hints(kind, include_extras=True)
    return {name for name, hint in hints.items() if mark in getattr(hint, "__metadata__", ())}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config: cannot read {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config: {path} is neither YAML nor JSON: {reason[:200]}") from None
    if not isinstance(values, Mapping):
        raise UserError(f"--config: {path}: expected options by name, such as `lr: 0.001`")
    return values


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{_flag(name)}" if value else f"--no-{_flag(name)}"]
    if isinstance(value, list | tuple):
        return [f"--{_flag(name)}", *map(str, value)]
    return [f"--{_flag(name)}={value}"]


def _parses(kind: type[Any], words: list[str]) -> bool:
    silence = io.StringIO()  # errors are printed whatever tyro is told
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            tyro.cli(kind, args=words)
    except SystemExit:
        return False
    return True
