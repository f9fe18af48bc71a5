"""sentence-transformers' losses with `gather_across_devices`, theirs and ours, in a rank of several."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peers import assert_same, value_and_gradients
from text_models import module_of, trained
from torch import Tensor

import ssl_kernels
from ssl_kernels.distributed import gather_rows

GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def columns(rank: int, rows: Sequence[int], count: int, width: int = 12) -> list[Tensor]:
    """Embeddings of this rank: queries, their positives, and hard negatives."""
    torch.manual_seed(count)
    whole = [torch.randn(sum(rows), width) for _ in range(count)]
    whole[1] += whole[0]
    first = sum(rows[:rank])
    return [t[first : first + rows[rank]].clone().requires_grad_() for t in whole]


def rankings() -> Iterator[dict[str, Any]]:
    for directions, mode in (
        (("query_to_doc",), "joint"), (("query_to_doc", "doc_to_query"), "per_direction"), (GTE, "joint")
    ):  # fmt: skip
        for hardness in (None, "in_batch_negatives", "hard_negatives", "all_negatives"):
            yield {
                "directions": directions, "partition_mode": mode, "hardness_mode": hardness,
                "hardness_strength": 4.0 if hardness else 0.0,
            }  # fmt: skip


def ranking(whose: str, **options: Any) -> Any:
    return module_of(whose).MultipleNegativesRankingLoss(None, 10.0, gather_across_devices=True, **options)


def ranking_losses_gather_as_theirs(rank: int, world: int) -> None:
    """The values of this rank, and the gradients that reach it from all ranks."""
    for options, count in itertools.product(rankings(), (2, 4)):
        leaves = columns(rank, [9] * world, count)
        found = (
            value_and_gradients(ranking(whose, **options).compute_loss_from_embeddings(leaves, None), leaves)
            for whose in ("ours", "theirs")
        )
        assert_same(*found)


def guided_losses_gather_as_theirs(rank: int, world: int) -> None:
    for anchors, positives, margin, count in itertools.product((False, True), (False, True), (0.0, 0.1), (2, 4)):
        leaves = columns(rank, [9] * world, count)
        guides = [[t.detach()[:, :7] + 0.3] for t in leaves]
        options = SimpleNamespace(
            temperature=0.1, margin_strategy="relative", margin=margin, contrast_anchors=anchors,
            contrast_positives=positives, gather_across_devices=True, mini_batch_size=4, show_progress_bar=False,
            cross_entropy_loss=torch.nn.CrossEntropyLoss(),
        )  # fmt: skip
        options.sim_matrix = lambda x, y: torch.cosine_similarity(x[:, None], y, dim=-1)
        found = (
            value_and_gradients(
                module_of(whose).CachedGISTEmbedLoss.calculate_loss(options, [[t] for t in leaves], guides), leaves
            )
            for whose in ("ours", "theirs")
        )
        assert_same(*found)


def ranks_may_have_other_numbers_of_texts(rank: int, world: int) -> None:
    """The gradients, which data-parallel trainers average, are those of one process with all texts."""
    rows = list(range(5, 5 + world))
    for options, backend in itertools.product(rankings(), ("auto", "reference")):
        if options["directions"] == GTE:  # the mean of the ranks' means
            continue
        loss = ranking("ours", **options)
        leaves = columns(rank, rows, 3)
        with ssl_kernels.use_backend(backend):
            gradients = value_and_gradients(loss.compute_loss_from_embeddings(leaves, None), leaves)[1:]
        whole = [gather_rows(t).requires_grad_() for t in leaves]
        loss.gather_across_devices = False
        expected = value_and_gradients(loss.compute_loss_from_embeddings(whole, None), whole)[1:]
        first = sum(rows[:rank])
        assert_same([g / world for g in gradients], [g[first : first + rows[rank]] for g in expected])


def fifty_steps_of_its_trainer(rank: int, world: int) -> None:
    """The curves of this rank's losses, which gather and do not, cached and not."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # where nobody meets: the group is there
    for name, options in (
        ("MultipleNegativesRankingLoss", {"directions": GTE}),
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 4}),
    ):
        curves = []
        for whose in ("ours", "theirs"):
            kind = getattr(module_of(whose), name)
            with tempfile.TemporaryDirectory() as folder:
                curves.append(
                    trained(
                        lambda model, kind=kind, options=options: kind(model, gather_across_devices=True, **options),
                        Path(folder), steps=50, batch=8, columns=3, ddp_backend="gloo",
                    )
                )  # fmt: skip
        assert len(curves[0]) == 50
        for ours, theirs in zip(*curves, strict=True):
            assert abs(ours - theirs) <= 1e-5 * theirs, (name, ours, theirs)
