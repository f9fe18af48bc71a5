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
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.contrastive import no_double_backward
from ssl_kernels.ops.reuse import empty
from ssl_kernels.ops.spans import spans
from ssl_kernels.settings import choose_backend, workspace_bytes

KERNELS = ("cpu", "triton")

Crops = Tensor | Sequence[Tensor]


@overload
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
    want_teacher_sum: Literal[False] = False,
) -> Tensor: ...
@overload
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
    want_teacher_sum: Literal[True],
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
    r"""Self-distillation of DINO: cross-entropy of the student's crops under the teacher's, over all pairs of crops.

    .. math:: L_b = \frac{1}{P} \sum_{(t, v)} -\sum_k p_{tbk} \log \operatorname{softmax}_k(S_{vb} / \tau_s), \qquad
              p_{tb} = \operatorname{softmax}((T_{tb} - c) / \tau_t)

    where P is the number of pairs (t, v). The teacher's crops are the first of the student's, in the same order.

    Args:
        student: logits of V crops, as one tensor [V, B, K] or a sequence of crops [B, K] and blocks of crops [n, B, K],
            float32, bfloat16, float16 or float64, any strides.
        teacher: logits of T crops likewise, without gradient, of any of these dtypes.
        student_temp, teacher_temp: :math:`\tau_s` and :math:`\tau_t`, positive floats or floating tensors of one
            element, which the host does not read on a GPU; no gradient flows to them.
        center: c, K floating elements in any shape; None is zero. That of :func:`sinkhorn_center` makes the p those of
            Sinkhorn-Knopp.
        pairs: "distinct" leaves out pairs of the same crop, t = v; "all" does not.
        teacher_probs: ``teacher`` holds probabilities p instead of logits, and there is no centre.
        reduction: "mean" or "sum" over the samples, or "none", [B].
        want_teacher_sum: also return the sum of the teacher's logits over t and b, [K], from the same pass: divided by
            T B it is what c moves towards, as by :class:`ssl_kernels.DINOLoss`.

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 logits), or a pair with the sum. The mean
        over no samples is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; a teacher or a centre that requires
            a gradient is to be detached.
        RuntimeError: on double backward, which only the reference backend supports.

    Each crop is visited once, however many pairs it is in. Probabilities are formed in float32 whatever the dtype of
    the logits, and never written; those below e^-64 may count as 0. The gradient is written in the forward pass, one
    exponential to an element, and handed over by the backward pass. Memory beside logits and gradient is a few rows of
    K elements to a thread.

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021, arXiv:2104.14294.

    >>> import torch, ssl_kernels.functional as K
    >>> student = torch.eye(3, 4).repeat(4, 1, 1).requires_grad_()  # two global crops and two local ones
    >>> loss, teacher_sum = K.dino_loss(student, student[:2].detach(), center=torch.zeros(4), want_teacher_sum=True)
    >>> loss.backward()
    >>> round(loss.item(), 6), tuple(student.grad.shape), teacher_sum.tolist()
    (0.000136, (4, 3, 4), [2.0, 2.0, 2.0, 0.0])
    """
    students, teachers = as_blocks("student", student), as_blocks("teacher", teacher)
    _checks.check_choice("pairs", pairs, ("distinct", "all"))
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    crops, teacher_crops = _count(students), _count(teachers)
    terms = crops * teacher_crops - (min(crops, teacher_crops) if pairs == "distinct" else 0)
    if terms == 0:
        raise ValueError(
            f"student: expected at least one crop besides the teacher's own, got {crops} for {teacher_crops} of the"
            " teacher and pairs='distinct'"
        )
    samples = students[0].shape[1]
    rows, teacher_sum = distill(
        students,
        teachers,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        center=center,
        weights=None,
        distinct=pairs == "distinct",
        teacher_probs=teacher_probs,
        scale=1 / terms,
        mean=reduction == "mean",
        want_sum=want_teacher_sum,
    )
    loss = rows if reduction == "none" else rows.sum()
    if reduction == "mean" and samples == 0:
        loss = loss + math.nan
    return (loss, teacher_sum) if want_teacher_sum else loss


