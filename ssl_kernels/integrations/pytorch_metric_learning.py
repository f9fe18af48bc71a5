"""Losses of pytorch-metric-learning, argument for argument.

They are subclasses of the package's own, so that its reducers, regularizers, miners and wrappers take them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import distances, losses, reducers
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.ops import _checks, pair_tiles
from ssl_kernels.ops.pair_tiles import ListedPairs, SameLabels
from ssl_kernels.ops.unit_rows import fused_unit_rows


class _AllPairs(NamedTuple):
    """Given as an ``indices_tuple``: all pairs of labels, but that of each query with itself."""

    own: Tensor | None  # [M]: the reference embedding that is the query itself


class _Sides(NamedTuple):
    query: Tensor
    candidates: Tensor
    scale: Tensor
    pairs: SameLabels | ListedPairs
    ids: tuple[Tensor, Tensor] | None  # of queries and candidates, if the pairs are those of labels
    alone: bool  # the candidates are the queries
    has_own: bool  # each query is one of the candidates, and no positive of itself

    def is_empty(self) -> bool:
        """pytorch-metric-learning also calls a pair of each kind nothing."""
        counts = self.pairs.positives, self.pairs.negatives
        return min(counts) == 0 or max(counts) <= 1


def _is_similarity(loss: Any) -> bool:
    """Whether its distance is the cosine or the dot product, and nobody asked for statistics of it."""
    distance = loss.distance
    plain = type(distance) in (distances.CosineSimilarity, distances.DotProductSimilarity)
    return plain and distance.p == 2 and distance.power == 1 and not distance.collect_stats


def _sides(
    loss: Any, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None
) -> _Sides:
    normalize = loss.distance.normalize_embeddings
    query = fused_unit_rows(embeddings, name="embeddings") if normalize else embeddings
    alone = ref_emb is embeddings
    candidates = query if alone else fused_unit_rows(ref_emb, name="ref_emb") if normalize else ref_emb
    query, candidates = _checks.autocast_features(query, candidates)
    scale = _checks.as_inverse_temperature("temperature", loss.temperature, query)
    if indices_tuple is not None and not isinstance(indices_tuple, _AllPairs):
        lists = loss_and_miner_utils.convert_to_pairs(indices_tuple, labels, ref_labels)
        lists = [t.to(query.device) for t in lists]
        pairs = ListedPairs((lists[0], lists[1]), (lists[2], lists[3]), len(query), len(candidates))
        return _Sides(query, candidates, scale, pairs, None, alone, False)
    if labels is None or ref_labels is None:
        raise ValueError("labels: expected labels, or an indices_tuple, got neither")
    own = indices_tuple.own if indices_tuple is not None else None
    if ref_labels is labels:
        own = torch.arange(len(labels), device=query.device)
    ids = _ids(labels, ref_labels)
    return _Sides(query, candidates, scale, SameLabels(*ids, own), ids, alone, own is not None)


def _ids(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Integers that are equal where these are."""
    if not (labels.is_floating_point() or ref_labels.is_floating_point()):
        return labels.long(), ref_labels.long()
    ids = torch.cat([labels, ref_labels]).unique(return_inverse=True)[1]
    return ids[: len(labels)], ids[len(labels) :]


def _of_negatives(sides: _Sides) -> Tensor:
    """The log-sum-exp of each query over the candidates of other labels."""
    assert sides.ids is not None
    query_ids, candidate_ids = sides.ids
    return K.row_lse(sides.query, sides.candidates, sides.scale, query_ids=query_ids, candidate_ids=candidate_ids)


