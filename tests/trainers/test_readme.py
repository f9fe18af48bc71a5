"""The command lines that README shows are understood."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest

from ssl_kernels.cli import TRAINERS
from ssl_kernels.trainers import command
from ssl_kernels.trainers.loop import LoopConfig

README = Path(__file__).resolve().parents[2] / "README.md"
LINES = [line for line in README.read_text().splitlines() if line.startswith("    ssl-kernels train ")]


def config_of(trainer: str) -> type[LoopConfig]:
    """The configuration that a trainer's own module defines."""
    module = importlib.import_module(f"ssl_kernels.trainers.{trainer}")
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, LoopConfig)]
    (own,) = [kind for kind in kinds if kind.__module__ == module.__name__]
    return own


def test_every_trainer_is_shown() -> None:
    assert {shlex.split(line, comments=True)[2] for line in LINES} == set(TRAINERS)


@pytest.mark.parametrize("line", [line for line in LINES if "--resume" not in line and "--help" not in line])
def test_a_command_parses(line: str) -> None:
    _, _, trainer, *arguments = shlex.split(line, comments=True)
    command.parse(config_of(trainer), arguments, f"ssl-kernels train {trainer}").check()
