r"""Self-distillation cross-entropy of DINO: schema, reference, backends, fake and autograd.

For a sample b, student crops S_v and teacher crops T_t with frozen probabilities p_t = softmax((T_t - c) / tau_t),

    loss_b = sum over pairs (t, v) of -sum_k p_tk log softmax(S_v / tau_s)_k = sum_v n_v lse_v - q_v . S_v / tau_s
    d loss_b / d S_v = (n_v softmax(S_v / tau_s) - q_v) / tau_s

where q_v is the sum of the n_v teachers that crop v is paired with. So each crop is visited once, against the sum of
its teachers, whatever the number of pairs, and no matrix of probabilities is written. With a gradient wanted, it is
written in the same pass, one exponential to an element of the student; the floor is then to read both logits and to
write the gradient. :mod:`ssl_kernels.ops.ibot` is the case of one student and one teacher crop with weights.

The gradient leaves this op as it will be returned if the upstream gradient is 1, as for ``loss.backward()``, and is
handed over by the backward pass without a copy: it is as large as all logits together. In fp16 it leaves as
2^k (n_v softmax - q_v), which neither underflows nor overflows whatever the temperature, and the rest comes with the
upstream gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops._op import Op
from ssl_kernels.ops.hand_over import hand_over
from ssl_kernels.ops.reuse import empty
from ssl_kernels.ops.spans import spans
from ssl_kernels.settings import choose_backend, workspace_bytes

KERNELS = ("cpu", "triton")

if TYPE_CHECKING:
    from typing_extensions import Unpack

Crops = Tensor | Sequence[Tensor]


class Options(TypedDict, total=False):
    """What DINO's and iBOT's losses both take."""

    student_temp: Tensor | float
    teacher_temp: Tensor | float
    center: Tensor | None
    teacher_probs: bool
    reduction: str


@overload
def dino_loss(
    student: Crops, teacher: Crops, *, want_teacher_sum: Literal[False] = ..., pairs: str = ..., **rest: Unpack[Options]
) -> Tensor: ...
@overload
def dino_loss(
    student: Crops, teacher: Crops, *, want_teacher_sum: Literal[True], pairs: str = ..., **rest: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
def dino_loss(
    student: Crops,
    teacher: Crops,
    *,
    student_temp: Tensor | float = 0.1,
    teacher_temp: Tensor | float = 0.04,
    center: Tensor | None = None,
    pairs: str = "distinct",
    teacher_probs: bool = False,
    reduction: str = "mean",
    want_teacher_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Self-distillation of DINO: the cross-entropy between each crop of the student and each crop of the teacher.

    .. math:: L_b = \frac{1}{P} \sum_{(t, v)} -\sum_k p_{tbk} \log \operatorname{softmax}_k(S_{vb} / \tau_s), \qquad
              p_{tb} = \operatorname{softmax}((T_{tb} - c) / \tau_t)

    where P is the number of pairs (t, v). The student's first T crops are the teacher's crops, in the same order.

    Args:
        student: logits of V crops, as one tensor [V, B, K], or as a sequence of crops [B, K] and of blocks of crops [n,
            B, K], in float32, bfloat16, float16 or float64 and with any strides.
        teacher: logits of T crops, likewise, without gradient and of any of these dtypes.
        student_temp, teacher_temp: the temperatures :math:`\tau_s` and :math:`\tau_t`, positive floats or
            floating-point tensors of one element. A tensor on a GPU is not read by the host. They get no gradient.
        center: the centre c, K floating-point elements in any shape; None means 0. Pass the result of
            :func:`sinkhorn_center` to get Sinkhorn-Knopp targets.
        pairs: "distinct" leaves out the pairs of a crop with itself, t = v; "all" keeps them.
        teacher_probs: True if ``teacher`` holds the probabilities p instead of logits; there is no centre then.
        reduction: "mean" or "sum" over the samples, or "none" for the loss of each, [B].
        want_teacher_sum: also return the sum of the teacher's logits over t and b, [K], which the same pass computes.
            Divided by T B, it is the mean that DINO's centre moves towards; :class:`ssl_kernels.DINOLoss` uses it so.

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 logits), or a pair of the loss and the
        teacher's sum. The mean over no samples is NaN.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects. A
            teacher or a centre that requires a gradient does not fit: detach it.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    Each crop is read once, however many pairs it is in. Probabilities are computed in float32, whatever the dtype of
    the logits, and never stored; those below e^-64 may count as 0. The gradient is computed in the forward pass, with
    one exponential per element, and the backward pass hands it over. Besides logits and gradient, the function needs a
    few rows of K elements per thread.

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021, arXiv:2104.14294.

    >>> import torch, ssl_kernels.functional as K
    >>> student = torch.eye(3, 4).repeat(4, 1, 1).requires_grad_()  # two global crops and two local ones
    >>> loss, teacher_sum = K.dino_loss(student, student[:2].detach(), center=torch.zeros(4), want_teacher_sum=True)
    >>> loss.backward()
    >>> round(loss.item(), 6), tuple(student.grad.shape), teacher_sum.tolist()
    (0.000136, (4, 3, 4), [2.0, 2.0, 2.0, 0.0])
    """
    students, teachers = _checks.as_blocks("student", student), _checks.as_blocks("teacher", teacher)
    _checks.check_choice("pairs", pairs, ("distinct", "all"))
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    crops, teacher_crops = _count(students), _count(teachers)
    terms = crops * teacher_crops - (min(crops, teacher_crops) if pairs == "distinct" else 0)
    if terms == 0:
        raise ValueError(
            f"student: expected at least one crop besides the teacher's own, got {crops} for {teacher_crops} of the"
            " teacher and pairs='distinct'"
        )
    return distill(
        students,
        teachers,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        center=center,
        weights=None,
        distinct=pairs == "distinct",
        teacher_probs=teacher_probs,
        scale=1 / terms,
        reduction=reduction,
        want_teacher_sum=want_teacher_sum,
    )


