"""Losses over several processes are those of one process with the whole batch, and so are their gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes


def run(names: str, folder: Path, world: int) -> None:
    calls = "; ".join(f"losses.{name}(rank, world)" for name in names.split())
    run_processes(f"import losses; {calls}", folder, world)


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_loss_is_that_of_one_process(world: int, tmp_path: Path) -> None:
    run("every_loss_is_that_of_one_process", tmp_path, world)


def test_three_processes_and_groups_of_them(tmp_path: Path) -> None:
    run("every_loss_is_that_of_one_process groups_may_be_parts modules_take_world_size", tmp_path, 3)


def test_other_kernels_large_batches_and_graphs(tmp_path: Path) -> None:
    run(
        "the_reference_and_other_kernels_agree log_sum_exps_meet_the_candidates_of_all large_batches_take_many_tiles "
        "compiled what_is_sharded autocast_travels_in_16_bits",
        tmp_path,
        2,
    )
