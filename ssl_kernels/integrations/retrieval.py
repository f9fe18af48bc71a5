"""Losses of Tevatron and FlagEmbedding, and of two-tower recommenders, on the softmax over rows.

Passages are interleaved: behind a query's positive come its own hard negatives, and then the next query's positive. Of
Q queries and P passages, passage i P / Q is to be found by query i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group, world
from ssl_kernels.losses.in_group import LossInGroup
from ssl_kernels.ops import _checks


def _per_query(queries: Tensor, passages: Tensor, names: tuple[str, str]) -> int:
    """How many passages a query has."""
    _checks.check_features(**dict(zip(names, (queries, passages), strict=True)))
    rows, count = len(queries), len(passages)
    if rows == 0 or count == 0 or count % rows:
        raise ValueError(f"{names[1]}: expected as many rows for each of the {rows} of {names[0]}, got {count} rows")
    return count // rows


class SimpleContrastiveLoss(nn.Module):
    """Replaces ``tevatron.retriever.gc_trainer.SimpleContrastiveLoss``: queries among interleaved passages.

    ``loss(x, y, target=None, reduction="mean")`` takes queries [Q, D] and passages [P, D], which it does not normalise.
    Divide the queries by a temperature if there is one. ``target`` [Q] is each query's passage, by default i P / Q.

    In Tevatron's ``EncoderModel`` the loss is in ``forward``, behind a matrix of scores. Override it::

        class Model(DenseModel):
            def forward(self, query=None, passage=None):
                if not self.training:
                    return super().forward(query, passage)
                loss = DistributedContrastiveLoss() if self.is_ddp else SimpleContrastiveLoss()
                queries = self.encode_query(query) / self.temperature
                return EncoderOutput(loss=loss(queries, self.encode_passage(passage)))

    Raises:
        TypeError, ValueError: if an argument does not fit.

    >>> import torch
    >>> from ssl_kernels.integrations.retrieval import SimpleContrastiveLoss
    >>> passages = torch.eye(6)  # two queries, each with a positive and two hard negatives
    >>> round(SimpleContrastiveLoss()(9 * passages[::3], passages).item(), 4)
    0.0006
    """

    def forward(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The loss; with the reduction "none", of each query."""
        return K.row_softmax_loss(x, y, 1.0, target=_target(x, y, target), reduction=reduction)


