r"""Triton kernels of the distillation cross-entropy of DINO and iBOT: loss and gradient of all pairs of crops.

For crops of students S [V, B, K] and teachers T [T, B, K], temperatures ts and tt and a centre c [K],

    p_tb = softmax((T_tb - c) / tt)     or T_tb itself, where probabilities are given
    q_vb = sum_t p_tb                   over the teachers t that are paired with v: all, or all but t = v
    n_vb = sum_k q_vbk                  their number, but for given probabilities
    CE_vb = n_vb lse_k(S_vb / ts) - sum_k q_vbk S_vbk / ts
    G_vb  = w_b / ts (n_vb softmax(S_vb / ts) - q_vb)     in fp16 without 1 / ts, for which it has no room

so that a sample takes one cross-entropy for each crop of the student, not one for each pair. Three steps:

    teachers   maximum and sum of each row, over blocks of its columns (row_stats in sinkhorn.py)
    forward    a program has one block of columns of one sample. It makes q of the teachers, in registers, and reads
               each student once, for the maximum m of the block and, with z = (S - m) / ts, the sums of exp(z), of q z
               and of q. A second, small launch merges the blocks: with M the maximum of the row,

                   CE = n log(sum_j l_j e^((m_j - M) / ts)) - sum_j (d_j + n_j (m_j - M) / ts)

               where no term is negative, so that nothing cancels, at whatever height the logits are.
    gradient   reads teachers and students once more, and writes G in the dtype of the students.

Paired with all but one teacher, q is summed over those others: all less one would leave rounding errors in place of
small probabilities. Every partial result has a slot of its own and is merged in a fixed order, without atomics, so the
result is bitwise reproducible.

Budget: the teachers are read three times and the students twice, and the gradient is written once: with 2 teachers and
10 students of 16 bits 72 bytes for each of B K. What else is read comes from cache: the centre, as a program visits the
same columns of several samples, and teachers once more for each student that leaves one out. Partial results are 16
bytes for a block of up to 4096 elements. One exponential per element of a student and visit, and one per element of a
teacher each time that it is read. Compiled for sm_90 and followed through the code, not timed: 16 instructions per
element of a student of 16 bits in the forward pass with 2 teachers and 10 students, those of the teachers included.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_kernels.kernels.sinkhorn import (
    are_aligned,
    block_of_row,
    columns_of_block,
    load_center,
    merge_maxima_and_sums,
    row_stats,
    rows_per_program,
)
from ssl_kernels.kernels.tiles import cdiv, finite_from_below, on_device

__all__ = ["dino", "scale_", "teacher_sum"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_STUDENTS = tl.constexpr(12)  # pointers that a kernel takes
_TEACHERS = tl.constexpr(2)
_STUDENT_POINTERS = tuple(f"S{i}" for i in range(_STUDENTS.value))
_TEACHER_POINTERS = tuple(f"T{i}" for i in range(_TEACHERS.value))
_WARPS = 4
_MERGE_STUDENTS = 16
_MERGE_SPLITS = 16
_SCALE_BLOCK = 4096
_SCALE_STEPS = 8


@triton.jit
def _student_row(v, b, stride_round, stride_b, S0, S1, S2, S3, S4, S5, S6, S7, S8, S9, S10, S11, ALIGNED: tl.constexpr):
    """Where row b of crop v begins."""
    number = tl.cast(v, tl.int32)
    slot = number % _STUDENTS
    at = tl.where(slot == 1, S1, S0)
    at = tl.where(slot == 2, S2, at)
    at = tl.where(slot == 3, S3, at)
    at = tl.where(slot == 4, S4, at)
    at = tl.where(slot == 5, S5, at)
    at = tl.where(slot == 6, S6, at)
    at = tl.where(slot == 7, S7, at)
    at = tl.where(slot == 8, S8, at)
    at = tl.where(slot == 9, S9, at)
    at = tl.where(slot == 10, S10, at)
    at = tl.where(slot == 11, S11, at)
    at += (number // _STUDENTS).to(tl.int64) * stride_round + b * stride_b
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def _targets(
    T0,
    T1,
    SHIFTS,  # [T, B] fp32; or None with TEACHER_PROBS
    RECIPROCALS,
    CENTER,
    scale,
    T,
    excluded,  # a teacher that is left out, or T
    b,
    B,
    k,
    k_ok,
    offset,  # of the columns k
    stride_round,
    stride_b,
    HAS_CENTER: tl.constexpr,
    TEACHER_PROBS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q of a block of columns; zero beyond the row."""
    q = tl.zeros((BLOCK_K,), tl.float32)
    for t in range(T):
        if t != excluded:
            number = tl.cast(t, tl.int32)
            at = tl.where(number % _TEACHERS == 1, T1, T0)
            at += (number // _TEACHERS).to(tl.int64) * stride_round + b * stride_b
            if ALIGNED:
                at = tl.multiple_of(at, 16)
            x = tl.load(at + offset, mask=k_ok, other=0.0 if TEACHER_PROBS else float("-inf")).to(tl.float32)
            if TEACHER_PROBS:
                q += x
            else:
                center = load_center(CENTER, k, k_ok, HAS_CENTER)  # here: held over the loop, it would take registers
                row = number.to(tl.int64) * B + b
                q += tl.exp2((x - center - tl.load(SHIFTS + row)) * scale) * tl.load(RECIPROCALS + row)
    return q


# Batches and numbers of crops differ, and so does where a crop begins: specialising on any of that would recompile.
# Whether loads can be wide is told by ALIGNED.
@triton.jit(
    do_not_specialize=["V", "T", "B", "span", "own"],
    do_not_specialize_on_alignment=[*_STUDENT_POINTERS, *_TEACHER_POINTERS],
)
def _forward_kernel(
    S0,  # crop v is in S[v mod 12], at its index v div 12
    S1,
    S2,
    S3,
    S4,
    S5,
    S6,
    S7,
    S8,
    S9,
    S10,
    S11,
    T0,  # likewise
    T1,
    SHIFTS,  # [T, B] fp32; or None with TEACHER_PROBS
    RECIPROCALS,
    CENTER,  # [K] fp32, or None without HAS_CENTER
    STUDENT_TEMP,
    TEACHER_TEMP,
    MAXIMA,  # this and what follows: [V, B, cdiv(K, BLOCK_K)] fp32
    SUMS,
    DOTS,  # in base 2
    MASSES,
    V: tl.int32,
    T: tl.int32,
    B: tl.int64,
    span: tl.int64,  # samples of one program
    own: tl.int32,  # students at the front that leave out the teacher of the same number
    K,
    stride_sr,
    stride_sb,
    stride_sk,
    stride_tr,
    stride_tb,
    stride_tk,
    HAS_CENTER: tl.constexpr,
    TEACHER_PROBS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(K, BLOCK_K)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks).to(tl.int64) * span
    k, k_ok = columns_of_block(block, K, EVEN_K, BLOCK_K)
    s_offset = k if ALIGNED else k.to(tl.int64) * stride_sk
    t_offset = k if ALIGNED else k.to(tl.int64) * stride_tk
    student_scale = _LOG2_E / tl.load(STUDENT_TEMP)
    teacher_scale = _LOG2_E / tl.load(TEACHER_TEMP)
    for step in range(tl.minimum(B - first, span).to(tl.int32)):
        b = first + step
        q = tl.zeros((BLOCK_K,), tl.float32)
        mass = 0.0
        for v in range(V):
            if v <= own:
                q = _targets(
                    T0, T1, SHIFTS, RECIPROCALS, CENTER, teacher_scale, T, tl.where(v < own, v, T), b, B, k, k_ok,
                    t_offset, stride_tr, stride_tb, HAS_CENTER, TEACHER_PROBS, ALIGNED, BLOCK_K,
                )  # fmt: skip
                mass = tl.sum(q, axis=0)
            at = _student_row(
                v, b, stride_sr, stride_sb, S0, S1, S2, S3, S4, S5, S6, S7, S8, S9, S10, S11, ALIGNED
            )  # fmt: skip
            s = tl.load(at + s_offset, mask=k_ok, other=float("-inf")).to(tl.float32)
            maximum = tl.max(s, axis=0)
            z = (s - finite_from_below(maximum)) * student_scale
            to = (tl.cast(v, tl.int64) * B + b) * blocks + block
            tl.store(MAXIMA + to, maximum)
            tl.store(SUMS + to, tl.sum(tl.exp2(z), axis=0))
            tl.store(DOTS + to, tl.sum(q * tl.where(k_ok, z, 0.0), axis=0))
            tl.store(MASSES + to, mass)


@triton.jit(do_not_specialize=["V", "B"], do_not_specialize_on_alignment=["WEIGHTS"])
def _merge_kernel(
    MAXIMA,  # [V, B, splits]
    SUMS,
    DOTS,
    MASSES,
    WEIGHTS,  # [B] fp32, or None without HAS_WEIGHTS
    TEMPERATURE,
    SHIFTS,  # [V, B] fp32
    FACTORS,  # [V, B] fp32: of exp((S - shift) / ts) in n softmax(S / ts)
    LOSS,  # [B] fp32
    V: tl.int32,
    B: tl.int64,
    splits,
    HAS_WEIGHTS: tl.constexpr,
    STUDENTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One sample, STUDENTS of the crops at a time."""
    b = tl.program_id(0).to(tl.int64)
    scale = _LOG2_E / tl.load(TEMPERATURE)
    loss = tl.zeros((STUDENTS,), tl.float32)
    for first_v in range(0, V, STUDENTS):
        v = first_v + tl.arange(0, STUDENTS)
        v_ok = v < V
        row = v.to(tl.int64) * B + b
        at = row * splits
        shift, total = merge_maxima_and_sums(MAXIMA, SUMS, scale, at, v_ok, splits, STUDENTS, SPLITS)
        dot = tl.zeros((STUDENTS,), tl.float32)
        mass = tl.zeros((STUDENTS,), tl.float32)
        for first in range(0, splits, SPLITS):
            split = first + tl.arange(0, SPLITS)
            ok = v_ok[:, None] & (split < splits)[None, :]
            maxima = tl.load(MAXIMA + at[:, None] + split[None, :], mask=ok, other=0.0)
            dots = tl.load(DOTS + at[:, None] + split[None, :], mask=ok, other=0.0)
            masses = tl.load(MASSES + at[:, None] + split[None, :], mask=ok, other=0.0)
            dot += tl.sum(dots + (maxima - shift[:, None]) * scale * masses, axis=1)
            mass += tl.sum(masses, axis=1)
        loss += tl.where(v_ok, mass * tl.log2(total) - dot, 0.0)
        tl.store(SHIFTS + row, shift, mask=v_ok)
        tl.store(FACTORS + row, mass / total, mask=v_ok)
    weight = tl.load(WEIGHTS + b) if HAS_WEIGHTS else 1.0
    tl.store(LOSS + b, tl.sum(loss, axis=0) * _LN_2 * weight)


@triton.jit(
    do_not_specialize=["V", "T", "B", "span", "own"],
    do_not_specialize_on_alignment=[*_STUDENT_POINTERS, *_TEACHER_POINTERS, "WEIGHTS"],
)
def _grad_kernel(
    S0,
    S1,
    S2,
    S3,
    S4,
    S5,
    S6,
    S7,
    S8,
    S9,
    S10,
    S11,
    T0,
    T1,
    SHIFTS,
    RECIPROCALS,
    CENTER,
    STUDENT_TEMP,
    TEACHER_TEMP,
    STUDENT_SHIFTS,  # [V, B] fp32
    FACTORS,  # [V, B] fp32
    WEIGHTS,  # [B] fp32, or None without HAS_WEIGHTS
    GRAD,  # [V, B, K]
    grad_scale,
    V: tl.int32,
    T: tl.int32,
    B: tl.int64,
    span: tl.int64,
    own: tl.int32,
    K,
    stride_sr,
    stride_sb,
    stride_sk,
    stride_tr,
    stride_tb,
    stride_tk,
    HAS_CENTER: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    TEACHER_PROBS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(K, BLOCK_K)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks).to(tl.int64) * span
    k, k_ok = columns_of_block(block, K, EVEN_K, BLOCK_K)
    s_offset = k if ALIGNED else k.to(tl.int64) * stride_sk
    t_offset = k if ALIGNED else k.to(tl.int64) * stride_tk
    student_temp = tl.load(STUDENT_TEMP)
    student_scale = _LOG2_E / student_temp
    teacher_scale = _LOG2_E / tl.load(TEACHER_TEMP)
    for step in range(tl.minimum(B - first, span).to(tl.int32)):
        b = first + step
        q = tl.zeros((BLOCK_K,), tl.float32)
        for v in range(V):
            if v <= own:
                q = _targets(
                    T0, T1, SHIFTS, RECIPROCALS, CENTER, teacher_scale, T, tl.where(v < own, v, T), b, B, k, k_ok,
                    t_offset, stride_tr, stride_tb, HAS_CENTER, TEACHER_PROBS, ALIGNED, BLOCK_K,
                )  # fmt: skip
            at = _student_row(
                v, b, stride_sr, stride_sb, S0, S1, S2, S3, S4, S5, S6, S7, S8, S9, S10, S11, ALIGNED
            )  # fmt: skip
            s = tl.load(at + s_offset, mask=k_ok, other=float("-inf")).to(tl.float32)
            row = tl.cast(v, tl.int64) * B + b
            p = tl.exp2((s - tl.load(STUDENT_SHIFTS + row)) * student_scale) * tl.load(FACTORS + row)
            slope = grad_scale if GRAD.dtype.element_ty == tl.float16 else grad_scale / student_temp
            if HAS_WEIGHTS:
                slope *= tl.load(WEIGHTS + b)
            tl.store(GRAD + row * K + k, ((p - q) * slope).to(GRAD.dtype.element_ty), mask=k_ok)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["FACTOR"])
def _scale_kernel(
    GRAD,  # [rows, K]
    FACTOR,  # [B] fp32
    B: tl.int64,
    stride_f,
    K,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
):
    shares = tl.cdiv(K, BLOCK_K * STEPS)
    row = (tl.program_id(0) // shares).to(tl.int64)
    first = tl.program_id(0) % shares * (BLOCK_K * STEPS)
    factor = tl.load(FACTOR + row % B * stride_f)
    if factor != 1.0:
        for step in range(STEPS):
            k = first + step * BLOCK_K + tl.arange(0, BLOCK_K)
            at = GRAD + row * K + k
            g = tl.load(at, mask=k < K, other=0.0).to(tl.float32)
            tl.store(at, (g * factor).to(GRAD.dtype.element_ty), mask=k < K)


def dino(
    students: list[Tensor],
    teachers: list[Tensor],
    center: Tensor | None,
    weights: Tensor | None,
    student_temp: Tensor,
    teacher_temp: Tensor,
    distinct: bool,
    teacher_probs: bool,
    grad: Tensor | None,
    grad_scale: float,
    *,
    span: int | None = None,
) -> Tensor:
    """Cross-entropies of each sample, summed over pairs of crops, and the gradient of the students.

    Blocks are read where they are: one block, whatever its strides and the number of its crops, or several of the same
    strides that have together at most 12 students, or 2 teachers. Others are joined in a copy.

    Args:
        students: blocks [n, B, K] in fp32, bf16 or fp16, any strides, all of one dtype; V crops together, at least 1.
        teachers: blocks likewise, maybe of another dtype; T crops together, at least 1.
        center: [K] fp32, contiguous, or None.
        weights: [B] fp32, contiguous, or None.
        student_temp: 0-dim fp32 on the device, positive.
        teacher_temp: likewise.
        distinct: whether teacher t and student v are no pair where t = v.
        teacher_probs: whether teachers hold probabilities, so that neither centre nor temperature is applied to them.
        grad: [V, B, K] in the dtype of the students, contiguous, receives ``grad_scale`` times the gradient of the sum
            of what is returned, and in fp16 times ``student_temp`` too; or None.
        grad_scale: factor of the gradient.
        span: samples of one program, by default so many that programs fill the chip.

    Returns:
        the weighted cross-entropies, fp32 [B].
    """
    device = students[0].device
    batch, width = students[0].shape[1:]
    crops, targets = sum(s.shape[0] for s in students), sum(t.shape[0] for t in teachers)
    loss = torch.empty(batch, dtype=torch.float32, device=device)
    if batch == 0:
        return loss
    shifts, reciprocals = (None, None) if teacher_probs else row_stats(teachers, teacher_temp, center)
    center = None if teacher_probs else center
    s_slots, s_strides = _slots(students, _STUDENTS.value)
    t_slots, t_strides = _slots(teachers, _TEACHERS.value)
    aligned = are_aligned(s_slots, s_strides) and are_aligned(t_slots, t_strides)
    block_k = block_of_row(width, aligned)
    splits = cdiv(width, block_k)
    span = span or rows_per_program(batch, splits, device)
    grid = (splits * cdiv(batch, span),)
    sizes = (crops, targets, batch, span, min(crops, targets) if distinct else 0, width, *s_strides, *t_strides)
    shared = {
        "HAS_CENTER": center is not None,
        "TEACHER_PROBS": teacher_probs,
        "ALIGNED": aligned,
        "EVEN_K": width % block_k == 0,
        "BLOCK_K": block_k,
    }
    partials = torch.empty(4, crops, batch, splits, dtype=torch.float32, device=device)
    student_shifts, factors = torch.empty(2, crops, batch, dtype=torch.float32, device=device)
    with on_device(device):
        _forward_kernel[grid](
            *s_slots, *t_slots, shifts, reciprocals, center, student_temp, teacher_temp, *partials, *sizes,
            **shared, num_warps=_WARPS,
        )  # fmt: skip
        _merge_kernel[(batch,)](
            *partials, weights, student_temp, student_shifts, factors, loss, crops, batch, splits,
            HAS_WEIGHTS=weights is not None, STUDENTS=_MERGE_STUDENTS, SPLITS=_MERGE_SPLITS, num_warps=4,
        )  # fmt: skip
        if grad is not None:
            _grad_kernel[grid](
                *s_slots, *t_slots, shifts, reciprocals, center, student_temp, teacher_temp, student_shifts, factors,
                weights, grad, grad_scale, *sizes, HAS_WEIGHTS=weights is not None, **shared, num_warps=_WARPS,
            )  # fmt: skip
    return loss


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a gradient by what comes from upstream. Memory is not touched where that is exactly 1.

    Args:
        gradient: [..., B, K] in fp32, bf16 or fp16, contiguous.
        factor: fp32 on the device, 0-dim or [B], any stride.
    """
    if gradient.numel() == 0:
        return
    width = gradient.shape[-1]
    block_k = min(triton.next_power_of_2(width), _SCALE_BLOCK)
    steps = min(cdiv(width, block_k), _SCALE_STEPS)
    rows = gradient.numel() // width
    with on_device(gradient.device):
        _scale_kernel[(rows * cdiv(width, block_k * steps),)](
            gradient, factor, factor.numel(), sum(factor.stride()), width, BLOCK_K=block_k, STEPS=steps, num_warps=4
        )


def teacher_sum(teachers: list[Tensor]) -> Tensor:
    """Sum over all rows of blocks [n, B, K], in fp32 [K]. One read."""
    return torch.stack([t.sum(dim=(0, 1), dtype=torch.float32) for t in teachers]).sum(dim=0)


def _slots(blocks: list[Tensor], number: int) -> tuple[list[Tensor], tuple[int, ...]]:
    """Crops as so many tensors of the same strides, and these: crop i is in the (i mod number)-th, at its i div number.

    Slots without a crop hold the first once more: an argument of None would be another kernel.
    """
    crops = [crop for block in blocks for crop in block.unbind()]
    if len(crops) <= number and len({crop.stride() for crop in crops}) == 1:
        slots, strides = crops, (0, *crops[0].stride())
    else:
        block = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        slots = [block[i::number] for i in range(min(number, block.shape[0]))]
        strides = (number * block.stride(0), *block.stride()[1:])
    return slots + slots[:1] * (number - len(slots)), strides
