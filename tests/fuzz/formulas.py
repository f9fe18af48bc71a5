"""Every public op of ``ssl_kernels.functional`` from the equations of its paper, densely and in float64.

No code is shared with the library. ``rounded`` and ``product`` say where float32 rounds: see :mod:`fuzz.rounding`.
Letters and options are those of the ops' documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fuzz.rounding import product, rounded, stored
from torch import Tensor


def reduce(rows: Tensor, reduction: str, count: Tensor | float | None = None) -> Tensor:
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (len(rows) if count is None else count)


def number(value: Tensor | float) -> Tensor:
    return rounded(torch.as_tensor(value, dtype=torch.float64).reshape(()))


def find_pairs(
    shape: Sequence[int], offset: int, x_ids: Tensor | None, y_ids: Tensor | None, same_id: str
) -> tuple[Tensor, Tensor]:
    """Which pairs are positive, and which count."""
    i, j = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    partners = j == i + offset
    if x_ids is None or y_ids is None:
        return partners, torch.ones_like(partners)
    same = x_ids[:, None] == y_ids
    if same_id == "positive":
        return partners | same, torch.ones_like(partners)
    return partners, partners | ~same


def log_sum_exp(z: Tensor, counted: Tensor) -> Tensor:
    """By rows, over what counts; -inf where nothing does."""
    z = torch.cat([z.masked_fill(~counted, -torch.inf), z.new_full((len(z), 1), -torch.inf)], 1)
    top = z.detach().amax(1)
    top = top.masked_fill(top == -torch.inf, 0)
    return rounded(top + rounded(rounded(torch.exp(z - top[:, None])).sum(1)).log())


def cross_entropy(z: Tensor, positive: Tensor, counted: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of each row the log-sum-exp of what counts less the mean of its positives; 0 for a row without any."""
    positive = positive & counted
    paired = positive.any(1)
    target = (1 - smoothing) * positive.double() / positive.sum(1, keepdim=True).clamp(min=1)
    target = target + smoothing * counted.double() / counted.sum(1, keepdim=True).clamp(min=1)
    rows = torch.zeros(len(z), dtype=torch.float64)
    z, target = z[paired], target[paired]
    matches = (rounded(target) * z.masked_fill(target == 0, 0)).sum(1)
    return rows.masked_scatter(paired, log_sum_exp(z, counted[paired]) - matches), paired