class DistributedContrastiveLoss(nn.Module):
    """Replaces ``tevatron.retriever.gc_trainer.DistributedContrastiveLoss``: the same over all processes.

    The value is that of the whole batch, times the number of processes, and so are the gradients of this process's
    queries and passages: their mean, which DistributedDataParallel takes, is the exact gradient. Tevatron gathers all
    features and computes the whole matrix on each process. Here a process has the rows of its own queries, and the
    numbers of rows may differ.

    Args:
        n_target: ignored, as in Tevatron.
        scale_loss: False leaves out the number of processes, in the value and in the gradients.
        group: the processes, by default all of them.

    Raises:
        TypeError, ValueError: if an argument does not fit, on all processes.

    >>> from ssl_kernels.integrations.retrieval import DistributedContrastiveLoss
    >>> loss = DistributedContrastiveLoss()(9 * torch.eye(6)[::3], torch.eye(6))  # one process, without a group
    >>> round(loss.item(), 4)
    0.0006
    """

    def __init__(self, n_target: int = 0, scale_loss: bool = True, *, group: Group = None) -> None:
        super().__init__()
        self.scale_loss = scale_loss
        self.group = group

    def forward(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The loss of :class:`SimpleContrastiveLoss` over all processes; ``target`` counts this one's passages."""
        group = world() if self.group is None else self.group
        target = _target(x, y, target)
        loss = K.row_softmax_loss(x, y, 1.0, target=target, reduction=reduction, group=group, grad_reduce="sum")
        return loss * _size(group) if self.scale_loss else loss


def _target(x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    if target is not None:
        return target
    step = _per_query(x, y, ("x", "y"))
    return torch.arange(0, len(y), step, device=x.device)


def _size(group: Group) -> int:
    return 1 if group is None else group.size()


class EmbedderLoss(LossInGroup):
    r"""Replaces the losses in FlagEmbedding's ``AbsEmbedderModel``: in-batch, cross-device and own negatives.

    The loss is the cross-entropy of each query among all passages, of which passage i P / Q is the target. Give a model
    this loss in the place of its methods::

        loss = EmbedderLoss(model.temperature, model.negatives_cross_device, model.kd_loss_type)
        for name in ("_compute_in_batch_neg_loss", "_compute_cross_device_neg_loss"):
            setattr(model, name, lambda q, p, teacher_targets=None, **_: (None, loss(q, p, teacher_targets)))

    Over several processes the gradients of FlagEmbedding's features are 1/W of what DistributedDataParallel averages to
    the exact gradient. Here they are exact; ``grad_reduce="sum"`` gives FlagEmbedding's. The value is the same.

    Args:
        temperature: divides the scores.
        negatives_cross_device: the passages of all processes are candidates.
        kd_loss_type: what ``teacher_targets`` add. "kl_div" adds the cross-entropy of the teacher's distribution over
            a query's own passages. "m3_kd_loss" is BGE-M3's: each of a query's passages is to be found, weighed by the
            teacher, among all passages but the ones of the query before it. It is for one process.
        in_batch_negatives: False leaves each query its own passages, as ``no_in_batch_neg_flag`` does.
        group, strategy, grad_reduce, even_batches: see :mod:`ssl_kernels.distributed`.

    Source: Xiao et al., 2023, arXiv:2309.07597; Chen et al., 2024, arXiv:2402.03216, for ``m3_kd_loss``.

    >>> import torch
    >>> from ssl_kernels.integrations.retrieval import EmbedderLoss
    >>> passages = torch.eye(6)
    >>> round(EmbedderLoss(temperature=0.1)(passages[::3], passages).item(), 4)
    0.0002
    """

    def __init__(
        self,
        temperature: float = 1.0,
        negatives_cross_device: bool = False,
        kd_loss_type: str = "kl_div",
        *,
        in_batch_negatives: bool = True,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        even_batches: bool = False,
    ) -> None:
        super().__init__(group, strategy, grad_reduce, even_batches, gather_distributed=negatives_cross_device)
        _checks.check_choice("kd_loss_type", kd_loss_type, ("kl_div", "m3_kd_loss"))
        if not in_batch_negatives and kd_loss_type == "m3_kd_loss":
            raise ValueError("in_batch_negatives: expected True with kd_loss_type='m3_kd_loss', got False")
        self.temperature = temperature
        self.kd_loss_type = kd_loss_type
        self.in_batch_negatives = in_batch_negatives

    def forward(self, q_reps: Tensor, p_reps: Tensor, teacher_targets: Tensor | None = None) -> Tensor:
        """The loss of queries [Q, D] and passages [P, D], normalised or not; ``teacher_targets`` [Q, P / Q] are
        probabilities."""
        count = _per_query(q_reps, p_reps, ("q_reps", "p_reps"))
        if teacher_targets is not None and teacher_targets.shape != (len(q_reps), count):
            got = tuple(teacher_targets.shape)
            raise ValueError(f"teacher_targets: expected shape ({len(q_reps)}, {count}), got {got}")
        scale = 1 / self.temperature
        if teacher_targets is not None and self.kd_loss_type == "m3_kd_loss":
            return self._m3(q_reps, p_reps, scale, teacher_targets)
        if self.in_batch_negatives:
            target = torch.arange(0, len(p_reps), count, device=q_reps.device)
            loss = K.row_softmax_loss(q_reps, p_reps, scale, target=target, **self.how())
        else:
            own = _own_scores(q_reps, p_reps, scale)
            loss = F.cross_entropy(own, own.new_zeros(len(own), dtype=torch.int64))
        if teacher_targets is None:
            return loss
        log_p = _own_scores(q_reps, p_reps, scale).log_softmax(1)
        return loss - (log_p * teacher_targets).sum(1).mean()

    def _m3(self, q_reps: Tensor, p_reps: Tensor, scale: float, teacher_targets: Tensor) -> Tensor:
        if not self.is_alone():
            raise NotImplementedError("kd_loss_type: 'm3_kd_loss' is not implemented over several processes")
        own = _own_scores(q_reps, p_reps, scale)
        queries = torch.arange(len(own), device=own.device)
        others = K.row_lse(
            q_reps, p_reps, scale, query_ids=queries, candidate_ids=queries.repeat_interleave(own.shape[1])
        )
        from_here = own.flip(1).logcumsumexp(1).flip(1)  # over a query's passages from each one on
        losses = torch.logaddexp(others[:, None], from_here) - own
        return (losses * teacher_targets).sum(1).mean()


def _own_scores(queries: Tensor, passages: Tensor, scale: float) -> Tensor:
    """[Q, P / Q] of each query and its own passages."""
    wide = _checks.accumulation_dtype(queries.dtype)
    own = passages.reshape(len(queries), -1, passages.shape[1])
    return torch.linalg.vecdot(queries[:, None].to(wide), own.to(wide)) * scale


class TwoTowerLoss(LossInGroup):
    r"""Softmax loss of a two-tower recommender, with the correction for popularity that in-batch negatives need.

    .. math:: L = - \frac{1}{B} \sum_i \log \frac{e^{s_{ii} - \log Q_i}}{\sum_j e^{s_{ij} - \log Q_j}}, \qquad
              s_{ij} = u_i \cdot v_j / \tau

    where user i has chosen item i, and j goes over the items of the batch, and over sampled ones if there are any. An
    item that was drawn with probability Q is a negative Q times too often; without the correction a model learns to
    hold popularity against items. Items equal to the user's own, at other places, are left out.

    Args:
        temperature: tau > 0, which divides the products. A float, or a tensor of one element, which gets a gradient.
        normalize: divide the rows of both towers by their norms first.
        group, strategy, grad_reduce, even_batches: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`.

    Source: Yi et al., 2019, Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations; Yang et al.,
    2020, for sampled items beside those of the batch.

    >>> import torch
    >>> from ssl_kernels.integrations.retrieval import TwoTowerLoss
    >>> users, items = torch.randn(2, 64, 16).unbind()
    >>> item_ids = torch.randint(1000, (64,))
    >>> log_q = torch.rand(1000).log_softmax(0)
    >>> loss = TwoTowerLoss(temperature=0.1)(users, items, item_ids, log_q=log_q[item_ids])
    """

    def __init__(
        self,
        temperature: Tensor | float = 0.05,
        normalize: bool = True,
        *,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        even_batches: bool = False,
    ) -> None:
        super().__init__(group, strategy, grad_reduce, even_batches)
        self.temperature = temperature
        self.normalize = normalize

    def forward(
        self,
        users: Tensor,
        items: Tensor,
        item_ids: Tensor | None = None,
        *,
        log_q: Tensor | None = None,
        negatives: Tensor | None = None,
        negative_ids: Tensor | None = None,
        negative_log_q: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of users [B, D] that chose items [B, D], of which ``item_ids`` are int64 [B].

        ``log_q`` [B] are logarithms of the probabilities with which the items come into a batch, such as the share of
        each among all choices. ``negatives`` [N, D] are more items, drawn in some other way, with their ids and their
        own ``negative_log_q``. ``weights`` [B] weigh the users.
        """
        if items.shape[:1] != users.shape[:1]:
            raise ValueError(f"items: expected {len(users)} rows as users has, got {len(items)}")
        given = {"negative_ids": (item_ids, negative_ids), "negative_log_q": (log_q, negative_log_q)}
        for name, (of_items, of_negatives) in given.items():
            wanted = negatives is not None and of_items is not None
            if wanted != (of_negatives is not None):
                what = "a tensor" if wanted else "None without negatives, or without the same of items"
                raise ValueError(f"{name}: expected {what}, got {'None' if wanted else 'a tensor'}")
        candidates = items if negatives is None else torch.cat([items, negatives])
        ids, log_q = (
            first if first is None or second is None else torch.cat([first, second])
            for first, second in ((item_ids, negative_ids), (log_q, negative_log_q))
        )
        return K.row_softmax_loss(
            users, candidates, self._scale(users), candidate_bias=None if log_q is None else -log_q, query_ids=item_ids,
            candidate_ids=ids, weights=weights, normalize=self.normalize, **self.how(),
        )  # fmt: skip

    def over_catalogue(
        self, users: Tensor, catalogue: Tensor, target: Tensor, *, weights: Tensor | None = None
    ) -> Tensor:
        """The loss of users [B, D] among all items [N, D], of which ``target`` [B] are chosen. Nothing is sampled, so
        that nothing needs a correction. Each process has the whole catalogue and users of its own; no group is used."""
        return K.row_softmax_loss(
            users, catalogue, self._scale(users), target=target, weights=weights, normalize=self.normalize
        )

    def _scale(self, users: Tensor) -> Tensor:
        return _checks.as_inverse_temperature("temperature", self.temperature, users)