class NTXentLoss(losses.NTXentLoss):
    r"""Replaces ``pytorch_metric_learning.losses.NTXentLoss``, whose memory is cubic in the batch; here it is linear.

    .. math:: L = \frac{1}{P} \sum_{(i, p)} \log \Big( e^{z_{ip}} + \sum_n e^{z_{in}} \Big) - z_{ip}, \qquad
              z_{ij} = x_i \cdot y_j / \tau

    over the P positive pairs (i, p), with the negatives n of i. Each positive has a denominator of its own.

    The loss is computed here for the cosine and the dot product with the mean over pairs, which are the defaults.
    Another ``distance`` or ``reducer``, or statistics of a distance, are left to pytorch-metric-learning. Its losses
    end where a ratio underflows, at 87 in float32; these do not.

    Args:
        temperature: :math:`\tau > 0`, which divides the similarities.
        distance, reducer, embedding_regularizer, embedding_reg_weight: as in pytorch-metric-learning.

    ``forward(embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None)`` takes embeddings [M, D] and
    labels [M]; reference embeddings [N, D] and their labels, which by default are the embeddings themselves; and a
    miner's triplets or pairs, by default all pairs of labels. For a miner's lists, whole rows of similarities are
    visited, as many as fit the workspace at a time. On a GPU the call waits for the device, as the package's does.

    Returns:
        The loss in the dtype of ``embeddings``.

    Raises:
        TypeError, ValueError, IndexError: if an argument does not fit.

    Source: Chen et al., 2020, arXiv:2002.05709; for labels, Musgrave et al., 2020, arXiv:2008.09164.

    >>> import torch
    >>> from ssl_kernels.integrations.pytorch_metric_learning import NTXentLoss
    >>> round(NTXentLoss(temperature=0.5)(2 * torch.eye(3), torch.tensor([7, 7, 8])).item(), 4)
    0.6931
    """

    def __init__(self, temperature: float = 0.07, **kwargs: Any) -> None:
        super().__init__(temperature=temperature, **kwargs)

    def is_fused(self) -> bool:
        """Whether this class computes the loss, or leaves it to pytorch-metric-learning."""
        reducer = self.reducer
        if isinstance(reducer, reducers.MultipleReducers):  # with a regularizer
            reducer = dict(reducer.reducers).get("loss", reducer.default_reducer)
        return _is_similarity(self) and type(reducer) is reducers.MeanReducer

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None
    ) -> Any:
        """What the reducer gets. pytorch-metric-learning calls it."""
        if not self.is_fused():
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        sides = _sides(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if sides.is_empty():
            return self.zero_losses()
        lse = None if sides.ids is None else _of_negatives(sides)
        rows = pair_tiles.by_row(pair_tiles.nt_xent, sides.pairs, *sides[:3], lse)
        loss = (rows.sum() / sides.pairs.positives).to(embeddings.dtype)
        return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}


