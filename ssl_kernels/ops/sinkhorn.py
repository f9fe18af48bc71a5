r"""Sinkhorn-Knopp assignment of samples to prototypes: schema, reference, backends and fake.

The algorithm scales columns and rows of exp(T / tau) in turn, so that each prototype (column) and then each sample
(row) receives the same mass. In logarithms, with z = T / tau and potentials v of columns and u of rows,

    v_k = log sum_i exp(z_ik - u_i),   u_i = log sum_k exp(z_ik - v_k)

starting from u = 0, n times. It ends with the rows: the assignment softmax_k(z_ik - v_k) is that of a teacher with the
centre c = tau v, and all that a loss needs of it are these K numbers.

The first v subtracts the maximum of each column. From then on q_ik = exp(z_ik - v_k - u_i) is a probability, the sum
of column k is exp of the change of v_k, and it cannot underflow: some q_ik is at least 1 / (N K), for exp(z_ik - v_k)
sums to 1 over the column before the rows are scaled. So n iterations read the logits n times, once each (twice each
after the first on a GPU, whose caches hold no row), and exchange one maximum and n sums of K numbers among processes;
no N x K matrix is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_kernels.distributed import Group, process_group
from ssl_kernels.ops import _checks
from ssl_kernels.ops._op import Op
from ssl_kernels.ops.dino import softmax_of, unit_stride
from ssl_kernels.ops.spans import spans
from ssl_kernels.settings import choose_backend

KERNELS = ("cpu", "triton")


def sinkhorn_knopp(
    teacher: Tensor,
    teacher_temp: Tensor | float,
    *,
    n_iterations: int = 3,
    group: Group = None,
) -> Tensor:
    r"""The Sinkhorn-Knopp assignment itself, for code that needs to store it.

    It equals ``centered_softmax(teacher, teacher_temp, center)`` with the centre of :func:`sinkhorn_center`. A loss of
    this library needs only that centre.

    Args:
        teacher, teacher_temp, n_iterations, group: as in :func:`sinkhorn_center`.

    Returns:
        Probabilities in the shape of ``teacher``, in float32 (float64 for float64 logits). Each of the N rows sums to
        1, and each of the K columns nearly to N / K.

    Raises:
        TypeError, ValueError: as :func:`sinkhorn_center`.

    >>> import torch, ssl_kernels.functional as K
    >>> q = K.sinkhorn_knopp(torch.randn(8, 4), teacher_temp=0.04)
    >>> torch.allclose(q.sum(1), torch.ones(8))
    True
    """
    center = sinkhorn_center(teacher, teacher_temp, n_iterations=n_iterations, group=group)
    return centered_softmax(teacher, teacher_temp, center)


def sinkhorn_center(
    teacher: Tensor,
    teacher_temp: Tensor | float,
    *,
    n_iterations: int = 3,
    group: Group = None,
) -> Tensor:
    r"""The centre c for which softmax((T - c) / tau) is the Sinkhorn-Knopp assignment of samples to prototypes.

    .. math:: v_k = \log \sum_i \exp(T_{ik} / \tau - u_i), \qquad u_i = \log \sum_k \exp(T_{ik} / \tau - v_k),
              \qquad c = \tau v

    starting from u = 0, ``n_iterations`` times. Pass the centre to :func:`dino_loss` or :func:`ibot_patch_loss`, and
    the teacher's probabilities are those of DINOv2, without ever being stored.

    Args:
        teacher: [..., K] logits without gradient, one row per sample, in float32, bfloat16, float16 or float64.
        teacher_temp: the temperature :math:`\tau`, a positive float or a floating-point tensor of one element.
        n_iterations: how often the two equations are applied.
        group: the processes whose samples are assigned together, a ``ProcessGroup`` or a ``DeviceMesh`` of one
            dimension. None means all processes if ``torch.distributed`` is initialised. They exchange K elements per
            iteration, and may have different numbers of samples.

    Returns:
        [K], float32 (float64 for float64 logits), the same on all processes. Without samples it is 0.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.

    Logits of any magnitude are fine: nothing overflows, and no column underflows. On a CPU the logits are read
    ``n_iterations`` times.

    Source: Cuturi, 2013, arXiv:1306.0895; Caron et al., SwAV, 2020, arXiv:2006.09882; Oquab et al., DINOv2, 2023,
    arXiv:2304.07193.

    >>> import torch, ssl_kernels.functional as K
    >>> teacher = torch.tensor([[4.0, 0.0], [3.0, 0.0]])  # both prefer the first prototype
    >>> center = K.sinkhorn_center(teacher, teacher_temp=1.0)
    >>> [[round(p, 2) for p in row] for row in K.centered_softmax(teacher, 1.0, center).tolist()]
    [[0.62, 0.38], [0.38, 0.62]]
    """
    rows, temp = _checked(teacher, teacher_temp)
    if not isinstance(n_iterations, int) or isinstance(n_iterations, bool) or n_iterations < 1:
        raise ValueError(f"n_iterations: expected an int, at least 1, got {n_iterations!r}")
    processes = process_group(group)
    backend = choose_backend(rows.device, rows.dtype, KERNELS)
    if backend == "reference":
        return reference(rows, temp, n_iterations, processes)
    maximum, total = _column_lse(Arguments(rows, None, temp, backend))
    overall = _all_reduce(maximum, "max", processes)
    total = _all_reduce(total * torch.exp(torch.where(total == 0, 0, maximum - overall) / temp), "sum", processes)
    center = torch.where(total == 0, 0, overall + temp * total.log())  # no rows anywhere: no preference
    for _ in range(n_iterations - 1):
        total = _all_reduce(_column_sums(Arguments(rows, center, temp, backend)), "sum", processes)
        center = center + torch.where(total == 0, 0, temp * total.log())
    return center


def centered_softmax(teacher: Tensor, teacher_temp: Tensor | float, center: Tensor | None = None) -> Tensor:
    r"""Probabilities :math:`\operatorname{softmax}_k((T - c) / \tau)` in float32, for code that needs to store them.

    Args:
        teacher: [..., K] logits without gradient, in float32, bfloat16, float16 or float64 and with any strides.
        teacher_temp: the temperature :math:`\tau`, a positive float or a floating-point tensor of one element.
        center: the centre c, K floating-point elements in any shape; None means 0.

    Returns:
        The shape of ``teacher`` in float32 (float64 for float64 logits).

    >>> import torch, ssl_kernels.functional as K
    >>> [round(p, 2) for p in K.centered_softmax(torch.tensor([[1.0, 2.0]]), 1.0, torch.tensor([0.0, 1.0]))[0].tolist()]
    [0.5, 0.5]
    """
    rows, temp = _checked(teacher, teacher_temp)
    _checks.check_constant("center", center)
    center = _checks.as_center(center, rows.shape[1], rows)
    backend = choose_backend(rows.device, rows.dtype, KERNELS)
    probabilities: Tensor = _centered_softmax(Arguments(rows, center, temp, backend))
    return probabilities.reshape(teacher.shape)


def _checked(teacher: Tensor, teacher_temp: Tensor | float) -> tuple[Tensor, Tensor]:
    """The logits as rows [N, K], and the temperature as a tensor."""
    if not isinstance(teacher, Tensor):
        raise TypeError(f"teacher: expected a tensor, got {type(teacher).__name__}")
    if teacher.dim() < 2 or teacher.shape[-1] == 0:
        raise ValueError(f"teacher: expected shape [..., K] with rows and K >= 1, got {tuple(teacher.shape)}")
    if teacher.dtype not in _checks.FEATURE_DTYPES:
        raise TypeError(f"teacher: expected dtype float32, bfloat16, float16 or float64, got {teacher.dtype}")
    _checks.check_constant("teacher", teacher)
    _checks.check_constant("teacher_temp", teacher_temp)
    rows = teacher.detach().flatten(0, -2)
    return rows, _checks.as_temperature("teacher_temp", teacher_temp, rows)


def reference(rows: Tensor, temp: Tensor, n_iterations: int, group: dist.ProcessGroup | None) -> Tensor:
    """The definition, dense and in logarithms, in fp32 or float64."""
    z = rows.to(temp.dtype) / temp
    u = z.new_zeros(len(z))
    v = z.new_zeros(z.shape[1])
    for _ in range(n_iterations):
        exponents = z - u[:, None]
        top = _all_reduce(torch.cat([exponents, z.new_full((1, z.shape[1]), -torch.inf)]).amax(0), "max", group)
        total = _all_reduce((exponents - top).exp().sum(0), "sum", group)
        v = torch.where(total == 0, 0, top + total.log())
        u = (z - v).logsumexp(1)
    return temp * v


def _all_reduce(values: Tensor, operation: str, group: dist.ProcessGroup | None) -> Tensor:
    """Over the processes of the group; over all there are, if no group is given."""
    if group is not None or (dist.is_available() and dist.is_initialized()):
        op = dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM
        values = values.clone()
        dist.all_reduce(values, op=op, group=group)
    return values


class Arguments(NamedTuple):
    """Of all three passes over the logits."""

    rows: Tensor  # [N, K]
    center: Tensor | None  # [K]
    temp: Tensor
    backend: str


# The passes in eager PyTorch: a chunk of rows or columns at a time.


def _chunks(rows: Tensor, dim: int) -> tuple[Tensor, ...]:
    elements = 2**22
    return rows.split(max(1, elements // max(1, rows.shape[1 - dim])), dim)


def _probabilities(a: Arguments) -> Iterator[Tensor]:
    """Of a chunk of rows at a time."""
    for rows in _chunks(a.rows, 0):
        yield softmax_of(rows if a.center is None else rows.to(a.temp.dtype) - a.center, a.temp)


def _column_lse_eager(a: Arguments) -> tuple[Tensor, Tensor]:
    maxima, totals = [], []
    for part in _chunks(a.rows, 1):
        part = part.to(a.temp.dtype)
        maximum = part.amax(0)
        maxima.append(maximum)
        totals.append(((part - maximum) / a.temp).exp().sum(0))
    return torch.cat(maxima), torch.cat(totals)


def _column_lse_forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Of each column the maximum m and the sum of exp((T - m) / temp)."""
    maximum, total = _column_lse_fake(a)
    if a.rows.shape[0] == 0:
        return maximum.fill_(-torch.inf), total.zero_()
    if a.backend == "cpu":
        rows = unit_stride(a.rows)
        for span in spans(*rows.shape):
            torch.ops.ssl_kernels.sinkhorn_column_lse_(rows, a.temp.item(), maximum, total, *span)
        return maximum, total
    if a.backend == "triton":
        from ssl_kernels.kernels import sinkhorn as kernels

        maximum, total = kernels.column_lse(a.rows, a.temp)
        return maximum, total
    return _column_lse_eager(a)


