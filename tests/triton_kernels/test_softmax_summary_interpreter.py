"""The Triton kernels between and after the visits to the tiles, in the strict interpreter, against Python's numbers."""

from __future__ import annotations

import math
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from covering import covering
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.kernels import softmax_summary as kernels
from ssl_kernels.ops import contrastive, softmax

pytestmark = pytest.mark.usefixtures("strict")
SCALE = 14.3
UNPAIRED = (1, 4, 255, 299)  # rows and columns without a positive pair


class Summary(NamedTuple):
    loss: Tensor
    unpaired: Tensor
    unit: Tensor
    vectors: Tensor | None


def statistics(size: int, width: int) -> Tensor:
    """As they may come: some without a positive pair, some of these without any pair that counts."""
    found = torch.rand(size, width, dtype=torch.float64) + 0.5
    found[:, 3] = torch.randint(1, 4, (size,))
    if width == 6:
        found[:, 5] = found[:, 3] + torch.randint(1, 9, (size,))
    for row in UNPAIRED:
        found[row : row + 1, 2:4] = 0
    found[4:5] = torch.tensor([-math.inf, *[0.0] * (width - 1)])
    return found


def run(
    stats: Tensor, rows: int, sides: int, smoothing: float, mean: bool, weight: Tensor | None, want: bool = True
) -> Summary:
    loss, unpaired, scalars = torch.empty(()), torch.empty((), dtype=torch.int64), torch.empty(3)
    vectors = torch.empty(4 if smoothing else 3, len(stats)) if want else None
    kernels.softmax_summary(
        stats, rows, sides, torch.tensor(SCALE), smoothing, mean, weight, loss, unpaired, scalars, vectors
    )
    assert scalars[:2].tolist() == [0, 0]
    return Summary(loss, unpaired, scalars[2], vectors)


def expected(stats: Tensor, rows: int, sides: int, smoothing: float, mean: bool, weight: Tensor | None) -> Summary:
    """Row by row, in Python's numbers."""
    whole, unpaired, weights = 0.0, 0, []
    scale = torch.tensor(SCALE).item()
    for side in (stats[:rows], stats[rows:])[:sides]:
        losses = []
        for top, total, positive, positives, *more in side.tolist():
            if positives == 0:
                unpaired += 1
                continue
            gap = (1 - smoothing) * (top - positive / positives)
            gap += smoothing * (top - more[0] / more[1]) if smoothing else 0
            losses.append((scale * gap + math.log(total)) / sides)
        divisor = max(len(losses), 1) if mean else 1
        whole += sum(losses) / divisor
        given = torch.full((len(side),), 1 / divisor, dtype=torch.float64) if weight is None else weight.double()
        weights.append(given / sides)
    every = torch.cat(weights)
    unit = every.abs().max() if len(every) else torch.tensor(1.0)
    unit = torch.tensor(1.0, dtype=torch.float64) if unit == 0 else unit
    every = (every / unit).masked_fill(stats[:, 3] == 0, 0)
    nothing = every == 0
    vectors = [stats[:, 0].masked_fill(nothing, 0), (every / stats[:, 1]).masked_fill(nothing, 0)]
    vectors.append((1 - smoothing) * every / stats[:, 3].clamp(min=1))
    if smoothing:
        vectors.append(smoothing * every / stats[:, 5].clamp(min=1))
    return Summary(torch.tensor(whole), torch.tensor(unpaired), unit, torch.stack(vectors))


@covering(
    2, sizes=[(300, 300), (700, 5), (3, 513), (257, None), (6, None)], smoothing=[0.0, 0.1], mean=[True, False],
    weighted=[False, True],
)  # fmt: skip
def test_the_summary_is_that_of_its_rows(
    sizes: tuple[int, int | None], smoothing: float, mean: bool, weighted: bool
) -> None:
    torch.manual_seed(0)
    rows, columns = sizes
    if weighted and columns is not None:
        columns = rows  # a row and the column that is paired with it have one weight
    sides = 1 if columns is None else 2
    stats = torch.cat([statistics(size, 6 if smoothing else 4) for size in (rows, columns)[:sides] if size])
    weight = torch.randn(rows) if weighted else None
    mean = mean and not weighted
    given = stats, rows, sides, smoothing, mean, weight
    found = run(*given)
    for got, exact in zip(found, expected(*given), strict=True):
        torch.testing.assert_close(got, exact.to(got.dtype), rtol=3e-7, atol=0)
    again = run(*given, want=False)
    assert again.vectors is None
    assert again.loss == found.loss
    assert again.unpaired == found.unpaired