def as_blocks(name: str, crops: Crops) -> list[Tensor]:
    """Crops as blocks [n, B, K] of one dtype, device, B and K; those given as [B, K] become blocks of one."""
    if not isinstance(crops, Tensor | Sequence):
        raise TypeError(f"{name}: expected a tensor or a sequence of tensors, got {type(crops).__name__}")
    blocks = [crops] if isinstance(crops, Tensor) else list(_checks.autocast_widest(*crops))
    if not blocks:
        raise ValueError(f"{name}: expected at least one crop, got an empty list")
    for i, block in enumerate(blocks):
        label = name if isinstance(crops, Tensor) else f"{name}[{i}]"
        if not isinstance(block, Tensor):
            raise TypeError(f"{label}: expected a tensor, got {type(block).__name__}")
        if block.dtype not in _checks.FEATURE_DTYPES:
            raise TypeError(f"{label}: expected dtype float32, bfloat16, float16 or float64, got {block.dtype}")
        if block.dim() == 2 and not isinstance(crops, Tensor):
            blocks[i] = block = block[None]
        if block.dim() != 3:
            wanted = "[crops, B, K]" if isinstance(crops, Tensor) else "[B, K] or [crops, B, K]"
            raise ValueError(f"{label}: expected shape {wanted}, got {tuple(block.shape)}")
        first = blocks[0]
        if block.dtype != first.dtype:
            raise TypeError(f"{label}: expected the dtype of {name}[0] ({first.dtype}), got {block.dtype}")
        if block.device != first.device:
            raise ValueError(f"{label}: expected the device of {name}[0] ({first.device}), got {block.device}")
        if block.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{label}: expected [B, K] = {tuple(first.shape[1:])} as {name}[0] has, got {tuple(block.shape[1:])}"
            )
    if _count(blocks) == 0:
        raise ValueError(f"{name}: expected at least one crop, got shape {tuple(blocks[0].shape)}")
    return blocks


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
    mean: bool,
    want_sum: bool,
) -> tuple[Tensor, Tensor]:
    """``scale`` times the weighted losses [B], summed over pairs, and the sum [K] of the teacher's logits.

    With ``mean`` the losses are divided by B, which is not in ``scale``: a graph would be compiled for each B then.
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
        check_constant(name, value)
    if teacher_probs and center is not None:
        raise ValueError("center: expected None beside teacher_probs=True, for probabilities have no centre")
    wider = student if dtype == student.dtype else teacher
    center = as_center(center, student.shape[2], wider)
    student_temp = _checks.as_temperature("student_temp", student_temp, wider).to(dtype)
    teacher_temp = _checks.as_temperature("teacher_temp", teacher_temp, wider).to(dtype)
    backend = choose_backend(student.device, dtype, KERNELS)
    pairs = Pairs(students, teachers, center, weights, student_temp, teacher_temp, distinct, teacher_probs)
    if backend == "reference":
        rows = reference(pairs)
        total = sum_of_teacher(teachers, dtype) if want_sum else rows.new_empty(0)
        return _shared(scale, mean, students) * rows, total
    _checks.check_transforms(*students)
    want_grad = torch.is_grad_enabled() and any(block.requires_grad for block in students)
    late = None
    if student.dtype == torch.float16:  # its gradient has no room for small weights
        late = weights
        # The backward pass needs the temperature, and the caller may write to its tensor before that.
        pairs = pairs._replace(weights=None, student_temp=student_temp.clone())
    rows, _, teacher_sum = _dino(*pairs, want_grad, want_sum, scale, mean, backend)
    return rows if late is None else rows * late, teacher_sum


class Pairs(NamedTuple):
    """Crops of the student and those of the teacher that they are compared with."""

    students: list[Tensor]  # blocks [n, B, K]
    teachers: list[Tensor]
    center: Tensor | None  # [K]
    weights: Tensor | None  # [B]
    student_temp: Tensor
    teacher_temp: Tensor
    distinct: bool
    teacher_probs: bool

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


def check_constant(name: str, value: object) -> None:
    """What comes from the teacher receives no gradient: a tensor that wants one is a mistake."""
    for tensor in value if isinstance(value, list) else [value]:
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a tensor without gradient, got one that requires it; detach() it")


def as_center(center: Tensor | None, width: int, teacher: Tensor) -> Tensor | None:
    """[K] in the accumulation dtype, whatever its shape was."""
    if center is None:
        return None
    if not isinstance(center, Tensor) or not center.is_floating_point():
        got = center.dtype if isinstance(center, Tensor) else type(center).__name__
        raise TypeError(f"center: expected a floating tensor, got {got}")
    if center.numel() != width:
        raise ValueError(f"center: expected {width} elements, one to a prototype, got shape {tuple(center.shape)}")
    if center.device != teacher.device:
        raise ValueError(f"center: expected the device of teacher ({teacher.device}), got {center.device}")
    return center.detach().reshape(width).to(_checks.accumulation_dtype(teacher.dtype)).contiguous()


def sum_of_teacher(teachers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[K], added up in ``dtype``."""
    return torch.stack([block.sum((0, 1), dtype=dtype) for block in teachers]).sum(0)