def _column_lse_fake(a: Arguments) -> tuple[Tensor, Tensor]:
    return a.temp.new_empty(a.rows.shape[1]), a.temp.new_empty(a.rows.shape[1])


def _column_sums_forward(a: Arguments) -> Tensor:
    """The sum over rows of softmax_k((T - center) / temp)."""
    assert a.center is not None
    sums = _column_sums_fake(a).zero_()
    if a.rows.shape[0] == 0:
        return sums
    if a.backend == "cpu":
        rows = unit_stride(a.rows)
        for span in spans(*rows.shape):
            torch.ops.ssl_kernels.sinkhorn_column_sums_(rows, a.center, a.temp.item(), sums, *span)
        return sums
    if a.backend == "triton":
        from ssl_kernels.kernels import sinkhorn as kernels

        found: Tensor = kernels.column_sums(a.rows, a.temp, a.center)
        return found
    return torch.stack([p.sum(0) for p in _probabilities(a)]).sum(0)


def _column_sums_fake(a: Arguments) -> Tensor:
    return a.temp.new_empty(a.rows.shape[1])


def _centered_softmax_forward(a: Arguments) -> Tensor:
    if a.rows.shape[0] == 0:
        return _centered_softmax_fake(a)
    if a.backend == "cpu":
        rows, probabilities = unit_stride(a.rows), _centered_softmax_fake(a)
        for span in spans(*rows.shape):
            torch.ops.ssl_kernels.centered_softmax_(rows, a.center, a.temp.item(), probabilities, *span)
        return probabilities
    if a.backend == "triton":
        from ssl_kernels.kernels import sinkhorn as kernels

        found: Tensor = kernels.centered_softmax(a.rows, a.temp, a.center)
        return found
    return torch.cat(list(_probabilities(a)))


def _centered_softmax_fake(a: Arguments) -> Tensor:
    return a.temp.new_empty(a.rows.shape)


_column_lse = Op(
    "column_lse", Arguments, "(Tensor maximum, Tensor total)", forward=_column_lse_forward, fake=_column_lse_fake
)
_column_sums = Op("column_sums", Arguments, "Tensor", forward=_column_sums_forward, fake=_column_sums_fake)
_centered_softmax = Op(
    "centered_softmax", Arguments, "Tensor", forward=_centered_softmax_forward, fake=_centered_softmax_fake
)