def _count(blocks: Sequence[Tensor]) -> int:
    return sum(block.shape[0] for block in blocks)


def distill(
    students: list[Tensor],
    teachers: list[Tensor],
    *,
    student_temp: Tensor | float,
    teacher_temp: Tensor | float,
    center: Tensor | None,
    weights: Tensor | None,
    distinct: bool,
    teacher_probs: bool,
    scale: float,
    reduction: str,
    want_teacher_sum: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """``scale`` times the weighted losses, summed over pairs and reduced, perhaps with the sum of the teacher's logits.

    That the mean divides by B is not in ``scale``: a graph would be compiled for each B then.
    """
    student, teacher = students[0], teachers[0]
    if teacher.device != student.device:
        raise ValueError(f"teacher: expected the device of student ({student.device}), got {teacher.device}")
    if teacher.shape[1:] != student.shape[1:]:
        got = tuple(teacher.shape[1:])
        raise ValueError(f"teacher: expected [B, K] = {tuple(student.shape[1:])} as student has, got {got}")
    if student.shape[2] == 0:
        raise ValueError(f"student: expected at least one prototype, got shape {tuple(student.shape)}")
    dtype = _checks.accumulation_dtype(torch.promote_types(student.dtype, teacher.dtype))
    constants = {"teacher": teachers, "center": center, "student_temp": student_temp, "teacher_temp": teacher_temp}
    for name, value in constants.items():
        _checks.check_constant(name, value)
    if teacher_probs and center is not None:
        raise ValueError("center: expected None beside teacher_probs=True, for probabilities have no centre")
    wider = student if dtype == student.dtype else teacher
    a = Arguments(
        students,
        teachers,
        _checks.as_center(center, student.shape[2], wider),
        weights,
        _checks.as_temperature("student_temp", student_temp, wider).to(dtype),
        _checks.as_temperature("teacher_temp", teacher_temp, wider).to(dtype),
        distinct,
        teacher_probs,
        want_grad=torch.is_grad_enabled() and any(block.requires_grad for block in students),
        want_sum=want_teacher_sum,
        scale=scale,
        mean=reduction == "mean",
        backend=choose_backend(student.device, dtype, KERNELS),
    )
    rows, teacher_sum = _rows(a)
    loss = rows if reduction == "none" else rows.sum()
    if reduction == "mean" and student.shape[1] == 0:
        loss = loss + math.nan
    return (loss, teacher_sum) if want_teacher_sum else loss


class Arguments(NamedTuple):
    students: list[Tensor]  # blocks [n, B, K]
    teachers: list[Tensor]
    center: Tensor | None  # [K]
    weights: Tensor | None  # [B]
    student_temp: Tensor
    teacher_temp: Tensor
    distinct: bool
    teacher_probs: bool
    want_grad: bool
    want_sum: bool
    scale: float
    mean: bool
    backend: str

    @property
    def share(self) -> float:
        """The factor on the loss of a sample."""
        return self.scale / max(1, self.students[0].shape[1]) if self.mean else self.scale

    @property
    def power(self) -> float:
        """The power of two that a gradient is stored with: 1 but in fp16, where 1/65,536, a probability, is subnormal.

        With it a gradient is at most 1,024, which leaves room for given probabilities that sum up to more than 1.
        """
        if self.students[0].dtype != torch.float16 or not 0 < self.share < math.inf:
            return 1.0
        return 2.0 ** (10 - math.ceil(math.log2(self.share * _count(self.teachers))))

    def probabilities(self, samples: slice = slice(None)) -> list[Tensor]:
        """Of each of the teacher's crops, in the accumulation dtype."""
        found = []
        for crop in (crop[samples].detach().to(self.teacher_temp.dtype) for block in self.teachers for crop in block):
            centered = crop if self.center is None else crop - self.center
            found.append(crop if self.teacher_probs else softmax_of(centered, self.teacher_temp))
        return found


def softmax_of(logits: Tensor, temp: Tensor) -> Tensor:
    """softmax(logits / temp) of rows [..., K], in the dtype of the temperature. The maximum is taken off before the
    division: after it, the digits of small differences between large logits would be gone."""
    logits = logits.to(temp.dtype)
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temp, -1)