class SupConLoss(losses.SupConLoss):
    r"""Replaces ``pytorch_metric_learning.losses.SupConLoss``, in memory that is linear in the batch.

    .. math:: L_i = \log \sum_k e^{z_{ik}} - \frac{1}{|P_i|} \sum_{p \in P_i} z_{ip}, \qquad
              z_{ij} = x_i \cdot y_j / \tau

    with the positives :math:`P_i` of i, and k over its positives and negatives. The default reducer takes the mean of
    the losses that are above 0; all reducers work. A ``distance`` other than the cosine and the dot product, or
    statistics of a distance, are left to pytorch-metric-learning.

    Args:
        temperature: :math:`\tau > 0`, which divides the similarities.
        distance, reducer, embedding_regularizer, embedding_reg_weight: as in pytorch-metric-learning.

    The call is that of :class:`NTXentLoss`. A pair that a miner lists twice counts once.

    Returns:
        The loss in the dtype of ``embeddings``.

    Raises:
        TypeError, ValueError, IndexError: if an argument does not fit.

    Source: Khosla et al., 2020, arXiv:2004.11362, equation 2.

    >>> import torch
    >>> from ssl_kernels.integrations.pytorch_metric_learning import SupConLoss
    >>> round(SupConLoss(temperature=0.5)(2 * torch.eye(3), torch.tensor([7, 7, 8])).item(), 4)
    0.6931
    """

    def __init__(self, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(temperature=temperature, **kwargs)

    def is_fused(self) -> bool:
        """Whether this class computes the loss, or leaves it to pytorch-metric-learning."""
        return _is_similarity(self)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None
    ) -> Any:
        """What the reducer gets. pytorch-metric-learning calls it."""
        if not self.is_fused():
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        sides = _sides(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if sides.is_empty():
            return self.zero_losses()
        rows = self._rows(sides)
        # What a sum that starts with 1 loses; the default reducer must not count it.
        rows = rows.masked_fill(rows < torch.finfo(rows.dtype).eps / 2, 0).to(embeddings.dtype)
        indices = torch.arange(len(rows), device=rows.device)
        return {"loss": {"losses": rows, "indices": indices, "reduction_type": "element"}}

    def _rows(self, sides: _Sides) -> Tensor:
        if sides.ids is not None and sides.alone and sides.has_own:
            return K.sup_con_loss(sides.query, sides.ids[0], 1 / sides.scale, reduction="none")
        if sides.ids is not None and not sides.has_own:
            none = torch.full_like(sides.ids[0], -1)
            return K.row_softmax_loss(
                *sides[:3], target=none, query_ids=sides.ids[0], candidate_ids=sides.ids[1], same_id="positive",
                reduction="none",
            )  # fmt: skip
        lse, mean = pair_tiles.by_row(pair_tiles.sup_con, sides.pairs, *sides[:3]).unbind(1)
        if sides.ids is not None:
            lse = torch.logaddexp(lse, _of_negatives(sides))
        return (lse - mean).masked_fill(~sides.pairs.paired, 0)


class CrossBatchMemory(losses.CrossBatchMemory):
    """Replaces ``pytorch_metric_learning.losses.CrossBatchMemory``: embeddings of earlier batches are references, too.

    Around :class:`NTXentLoss` and :class:`SupConLoss` of this module, and without a miner, no list of pairs is made, so
    that memory is linear in the batch and in ``memory_size``. With a miner, or around other losses, it is the package's
    own class. As there, a batch is in the memory before its loss is computed, and no embedding is its own positive.

    Args:
        loss: a loss of this module, or one that pytorch-metric-learning's class takes.
        embedding_size: D.
        memory_size: how many embeddings are kept.
        miner: chooses pairs or triplets; by default all pairs of labels.

    ``forward(embeddings, labels, indices_tuple=None, enqueue_mask=None)`` is that of pytorch-metric-learning.

    Source: Wang et al., 2020, arXiv:1912.06798.

    >>> import torch
    >>> from ssl_kernels.integrations.pytorch_metric_learning import CrossBatchMemory, NTXentLoss
    >>> loss = CrossBatchMemory(NTXentLoss(), embedding_size=16, memory_size=1024)
    >>> for _ in range(3):
    ...     embeddings = torch.randn(32, 16, requires_grad=True)
    ...     loss(embeddings, torch.randint(10, (32,))).backward()
    >>> loss.queue_idx
    96
    """

    def __init__(
        self, loss: Any, embedding_size: int, memory_size: int = 1024, miner: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(loss, embedding_size, memory_size=memory_size, miner=miner, **kwargs)

    def create_indices_tuple(
        self, embeddings: Tensor, labels: Tensor, E_mem: Tensor, L_mem: Tensor, input_indices_tuple: Any,
        do_remove_self_comparisons: bool,
    ) -> Any:  # fmt: skip
        """The pairs of a batch and the memory. pytorch-metric-learning calls it."""
        # Of a single row, theirs does not remove the pair with itself.
        mined = self.miner or input_indices_tuple is not None or len(embeddings) == 1
        if mined or not (isinstance(self.loss, (NTXentLoss, SupConLoss)) and self.loss.is_fused()):
            return super().create_indices_tuple(
                embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
            )
        return _AllPairs(self.curr_batch_idx if do_remove_self_comparisons else None)
