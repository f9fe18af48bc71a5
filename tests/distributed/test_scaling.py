"""The document on many processes says what the script of its model prints."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_are_those_of_the_script() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import scaling
    finally:
        sys.path.pop(0)
    document = (ROOT / "docs" / "scaling.md").read_text()
    assert document.endswith(scaling.text())
    way = scaling.WAYS["SigLIP"][1]
    assert way.name == "ours, ring"
    assert scaling.travelling_bytes(way, 512, 8, 768) == 2 * 7 * 512 * 768 * 2  # 2 (N - B) D s