def sum_of_teacher(a: Arguments) -> Tensor:
    """[K], of the logits of all crops and samples; empty where it is not wanted."""
    dtype = a.teacher_temp.dtype
    if not a.want_sum:
        return a.teacher_temp.new_empty(0)
    return torch.stack([block.sum((0, 1), dtype=dtype) for block in a.teachers]).sum(0)


def reference(a: Arguments) -> Tensor:
    """The definition: every pair, densely and differentiable any number of times, in fp32 or float64."""
    temp = a.student_temp
    log_s = [torch.log_softmax(crop.to(temp.dtype) / temp, -1) for block in a.students for crop in block]
    rows = torch.zeros_like(log_s[0][:, 0])
    for (t, p_t), (v, log_s_v) in itertools.product(enumerate(a.probabilities()), enumerate(log_s)):
        if not (a.distinct and t == v):
            rows = rows - (p_t * log_s_v).sum(-1)
    return rows if a.weights is None else rows * a.weights


def _rows(a: Arguments) -> tuple[Tensor, Tensor]:
    """The losses [B] and the sum [K] of the teacher's logits, or nothing."""
    if a.backend == "reference":
        return a.share * reference(a), sum_of_teacher(a)
    _checks.check_transforms(*a.students)
    late = None
    if a.students[0].dtype == torch.float16:  # its gradient has no room for small weights
        late = a.weights
        # The backward pass needs the temperature, and the caller may write to its tensor before that.
        a = a._replace(weights=None, student_temp=a.student_temp.clone())
    rows, _, teacher_sum = _op(a)
    return rows if late is None else rows * late, teacher_sum


# A backend takes the arguments; the gradient [V, B, K] to be filled, or None, and the factor on it; and the teacher_sum
# [K] to be filled, or None. It returns the weighted losses [B], summed over pairs. In fp16 the gradient is that by the
# logits over the temperature.