def reference(pairs: Pairs) -> Tensor:
    """The definition: every pair, densely and differentiable any number of times, in fp32 or float64."""
    temp = pairs.student_temp
    log_s = [torch.log_softmax(crop.to(temp.dtype) / temp, -1) for block in pairs.students for crop in block]
    rows = torch.zeros_like(log_s[0][:, 0])
    for (t, p_t), (v, log_s_v) in itertools.product(enumerate(pairs.probabilities()), enumerate(log_s)):
        if not (pairs.distinct and t == v):
            rows = rows - (p_t * log_s_v).sum(-1)
    return rows if pairs.weights is None else rows * pairs.weights


# A backend takes the pairs; the gradient [V, B, K] to be filled, or None, and the factor on it; and the teacher_sum [K]
# to be filled, or None. It returns the weighted losses [B], summed over pairs. In fp16 the gradient is that by the
# logits over the temperature.


def _dino_eager(pairs: Pairs, gradient: Tensor | None, scale: float, teacher_sum: Tensor | None) -> Tensor:
    temp, (samples, width) = pairs.student_temp, pairs.students[0].shape[1:]
    if teacher_sum is not None:
        teacher_sum.copy_(sum_of_teacher(pairs.teachers, teacher_sum.dtype))
    losses = temp.new_zeros(samples)
    slope = scale if pairs.students[0].dtype == torch.float16 else scale / temp
    held = _count(pairs.teachers) + 6  # matrices [step, K] at a time
    step = max(1, workspace_bytes() // (held * width * temp.element_size()))
    for b in range(0, samples, step):
        part = slice(b, b + step)
        p = pairs.probabilities(part)
        everything = torch.stack(p).sum(0)
        weight = None if pairs.weights is None else pairs.weights[part, None]
        for v, crop in enumerate(crop for block in pairs.students for crop in block):
            q = everything
            if pairs.distinct and v < len(p):
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


def _dino_cpu(pairs: Pairs, gradient: Tensor | None, scale: float, teacher_sum: Tensor | None) -> Tensor:
    samples, width = pairs.students[0].shape[1:]
    losses = pairs.student_temp.new_empty(samples)
    if teacher_sum is not None:
        teacher_sum.zero_()
    arguments = (
        [unit_stride(block) for block in pairs.students],
        [unit_stride(block) for block in pairs.teachers],
        pairs.center,
        pairs.weights,
        pairs.student_temp.item(),
        pairs.teacher_temp.item(),
        pairs.distinct,
        pairs.teacher_probs,
        losses,
        gradient,
        scale,
        teacher_sum,
    )
    for begin, end in spans(samples, width * (_count(pairs.students) + _count(pairs.teachers))):
        torch.ops.ssl_kernels.dino_rows_(*arguments, begin, end)
    return losses


def unit_stride(logits: Tensor) -> Tensor:
    """Rows that are contiguous in memory."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _dino_triton(pairs: Pairs, gradient: Tensor | None, scale: float, teacher_sum: Tensor | None) -> Tensor:
    from ssl_kernels.kernels import dino as kernels

    if teacher_sum is not None:
        teacher_sum.copy_(kernels.teacher_sum(pairs.teachers))
    losses: Tensor = kernels.dino(*pairs, gradient, scale)
    return losses


_BACKENDS = {"eager": _dino_eager, "cpu": _dino_cpu, "triton": _dino_triton}


def _shared(scale: float, mean: bool, students: Sequence[Tensor]) -> float:
    """The factor on the loss of a sample."""
    return scale / max(1, students[0].shape[1]) if mean else scale


def _power(scale: float, terms: int, dtype: torch.dtype) -> float:
    """The power of two that a gradient is stored with: 1 but in fp16, where probabilities of 1/65,536 are subnormal.

    With it a gradient is at most 1,024, which leaves room for given probabilities that sum up to more than 1.
    """
    if dtype != torch.float16 or not 0 < scale < math.inf:
        return 1.0
    return 2.0 ** (10 - math.ceil(math.log2(scale * terms)))


@torch.library.custom_op(
    "ssl_kernels::dino",
    mutates_args=(),
    schema=(
        "(Tensor[] students, Tensor[] teachers, Tensor? center, Tensor? weights, Tensor student_temp, "
        "Tensor teacher_temp, bool distinct, bool teacher_probs, bool want_grad, bool want_sum, float scale, "
        "bool mean, str backend) -> (Tensor losses, Tensor gradient, Tensor teacher_sum)"
    ),
)
def _dino(
    students: list[Tensor],
    teachers: list[Tensor],
    center: Tensor | None,
    weights: Tensor | None,
    student_temp: Tensor,
    teacher_temp: Tensor,
    distinct: bool,
    teacher_probs: bool,
    want_grad: bool,
    want_sum: bool,
    scale: float,
    mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = empty(_gradient_shape(students) if want_grad else [0], students[0])
    teacher_sum = student_temp.new_empty(students[0].shape[2] if want_sum else 0)
    scale = _shared(scale, mean, students)
    pairs = Pairs(students, teachers, center, weights, student_temp, teacher_temp, distinct, teacher_probs)
    power = _power(scale, _count(teachers), students[0].dtype)
    losses = _BACKENDS[backend](
        pairs, gradient if want_grad else None, scale * power, teacher_sum if want_sum else None
    )
    return losses.mul_(scale), gradient, teacher_sum


def _gradient_shape(students: list[Tensor]) -> list[int]:
    return [_count(students), *students[0].shape[1:]]


@_dino.register_fake
def _(
    students: list[Tensor],
    teachers: list[Tensor],
    center: Tensor | None,
    weights: Tensor | None,
    student_temp: Tensor,
    teacher_temp: Tensor,
    distinct: bool,
    teacher_probs: bool,
    want_grad: bool,
    want_sum: bool,
    scale: float,
    mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        student_temp.new_empty(students[0].shape[1]),
        students[0].new_empty(_gradient_shape(students) if want_grad else [0]),
        student_temp.new_empty(students[0].shape[2] if want_sum else 0),
    )


@torch.library.custom_op(
    "ssl_kernels::scale_dino_gradient", mutates_args=(), schema="(Tensor gradient, Tensor factor) -> Tensor"
)
def _scale_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient [V, B, K] times the factor of its sample, [B]."""
    if gradient.device.type != "cpu":
        return (gradient * factor[:, None]).to(gradient.dtype)
    return _multiply(gradient, factor, torch.empty_like(gradient))


@_scale_gradient.register_fake
def _(gradient: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(gradient)


_scale_gradient.register_autograd(no_double_backward)


def _scale_gradient_(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """The same in place; by a kernel, or on a CPU, nothing at all where the factor is 1."""
    if backend == "triton":
        from ssl_kernels.kernels import dino as kernels

        kernels.scale_(gradient, factor)
    elif gradient.device.type != "cpu":  # where to look would be to wait
        torch.mul(gradient, factor[:, None], out=gradient)
    elif bool((factor != 1).any()):
        _multiply(gradient, factor, gradient)
    return gradient


def _multiply(gradient: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    for begin, end in spans(gradient.shape[1], gradient.shape[0] * gradient.shape[2]):
        part = slice(begin, end)
        torch.mul(gradient[:, part], factor[part, None], out=out[:, part])
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    students, teachers, _, _, student_temp, *_, scale, mean, ctx.backend = inputs
    _, gradient, teacher_sum = output
    ctx.mark_non_differentiable(teacher_sum)  # and not the gradient: differentiating it again is to meet an error
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, *([student_temp] if gradient.dtype == torch.float16 else []))
    ctx.crops, ctx.teachers = [block.shape[0] for block in students], len(teachers)
    ctx.unscale = 1 / _power(_shared(scale, mean, students), _count(teachers), students[0].dtype)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    rest = ([None] * ctx.teachers, *[None] * 11)
    if upstream is None:
        return ([None] * len(ctx.crops), *rest)
    gradient, *student_temp = ctx.saved_tensors
    factor = upstream * ctx.unscale
    for temp in student_temp:
        factor = factor / temp
    # Handed over where nobody can ask for it again: not with retain_graph, and not while being traced.
    once = type(gradient) is Tensor and not torch.is_grad_enabled() and not _graph_is_kept()
    once = once and not is_legacy_batchedtensor(factor)  # nor where one pass makes the gradients of many
    gradient = _scale_gradient_(gradient.detach(), factor, ctx.backend) if once else _scale_gradient(gradient, factor)
    return (list(gradient.split(ctx.crops)), *rest)


def _graph_is_kept() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()


_dino.register_autograd(_backward, setup_context=_setup_context)