def test_sums_of_many_blocks() -> None:
    """More than are added up at a time."""
    with mock.patch.object(kernels, "_BLOCK", 16), mock.patch.object(kernels, "_BLOCKS", 4):
        for sides in (1, 2):
            stats = torch.cat([statistics(150, 4) for _ in range(sides)])
            for weight in (None, torch.linspace(-2, 1, 150)):
                given = stats, 150, sides, 0.0, weight is None, weight
                for got, exact in zip(run(*given), expected(*given), strict=True):
                    torch.testing.assert_close(got, exact.to(got.dtype), rtol=3e-7, atol=0)


def test_nothing_to_sum_is_zero() -> None:
    for stats in (torch.empty(0, 4, dtype=torch.float64), statistics(2, 4)[1:]):
        found = run(stats, len(stats), 1, 0.0, True, None)
        assert found.loss == 0
        assert found.unpaired == len(stats)
        assert found.unit == 1
        assert (found.vectors == 0).all()
    unweighted = run(statistics(3, 4), 3, 1, 0.0, False, torch.zeros(3))
    assert unweighted.unit == 1
    assert (unweighted.vectors == 0).all()


def test_nan_stays() -> None:
    """Of a row: in the loss and in what its row is given. Of a weight: everywhere, the largest being NaN."""
    stats = statistics(300, 4)
    stats[2, :3] = math.nan
    found = run(stats, 300, 1, 0.0, True, None)
    assert found.loss.isnan()
    assert found.vectors is not None
    assert found.vectors[:2].isnan().nonzero()[:, 1].tolist() == [2, 2]
    assert not found.vectors[2].isnan().any()
    for place in (0, 299, 1):  # row 1 has no pair; its weight is one of those of which the largest is the unit
        weight = torch.ones(300)
        weight[place] = math.nan
        assert run(statistics(300, 4), 300, 1, 0.0, False, weight).unit.isnan()


@pytest.mark.parametrize("upstream", [None, 0.25])
def test_scalars_of_the_backward_pass(upstream: float | None) -> None:
    made = [torch.empty(()) for _ in range(3)]
    given = None if upstream is None else torch.tensor(upstream)
    kernels.finish_scalars(given, torch.tensor(3.0), torch.tensor([5.0, 7.0, 0.5]), *made)
    shared = 0.5 * (upstream or 1)
    assert [t.item() for t in made] == [3 * shared, 5 * shared, 7 * shared]


def test_opcheck_of_the_last_step() -> None:
    dx, dy_t = torch.randn(3, 4), torch.randn(4, 5)
    for dtype, upstream in ((torch.float32, torch.tensor(0.5)), (torch.bfloat16, None)):
        given = contrastive.Finish(upstream, torch.tensor(10.0), torch.randn(3), dx, dy_t.t(), dtype)
        torch.library.opcheck(contrastive.finish_with_triton.in_graphs, tuple(given))
        for found, same in zip(contrastive.finish_with_triton(given), contrastive.finish_gradients(given), strict=True):
            torch.testing.assert_close(found, same)


@covering(1, smoothing=[0.0, 0.2], ids=[False, True], given=["mean", "sum", "none"])
def test_the_loss_is_that_of_operations_of_torch(smoothing: float, ids: bool, given: str) -> None:
    """Whole, with the chain of operations that other devices have."""
    torch.manual_seed(1)
    x, y, scale = torch.randn(20, 8), torch.randn(20, 8), torch.tensor(4.0)
    labels = torch.arange(20) % 7 if ids else None
    found = []
    for chain in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, y, scale)]

        def summarise(a: softmax.Arguments, matrix: object, stats: list[Tensor], want: bool) -> object:
            made = softmax._summarise_eager(a, matrix, stats, torch.float32)  # type: ignore[arg-type]
            return made._replace(sides=[softmax._sides_for_triton(side) for side in made.sides])

        patch = mock.patch.object(softmax, "_summarise", summarise if chain else softmax._summarise)
        with ssl_kernels.use_backend("triton"), patch:
            loss = K.clip_loss(*leaves, x_ids=labels, y_ids=labels, label_smoothing=smoothing, reduction=given)
            (loss * torch.linspace(-1, 2, loss.numel()).view(loss.shape)).sum().backward()
        found.append((loss, *(leaf.grad for leaf in leaves)))
    for one, other in zip(*found, strict=True):
        largest = other.abs().max().item()  # the chain rounds a logarithm to fp32, and takes its exponential
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6 * largest)