def _dino_eager(a: Arguments, gradient: Tensor | None, scale: float, teacher_sum: Tensor | None) -> Tensor:
    temp, (samples, width) = a.student_temp, a.students[0].shape[1:]
    if teacher_sum is not None:
        teacher_sum.copy_(sum_of_teacher(a))
    losses = temp.new_zeros(samples)
    slope = scale if a.students[0].dtype == torch.float16 else scale / temp
    held = _count(a.teachers) + 6  # matrices [step, K] at a time
    step = max(1, workspace_bytes(temp.device) // (held * width * temp.element_size()))
    for b in range(0, samples, step):
        part = slice(b, b + step)
        p = a.probabilities(part)
        everything = torch.stack(p).sum(0)
        weight = None if a.weights is None else a.weights[part, None]
        for v, crop in enumerate(crop for block in a.students for crop in block):
            q = everything
            if a.distinct and v < len(p):
                if len(p) == 1:  # its own teacher is the only one
                    if gradient is not None:
                        gradient[v, part] = 0
                    continue
                q = torch.stack(p[:v] + p[v + 1 :]).sum(0)
            mass = q.sum(-1, keepdim=True)
            z = crop[part].to(temp.dtype)
            z = (z - z.amax(-1, keepdim=True)) / temp
            e = z.exp()
            total = e.sum(-1, keepdim=True)
            loss = mass * total.log() - (q * z).sum(-1, keepdim=True)
            losses[part] += (loss if weight is None else loss * weight)[:, 0]
            if gradient is not None:
                g = e.mul_(mass / total).sub_(q).mul_(slope)
                gradient[v, part] = g if weight is None else g.mul_(weight)
    return losses


def _dino_cpu(a: Arguments, gradient: Tensor | None, scale: float, teacher_sum: Tensor | None) -> Tensor:
    samples, width = a.students[0].shape[1:]
    losses = a.student_temp.new_empty(samples)
    if teacher_sum is not None:
        teacher_sum.zero_()
    students, teachers = ([unit_stride(block) for block in blocks] for blocks in (a.students, a.teachers))
    arguments = (
        students, teachers, a.center, a.weights, a.student_temp.item(), a.teacher_temp.item(), a.distinct,
        a.teacher_probs, losses, gradient, scale, teacher_sum,
    )  # fmt: skip
    for begin, end in spans(samples, width * (_count(a.students) + _count(a.teachers))):
        torch.ops.ssl_kernels.dino_rows_(*arguments, begin, end)
    return losses


def unit_stride(logits: Tensor) -> Tensor:
    """Rows that are contiguous in memory."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _dino_triton(a: Arguments, gradient: Tensor | None, scale: float, teacher_sum: Tensor | None) -> Tensor:
    from ssl_kernels.kernels import dino as kernels

    if teacher_sum is not None:
        teacher_sum.copy_(kernels.teacher_sum(a.teachers))
    losses: Tensor = kernels.dino(*a[:8], gradient, scale)
    return losses


_BACKENDS = {"eager": _dino_eager, "cpu": _dino_cpu, "triton": _dino_triton}


def _forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of samples, their gradient by the logits times the power, and the sum of the teacher's."""
    gradient = empty(_gradient_shape(a), a.students[0])
    teacher_sum = a.student_temp.new_empty(a.students[0].shape[2] if a.want_sum else 0)
    losses = _BACKENDS[a.backend](
        a, gradient if a.want_grad else None, a.share * a.power, teacher_sum if a.want_sum else None
    )
    return losses.mul_(a.share), gradient, teacher_sum


def _fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    _, samples, width = a.students[0].shape
    new = a.student_temp.new_empty
    return new(samples), a.students[0].new_empty(_gradient_shape(a)), new(width if a.want_sum else 0)


def _gradient_shape(a: Arguments) -> list[int]:
    return [_count(a.students), *a.students[0].shape[1:]] if a.want_grad else [0]


def _setup_context(ctx: Any, a: Arguments, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, gradient, teacher_sum = output
    ctx.mark_non_differentiable(teacher_sum)  # and not the gradient: differentiating it again is to meet an error
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, *([a.student_temp] if gradient.dtype == torch.float16 else []))
    ctx.crops, ctx.teachers = [block.shape[0] for block in a.students], len(a.teachers)
    ctx.unscale, ctx.backend = 1 / a.power, a.backend


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    rest = ([None] * ctx.teachers, *[None] * (len(Arguments._fields) - 2))
    if upstream is None:
        return ([None] * len(ctx.crops), *rest)
    gradient, *student_temp = ctx.saved_tensors
    factor = upstream * ctx.unscale
    for temp in student_temp:
        factor = factor / temp
    return (list(hand_over(gradient, factor, ctx.backend).split(ctx.crops)), *rest)


_op = Op(
    "dino",
    Arguments,
    "(Tensor losses, Tensor gradient, Tensor teacher_sum)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
