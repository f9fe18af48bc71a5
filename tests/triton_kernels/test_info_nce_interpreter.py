"""The Triton kernels of InfoNCE after the softmax over keys, in the strict interpreter, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from torch import Tensor

from ssl_kernels.kernels.info_nce import info_nce_gradients, info_nce_rows

pytestmark = pytest.mark.usefixtures("strict")
SCALE = torch.tensor(5.0)
ROWS = 5


def rows_of(width: int, dtype: torch.dtype, strided: bool) -> Tensor:
    made = F.normalize(torch.randn(ROWS, width), dim=1).to(dtype)
    return made.t().contiguous().t() if strided else made


def close(got: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> None:
    unit = 3e-7 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact.double(), rtol=unit, atol=unit * exact.abs().max().item() + 1e-12)


@covering(
    2, width=[1, 24, 1500], dtype=[torch.float32, torch.bfloat16, torch.float16], strided=[False, True],
    is_key=[False, True], with_pull=[False, True], per_row=[False, True], with_slope=[False, True],
)  # fmt: skip
def test_rows_and_gradients(
    width: int, dtype: torch.dtype, strided: bool, is_key: bool, with_pull: bool, per_row: bool, with_slope: bool
) -> None:
    torch.manual_seed(0)
    query, positive = rows_of(width, dtype, strided), rows_of(width, dtype, not strided)
    lse = torch.tensor([-9.0, 0.5, 3.0, 12.0, 40.0])
    mean = torch.randn(ROWS, width) if with_pull else None
    pull, loss, slope = None if mean is None else mean.clone(), torch.empty(ROWS), torch.empty(ROWS)
    info_nce_rows(query, positive, lse, SCALE, pull, loss, slope, 0.25, is_key)

    q, p = query.double(), positive.double()
    gap = lse.double() - SCALE * (q * p).sum(1)
    exact = gap if is_key else F.softplus(gap, threshold=1000)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=2e-6 if is_key else 0)
    torch.testing.assert_close(
        slope.double(), 0.25 * (torch.ones(ROWS).double() if is_key else gap.sigmoid()), rtol=2e-6, atol=0
    )
    if pull is None or mean is None:
        pull = torch.randn(ROWS, width)
    else:
        torch.testing.assert_close(pull, mean - positive.float(), rtol=0, atol=0)

    upstream = torch.linspace(-1, 2, 2 * ROWS)[::2] if per_row else torch.tensor(0.7)
    f = upstream.double() * (slope.double() if with_slope else 1) * torch.ones(ROWS)
    by_query, by_positive = (torch.empty(ROWS, width, dtype=dtype) for _ in range(2))
    by_scale = torch.empty(ROWS)
    given = upstream, slope if with_slope else None, query
    info_nce_gradients(*given, pull, SCALE, by_query, by_positive, by_scale)
    close(by_query, pull * (f * SCALE)[:, None], dtype)
    close(by_positive, q * (-f * SCALE)[:, None], dtype)
    close(by_scale, (q * pull).sum(1) * f)
    alone = torch.empty_like(by_positive)
    info_nce_gradients(*given, None, SCALE, None, alone, None)
    assert torch.equal(alone, by_positive)


def test_numbers_that_are_not_finite() -> None:
    """As operations of torch have it: an infinite similarity is no perfect match, and no key is none to be mistaken."""
    query = torch.tensor([[1.0], [math.inf], [1.0], [math.nan], [1.0]])
    lse = torch.tensor([-math.inf, 3.0, math.inf, 2.0, 5 + 1e-6])
    loss, slope = torch.empty(ROWS), torch.empty(ROWS)
    info_nce_rows(query, torch.ones(ROWS, 1), lse, SCALE, None, loss, slope, 1.0, False)
    assert loss[0] == slope[0] == 0
    assert loss[1].isnan()
    assert loss[2] == math.inf
    assert slope[2] == 1
    assert loss[3].isnan()
    assert slope[3].isnan()
    assert loss[4].item() == pytest.approx(math.log(2), rel=1e-6)