def sigmoid_contrastive_loss(
    x: Tensor, y: Tensor, scale: Any, bias: Any, x_ids: Any = None, y_ids: Any = None, same_id: str = "positive",
    offset: int = 0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    z = rounded(rounded(number(scale) * product(x, y.t())) + number(bias))
    positive, counted = find_pairs(z.shape, offset, x_ids, y_ids, same_id)
    z = torch.where(positive, -z, z).masked_fill(~counted, -torch.inf)
    losses = rounded(torch.logaddexp(z, torch.zeros_like(z)))
    return reduce(rounded(losses.sum(1)), reduction)


def clip_loss(
    x: Tensor, y: Tensor, scale: Any, x_ids: Any = None, y_ids: Any = None, same_id: str = "positive", offset: int = 0,
    label_smoothing: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    z = rounded(number(scale) * product(x, y.t()))
    positive, counted = find_pairs(z.shape, offset, x_ids, y_ids, same_id)
    rows, paired_rows = cross_entropy(z, positive, counted, label_smoothing)
    cols, paired_cols = cross_entropy(z.t(), positive.t(), counted.t(), label_smoothing)
    one, other = (
        reduce(side, reduction, paired.sum().clamp(min=1))
        for side, paired in ((rows, paired_rows), (cols, paired_cols))
    )
    return (one + other) / 2


def nt_xent_loss(z0: Tensor, z1: Tensor, temperature: Any, reduction: str = "mean") -> Tensor:
    z = torch.cat([z0, z1])
    u = stored(z / rounded(z.norm(dim=1, keepdim=True)).clamp(min=1e-12))
    itself = torch.eye(len(z), dtype=torch.bool)
    similarity = rounded(rounded(1 / number(temperature)) * product(u, u.t()))
    rows, paired = cross_entropy(similarity, itself.roll(len(z0), 1), ~itself)
    return reduce(rows, reduction, paired.sum().clamp(min=1))


def sup_con_loss(
    z: Tensor, ids: Tensor, temperature: Any, reduction: str = "mean", return_unpaired: bool = False
) -> Any:
    others = ~torch.eye(len(z), dtype=torch.bool)
    similarity = rounded(rounded(1 / number(temperature)) * product(z, z.t()))
    rows, paired = cross_entropy(similarity, ids[:, None] == ids, others)
    loss = reduce(rows, reduction, paired.sum().clamp(min=1))
    return (loss, (~paired).sum()) if return_unpaired else loss


def key_softmax(query: Tensor, keys: Tensor, scale: Any, want_mean: bool = True) -> Any:
    z = rounded(number(scale) * product(query, keys.t()))
    lse = log_sum_exp(z, torch.ones_like(z, dtype=torch.bool))
    mean = product(rounded(torch.exp(z - lse[:, None])), keys).detach()
    return (lse, mean) if want_mean else (lse,)


def info_nce_loss(query: Tensor, positive: Tensor, negatives: Tensor, scale: Any, reduction: str = "mean") -> Tensor:
    t = number(scale)
    match = rounded(t * product(query, positive.t()).diagonal())
    # The difference of two logits first: a loss of 1e-9 keeps its digits.
    z = rounded(t * product(query, negatives.t())) - match[:, None]
    lse = log_sum_exp(z, torch.ones_like(z, dtype=torch.bool))
    loss = rounded(torch.logaddexp(lse, torch.zeros_like(lse)))
    return reduce(loss.masked_fill(match == torch.inf, torch.nan), reduction)


def row_logits(
    query: Tensor, candidates: Tensor, scale: Any, target: Any, candidate_bias: Any, query_ids: Any, candidate_ids: Any,
    same_id: str, hardness: float, hardened: str, guide_query: Any, guide_candidates: Any, guide_threshold: Any,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits, which pairs are positive, and which count."""
    i, j = torch.arange(len(query)), torch.arange(len(candidates))
    target = i if target is None else target
    positive = j == target[:, None]
    same = torch.zeros_like(positive) if query_ids is None else query_ids[:, None] == candidate_ids
    counted = positive | ~same if same_id == "ignore" else torch.ones_like(positive)
    positive = positive | same if same_id == "positive" else positive
    if guide_query is not None:
        scores = guide_query @ guide_candidates.t()
        if guide_threshold is None:  # and as high as the target's, but for rounding, is no higher
            norms = guide_query.norm(dim=1)[:, None] * guide_candidates.norm(dim=1)
            own = scores + 2e-6 * norms
            guide_threshold = torch.cat([own, torch.full((len(query), 1), torch.inf)], 1)[i, target.clamp(min=-1)]
        counted = counted & (positive | ~(scores > guide_threshold[:, None]))
    if normalize:
        sides = ((t, rounded(t.norm(dim=1, keepdim=True))) for t in (query, candidates))
        query, candidates = (rounded(t / norm.clamp(min=1e-12)) for t, norm in sides)
    s = product(query, candidates.t())
    z = rounded(number(scale) * s)
    chosen = ~positive & {"all": torch.ones_like(same), "same_id": same, "other_ids": ~same}[hardened]
    if hardness:
        z = rounded(z + rounded(hardness * s.detach()).masked_fill(~chosen, 0))
    if candidate_bias is not None:
        removed = candidate_bias == -torch.inf
        counted = counted & ~removed
        z = rounded(z + rounded(candidate_bias).masked_fill(removed, 0))
    return z, positive & counted, counted


def row_softmax_loss(
    query: Tensor, candidates: Tensor, scale: Any, target: Any, candidate_bias: Any, query_ids: Any, candidate_ids: Any,
    same_id: str, weights: Any, label_smoothing: float, hardness: float, hardened: str, guide_query: Any,
    guide_candidates: Any, guide_threshold: Any, dims: Any, dim_weights: Any, normalize: bool, reduction: str,
) -> Tensor:  # fmt: skip
    dims = (query.shape[1],) if dims is None else dims
    total, paired = torch.zeros(len(query), dtype=torch.float64), torch.zeros(len(query), dtype=torch.bool)
    for k, length in enumerate(dims):
        z, positive, counted = row_logits(
            query[:, :length], candidates[:, :length], scale, target, candidate_bias, query_ids, candidate_ids, same_id,
            hardness, hardened, guide_query, guide_candidates, guide_threshold, normalize,
        )  # fmt: skip
        rows, paired = cross_entropy(z, positive, counted, label_smoothing)
        total = total + (1 if dim_weights is None else dim_weights[k]) * rows
    if weights is not None:
        total = total.masked_fill(weights == 0, 0) * rounded(weights)
    return reduce(total, reduction, paired.sum().clamp(min=1))


def row_lse(
    query: Tensor, candidates: Tensor, scale: Any, target: Any, candidate_bias: Any, query_ids: Any, candidate_ids: Any,
    same_id: str, hardness: float, hardened: str, guide_query: Any, guide_candidates: Any, guide_threshold: Any,
) -> Tensor:  # fmt: skip
    target = torch.full((len(query),), -1) if target is None else target
    z, _, counted = row_logits(
        query, candidates, scale, target, candidate_bias, query_ids, candidate_ids, same_id, hardness, hardened,
        guide_query, guide_candidates, guide_threshold,
    )  # fmt: skip
    some = counted.any(1)
    nothing = torch.full((len(z),), -torch.inf, dtype=torch.float64)
    return nothing.masked_scatter(some, log_sum_exp(z[some], counted[some]))


def albef_contrastive_loss(
    image: Tensor, text: Tensor, image_momentum: Tensor, text_momentum: Tensor, image_queue: Tensor,
    text_queue: Tensor, scale: Any, alpha: float = 0.4, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    def direction(query: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
        z, z_teacher = (rounded(number(scale) * product(features, keys.t())) for features in (query, teacher))
        everything = torch.ones_like(z, dtype=torch.bool)
        soft = rounded(torch.exp(z_teacher - log_sum_exp(z_teacher, everything)[:, None])).detach()
        target = (alpha * soft if alpha else 0) + (1 - alpha) * torch.eye(*z.shape, dtype=torch.float64)
        matches = rounded(target) * z.masked_fill(target == 0, 0)
        return log_sum_exp(z, everything) - rounded(matches).sum(1)

    to_text = direction(image, image_momentum, torch.cat([text_momentum, text_queue]))
    to_image = direction(text, text_momentum, torch.cat([image_momentum, image_queue]))
    return reduce((to_text + to_image) / 2, reduction)


def softmax_rows(logits: Tensor, temp: Any, center: Tensor | None) -> Tensor:
    centered = logits if center is None else rounded(logits - rounded(center.reshape(-1)))
    e = rounded(torch.exp(rounded((centered - centered.amax(-1, keepdim=True)) / number(temp))))
    return rounded(e / e.sum(-1, keepdim=True))


def cross_entropy_of(student: Tensor, p: Tensor, temp: Any) -> Tensor:
    """-sum_k p_k log softmax(S / tau)_k by rows."""
    z = rounded((student - student.detach().amax(-1, keepdim=True)) / number(temp))
    log_total = rounded(z.exp()).sum(-1).log()
    return rounded(p).sum(-1) * rounded(log_total) - rounded(p * z).sum(-1)


def as_crops(crops: Any) -> list[Tensor]:
    blocks = [crops] if isinstance(crops, Tensor) else crops
    return [crop for block in blocks for crop in (block if block.dim() == 3 else [block])]


def sum_of_rows(crops: Sequence[Tensor]) -> Tensor:
    rows = torch.cat([crop.reshape(-1, crop.shape[-1]) for crop in crops])
    return product(torch.ones(1, len(rows), dtype=torch.float64), rows)[0]


def dino_loss(
    student: Any, teacher: Any, student_temp: Any = 0.1, teacher_temp: Any = 0.04, center: Any = None,
    pairs: str = "distinct", teacher_probs: bool = False, reduction: str = "mean", want_teacher_sum: bool = False,
) -> Any:  # fmt: skip
    students, teachers = as_crops(student), as_crops(teacher)
    probabilities = teachers if teacher_probs else [softmax_rows(crop, teacher_temp, center) for crop in teachers]
    losses = [
        cross_entropy_of(crop, p, student_temp)
        for t, p in enumerate(probabilities)
        for v, crop in enumerate(students)
        if pairs == "all" or t != v
    ]
    loss = reduce(torch.stack(losses).mean(0), reduction)
    return (loss, sum_of_rows(teachers)) if want_teacher_sum else loss


def ibot_patch_loss(
    student: Tensor, teacher: Tensor, weights: Any = None, student_temp: Any = 0.1, teacher_temp: Any = 0.04,
    center: Any = None, teacher_probs: bool = False, reduction: str = "sum", want_teacher_sum: bool = False,
) -> Any:  # fmt: skip
    p = teacher if teacher_probs else softmax_rows(teacher, teacher_temp, center)
    losses = cross_entropy_of(student, p, student_temp)
    loss = reduce(losses if weights is None else rounded(weights) * losses, reduction)
    return (loss, sum_of_rows([teacher])) if want_teacher_sum else loss


def sinkhorn_center(teacher: Tensor, teacher_temp: Any, n_iterations: int = 3) -> Tensor:
    rows = teacher.reshape(-1, teacher.shape[-1])
    if len(rows) == 0:
        return torch.zeros(rows.shape[1], dtype=torch.float64)
    tau = number(teacher_temp)
    z = rounded(rows / tau)
    everything = torch.ones_like(z, dtype=torch.bool)
    u = torch.zeros(len(rows), dtype=torch.float64)
    for _ in range(n_iterations):
        v = rounded(log_sum_exp((z - u[:, None]).t(), everything.t()))
        u = rounded(log_sum_exp(z - v, everything))
    return tau * v


def sinkhorn_knopp(teacher: Tensor, teacher_temp: Any, n_iterations: int = 3) -> Tensor:
    return centered_softmax(teacher, teacher_temp, sinkhorn_center(teacher, teacher_temp, n_iterations))


def centered_softmax(teacher: Tensor, teacher_temp: Any, center: Any = None) -> Tensor:
    return softmax_rows(teacher, teacher_temp, center)


def koleo_loss(x: Tensor, eps: float = 1e-8, reduction: str = "mean") -> Tensor:
    u = rounded(x / rounded(x.norm(dim=1, keepdim=True)).clamp(min=eps))
    # A row that is not finite has a loss of NaN, and is at a right angle to all others.
    similarity = product(u, u.t()).detach().nan_to_num(nan=0).fill_diagonal_(-torch.inf)
    distance = rounded((rounded(u - u[similarity.argmax(1)]) + eps).norm(dim=1))
    return reduce(-rounded(torch.log(distance + eps)), reduction)


def centered(z: Tensor) -> Tensor:
    z = z - z.mean(0)
    return rounded(z - z.mean(0))  # what rounding left of a large mean


def off_diagonal_squares(c: Tensor, by_rows: bool) -> Tensor:
    if not by_rows:
        return rounded((c - c.diagonal().diag()).square()).sum()
    # What is documented: rounding is relative to the sum of all squares, the diagonal's included.
    return rounded(rounded(c).square().sum()) - rounded(rounded(c).diagonal().square().sum())


def vicreg_loss(
    za: Tensor, zb: Tensor, invariance_weight: float = 25.0, variance_weight: float = 25.0,
    covariance_weight: float = 1.0, eps: float = 1e-4,
) -> Tensor:  # fmt: skip
    n, width = za.shape
    loss = invariance_weight * rounded(rounded(za - zb).square()).mean()
    for z in (za, zb):
        c = centered(z)
        covariance = product(c.t(), c) / (n - 1)
        deviation = rounded(torch.sqrt(rounded(covariance.diagonal()) + eps))
        loss = loss + variance_weight / 2 * rounded((1 - deviation).clamp(min=0)).mean()
        loss = loss + covariance_weight * off_diagonal_squares(covariance, 2 * n <= width) / width
    return rounded(loss)


def barlow_twins_loss(za: Tensor, zb: Tensor, lambda_param: float = 5e-3) -> Tensor:
    n, width = za.shape
    views = []
    for z in (za, zb):
        c = centered(z)
        views.append(rounded(c / rounded(torch.sqrt(c.square().mean(0) + 1e-5))))
    correlation = product(views[0].t(), views[1]) / n
    others = off_diagonal_squares(correlation, 2 * n <= width)
    return rounded((rounded(correlation.diagonal()) - 1).square().sum() + lambda_param * others)


def ema_update_(targets: list[Tensor], sources: list[Tensor], momentum: Any, copies: Any = None) -> None:
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        m = number(momentum)
        average = rounded(m * target.double()) + rounded((1 - m) * source.double())
        target.copy_(target.clone() if m == 1 else source if m == 0 else average)
        if copies is not None and copies[i] is not None:
            copies[i].copy_(target)


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool = False) -> None:
    keys = keys.clone()
    for key in keys:
        if normalize:
            key = key.double() / key.double().norm().clamp(min=1e-12)
        queue[int(pointer) % len(queue)] = rounded(key) if normalize else key
        pointer += 1
    pointer %= len(queue)


FORMULAS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        albef_contrastive_loss, barlow_twins_loss, centered_softmax, clip_loss, dino_loss, ema_update_, enqueue_,
        ibot_patch_loss, info_nce_loss, key_softmax, koleo_loss, nt_xent_loss, row_lse, row_softmax_loss,
        sigmoid_contrastive_loss, sinkhorn_center, sinkhorn_knopp, sup_con_loss, vicreg_loss,
    )
}  # fmt: skip
