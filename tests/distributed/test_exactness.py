"""Which modes of the peers have exact gradients over several processes: ours has them in all."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes


def test_ours_are_exact(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("lightly")
    calls = ("ours_are_exact", "local_losses_are_open_clip_s")
    run_processes("import exactness; " + "; ".join(f"exactness.{call}(rank, world)" for call in calls), tmp_path, 3)
    print((tmp_path / "stderr of rank 0").read_text())  # the errors
