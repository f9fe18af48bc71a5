"""The command lines that README shows are understood."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from ssl_kernels.trainers import command
from ssl_kernels.trainers.siglip import SigLipConfig

README = Path(__file__).resolve().parents[2] / "README.md"
PREFIX = "    ssl-kernels train siglip"
LINES = [line for line in README.read_text().splitlines() if line.startswith(PREFIX)]


def test_there_are_some() -> None:
    assert len(LINES) >= 4


@pytest.mark.parametrize("line", [line for line in LINES if "--resume" not in line and "--help" not in line])
def test_a_command_parses(line: str) -> None:
    arguments = shlex.split(line, comments=True)[3:]
    command.parse(SigLipConfig, arguments, "ssl-kernels train siglip").check()
