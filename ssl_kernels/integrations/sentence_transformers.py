"""The ranking losses of sentence-transformers, argument for argument, in memory that is linear in the batch.

They inherit from the package's own classes, which check their arguments, embed the texts, cache gradients and write
model cards, and compute the loss from the embeddings in another way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import SimilarityFunction, cos_sim, dot_score, pytorch_cos_sim
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group, world
from ssl_kernels.ops.unit_rows import fused_unit_rows
from ssl_kernels.settings import current_backend

_HARDENED = {"all_negatives": "all", "hard_negatives": "same_id", "in_batch_negatives": "other_ids"}
_NO_DIAGONAL = 2**40  # beyond all rows
_TIE = 2e-6  # by so much the scores of two copies of a text may differ by rounding


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """Replaces ``sentence_transformers.losses.MultipleNegativesRankingLoss``, with all of its directions, both
    partition modes and all hardness modes. No matrix of similarities is stored.

    Args:
        model: the ``SentenceTransformer`` to be trained.
        scale: t, which multiplies the similarities.
        similarity_fct: ``cos_sim`` or ``dot_score`` of ``sentence_transformers.util``, or ``model.similarity`` if that
            is one of them.
        gather_across_devices: take the texts of all processes as candidates. Unlike the original, processes may have
            different numbers of texts.
        directions: "query_to_doc", and perhaps "query_to_query", "doc_to_query" and "doc_to_doc".
        partition_mode: "joint" is one softmax over all directions, "per_direction" the mean of one softmax each.
        hardness_mode: which negatives count for more: "in_batch_negatives", "hard_negatives", "all_negatives" or None.
        hardness_strength: by how much.

    Raises:
        NotImplementedError: for another ``similarity_fct``.
        ValueError: as the original, for arguments that do not fit each other.

    >>> import torch, sentence_transformers
    >>> from ssl_kernels.integrations.sentence_transformers import MultipleNegativesRankingLoss
    >>> loss = MultipleNegativesRankingLoss(model=None, scale=5.0)  # of embeddings alone it needs no model
    >>> round(loss.compute_loss_from_embeddings([torch.eye(2), torch.eye(2)], labels=None).item(), 4)
    0.0067
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: Any = ("query_to_doc",),
        partition_mode: Any = "joint",
        hardness_mode: Any = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode,
            hardness_strength,
        )  # fmt: skip
        _is_cosine(similarity_fct)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """The loss of ``embeddings``: [B, D] of the queries, of their positives, and of each hard negative. ``labels``
        are ignored."""
        return _ranking_loss(self, embeddings)


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """Replaces ``sentence_transformers.losses.MultipleNegativesSymmetricRankingLoss``: the mean of the losses of
    queries that look for documents, and of positives that look for queries.

    Args:
        model, scale, similarity_fct, gather_across_devices: as for :class:`MultipleNegativesRankingLoss`.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, scale, similarity_fct, gather_across_devices, *_SYMMETRIC)


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """Replaces ``sentence_transformers.losses.CachedMultipleNegativesRankingLoss``, whose gradient caching it keeps:
    the model holds the activations of ``mini_batch_size`` texts at a time. The loss itself is computed at once.

    Args:
        model, scale, similarity_fct: as for :class:`MultipleNegativesRankingLoss`.
        mini_batch_size: how many texts the model embeds at a time.
        mini_batch_num_tokens: how many tokens instead, or None.
        gather_across_devices, directions, partition_mode: as for :class:`MultipleNegativesRankingLoss`.
        show_progress_bar: whether there is one of the chunks.
        hardness_mode, hardness_strength: as for :class:`MultipleNegativesRankingLoss`.

    Raises:
        NotImplementedError: for another ``similarity_fct`` than ``cos_sim`` and ``dot_score``.
        ValueError: as the original, for arguments that do not fit each other.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: Any = ("query_to_doc",),
        partition_mode: Any = "joint",
        show_progress_bar: bool = False,
        hardness_mode: Any = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices, directions,
            partition_mode, show_progress_bar, hardness_mode, hardness_strength,
        )  # fmt: skip
        _is_cosine(similarity_fct)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embeddings in chunks, ``reps[column][chunk]``; ``with_backward``, these get their gradients.
        ``labels`` are ignored."""
        return _differentiated(_ranking_loss(self, _whole(reps)), with_backward)


class CachedMultipleNegativesSymmetricRankingLoss(CachedMultipleNegativesRankingLoss):
    """Replaces ``sentence_transformers.losses.CachedMultipleNegativesSymmetricRankingLoss``.

    Args:
        model, scale, similarity_fct: as for :class:`MultipleNegativesRankingLoss`.
        mini_batch_size, mini_batch_num_tokens: as for :class:`CachedMultipleNegativesRankingLoss`.
        gather_across_devices: as for :class:`MultipleNegativesRankingLoss`.
        show_progress_bar: whether there is one of the chunks.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices, *_SYMMETRIC,
            show_progress_bar,
        )  # fmt: skip


class GISTEmbedLoss(losses.GISTEmbedLoss):
    """Replaces ``sentence_transformers.losses.GISTEmbedLoss``: negatives that a guiding model finds more similar than
    the pair itself are left out. The guide's similarities are formed tile by tile and never stored.

    Args:
        model: the ``SentenceTransformer`` to be trained.
        guide: the ``SentenceTransformer`` that guides it.
        temperature: divides the similarities.
        margin_strategy: "absolute" leaves out what exceeds the pair's similarity less the ``margin``, "relative" what
            exceeds it less this share of it.
        margin: 0 or more.
        contrast_anchors: whether anchors are negatives of other anchors.
        contrast_positives: whether positives are negatives of other positives.
        gather_across_devices: take the positives and negatives of all processes as candidates.

    Raises:
        ValueError: as the original, for arguments that do not fit.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """The loss of texts: anchors, positives and, perhaps, a hard negative each. ``labels`` are ignored."""
        features = list(sentence_features)
        if len(features) not in (2, 3):
            raise ValueError(f"sentence_features: expected 2 or 3 columns of texts, got {len(features)}")
        for_guide = [dict(column) for column in features]  # as models add what they compute
        embeddings = embed_columns(self.model, features)
        with torch.no_grad():
            if self.must_retokenize:
                for_guide = [_tokens_of(self.guide, _texts(self.tokenizer, column)) for column in features]
            guides = embed_columns(self.guide, for_guide)
        return _guided_loss(self, embeddings, guides)


class CachedGISTEmbedLoss(losses.CachedGISTEmbedLoss):
    """Replaces ``sentence_transformers.losses.CachedGISTEmbedLoss``, whose gradient caching it keeps.

    Args:
        model, guide, temperature: as for :class:`GISTEmbedLoss`.
        mini_batch_size: how many texts the models embed at a time.
        mini_batch_num_tokens: how many tokens instead, or None.
        show_progress_bar: whether there is one of the chunks.
        margin_strategy, margin, contrast_anchors, contrast_positives, gather_across_devices: as for
            :class:`GISTEmbedLoss`.

    Raises:
        ValueError: as the original, for arguments that do not fit.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embeddings in chunks, ``reps[column][chunk]``, and of the guide's, ``reps_guided``;
        ``with_backward``, the former get their gradients."""
        return _differentiated(_guided_loss(self, _whole(reps), _whole(reps_guided)), with_backward)


class MatryoshkaLoss(losses.MatryoshkaLoss):
    """Replaces ``sentence_transformers.losses.MatryoshkaLoss``: the weighted sum of a loss of several prefixes of the
    embeddings.

    On a CPU, around the ranking losses of this module with their default direction, or symmetric, all prefixes take the
    matrix products of one loss. Around any other loss this is the original class.

    Args:
        model: the ``SentenceTransformer`` to be trained.
        loss: of it, such as ``MultipleNegativesRankingLoss(model)``.
        matryoshka_dims: the lengths of the prefixes.
        matryoshka_weights: their weights, by default 1.
        n_dims_per_step: how many prefixes are drawn for a step, or -1 for all.

    Raises:
        ValueError: as the original, for lengths and weights that do not fit.
    """

    def __init__(
        self,
        model: Any,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Any = None,
        n_dims_per_step: int = -1,
    ) -> None:
        super().__init__(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step)
        if isinstance(loss, CachedMultipleNegativesRankingLoss):
            decorated: Any = loss  # by the original
            one_by_one = decorated.calculate_loss

            def calculate_loss(reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
                if not self._is_one_product():
                    loss_of_prefixes: Tensor = one_by_one(reps, labels, with_backward=with_backward)
                    return loss_of_prefixes
                return _differentiated(_ranking_loss(loss, _whole(reps), *self._prefixes()), with_backward)

            decorated.calculate_loss = calculate_loss

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any) -> Tensor:
        """The loss of texts, which ``loss`` takes, with its ``labels``."""
        if self.uses_gradient_cache or not self._is_one_product():
            return super().forward(sentence_features, labels)
        return _ranking_loss(self.loss, embed_columns(self.model, sentence_features), *self._prefixes())

    def _is_one_product(self) -> bool:
        ours = isinstance(self.loss, MultipleNegativesRankingLoss | CachedMultipleNegativesRankingLoss)
        distinct = len(set(self.matryoshka_dims)) == len(self.matryoshka_dims)
        return ours and distinct and not _is_joint(self.loss)

    def _prefixes(self) -> tuple[list[int], list[float]]:
        """Those of this step, drawn as the original draws them."""
        chosen: Sequence[int] = range(len(self.matryoshka_dims))
        if 0 < self.n_dims_per_step < len(chosen):
            chosen = random.sample(chosen, self.n_dims_per_step)
        return [self.matryoshka_dims[i] for i in chosen], [float(self.matryoshka_weights[i]) for i in chosen]


# ---- losses of embeddings

_SYMMETRIC = ("query_to_doc", "doc_to_query"), "per_direction"


def _ranking_loss(
    options: Any, embeddings: Sequence[Tensor], dims: list[int] | None = None, weights: list[float] | None = None
) -> Tensor:
    """Of queries, their positives and hard negatives, or the weighted sum for prefixes of them; ``options`` has the
    attributes of a ranking loss."""
    if len(embeddings) < 2:
        raise ValueError(f"embeddings: expected those of queries and of positives, got {len(embeddings)} columns")
    group = world() if options.gather_across_devices else None
    normalize = _is_cosine(options.similarity_fct) or dims is not None
    if _is_joint(options):
        return _joint_loss(options, embeddings, normalize, group)
    query, positive = embeddings[:2]
    prefixes: dict[str, Any] = {"dims": dims, "dim_weights": weights, "normalize": normalize}
    over: dict[str, Any] = {"group": group, "own_share": group is not None and current_backend() != "reference"}
    hardness = _hardness(options, embeddings, group)
    both_ways = len(set(options.directions)) > 1
    if hardness or dims is not None or not both_ways:
        documents = torch.cat(list(embeddings[1:]))
        forth = K.row_softmax_loss(query, documents, options.scale, **hardness, **prefixes, **over)
        if not both_ways:
            return forth
        return (forth + K.row_softmax_loss(positive, query, options.scale, **prefixes, **over)) / 2
    if normalize:
        embeddings = [fused_unit_rows(rows) for rows in embeddings]
    pairs: dict[str, Any] = {}
    if group is not None and len(embeddings) > 2:  # where the rows of a pair are not equally far from the first
        own, _ = _ids(embeddings, group)
        pairs = {"x_ids": own, "y_ids": torch.cat([own, *(own.new_full(own.shape, -1) for _ in embeddings[2:])])}
        pairs["offset"] = _NO_DIAGONAL
    return K.clip_loss(embeddings[0], torch.cat(list(embeddings[1:])), options.scale, **pairs, **over)


def _joint_loss(options: Any, embeddings: Sequence[Tensor], normalize: bool, group: Group) -> Tensor:
    """One softmax over the candidates of all directions."""
    if normalize:
        embeddings = [fused_unit_rows(rows) for rows in embeddings]
    query, positive = embeddings[:2]
    documents, scale = torch.cat(list(embeddings[1:])), options.scale
    own, of_documents = _ids(embeddings, group)
    target = torch.arange(len(query), device=query.device)
    hardness = _hardness(options, embeddings, group)
    lse = K.row_lse(query, documents, scale, target=target, **hardness, group=group)
    if "query_to_query" in options.directions:
        others = K.row_lse(query, query, scale, query_ids=own, candidate_ids=own, group=group)
        lse = torch.logaddexp(lse, others)
    if "doc_to_query" in options.directions:
        lse = torch.logaddexp(lse, K.row_lse(positive, query, scale, group=group))
    if "doc_to_doc" in options.directions:
        others = K.row_lse(positive, documents, scale, query_ids=own, candidate_ids=of_documents, group=group)
        lse = torch.logaddexp(lse, others)
    return (lse - scale * _pair_scores(query, positive)).mean()


def _guided_loss(options: Any, embeddings: Sequence[Tensor], guides: Sequence[Tensor]) -> Tensor:
    """Of anchors, their positives and hard negatives, among those that the guide's embeddings do not leave out."""
    if len(embeddings) < 2 or len(embeddings) != len(guides):
        raise ValueError(
            "embeddings: expected those of anchors and of positives, and as many of the guide, got "
            f"{len(embeddings)} and {len(guides)} columns"
        )
    group = world() if options.gather_across_devices else None
    anchor, positive, *negatives = (fused_unit_rows(rows) for rows in embeddings)
    with torch.no_grad():
        guide_anchor, guide_positive, *guide_negatives = (fused_unit_rows(rows) for rows in guides)
        score = _pair_scores(guide_anchor, guide_positive)
        margin = options.margin if options.margin_strategy == "absolute" else options.margin * score.abs()
        threshold = score - margin + _TIE
    scale = 1 / options.temperature

    def lse(rows: Tensor, cols: Tensor, guide_rows: Tensor, guide_cols: Tensor, **more: Any) -> Tensor:
        guide = {"guide_query": guide_rows, "guide_candidates": guide_cols, "guide_threshold": threshold}
        return K.row_lse(rows, cols, scale, **guide, **more)

    candidates, of_guide = torch.cat([positive, *negatives]), torch.cat([guide_positive, *guide_negatives])
    target = torch.arange(len(anchor), device=anchor.device)
    total = lse(anchor, candidates, guide_anchor, of_guide, target=target, group=group)
    if options.contrast_anchors:  # of this process alone, also where candidates are gathered
        total = torch.logaddexp(total, lse(anchor, anchor, guide_anchor, guide_anchor))
    if options.contrast_positives:
        total = torch.logaddexp(total, lse(positive, positive, guide_positive, guide_positive, group=group))
    return (total - scale * _pair_scores(anchor, positive)).mean()


def _is_cosine(similarity_fct: Callable[..., Tensor]) -> bool:
    """Whether it is that, or else a dot product."""
    of_model: Any = getattr(similarity_fct, "__self__", None)
    known: Any = similarity_fct
    if getattr(similarity_fct, "__name__", "") == "similarity" and hasattr(of_model, "similarity_fn_name"):
        known = SimilarityFunction.to_similarity_fn(of_model.similarity_fn_name)
    if known in (cos_sim, pytorch_cos_sim):
        return True
    if known is dot_score:
        return False
    name = getattr(known, "__name__", type(known).__name__)
    raise NotImplementedError(
        f"similarity_fct: expected cos_sim or dot_score of sentence_transformers.util, got {name}; other similarities "
        "need sentence-transformers' own loss"
    )


def _is_joint(options: Any) -> bool:
    """Whether one softmax has the candidates of several directions."""
    return options.partition_mode == "joint" and len(set(options.directions)) > 1


def _hardness(options: Any, embeddings: Sequence[Tensor], group: Group) -> dict[str, Any]:
    """The arguments of an op, if any."""
    if options.hardness_mode is None or options.hardness_strength == 0:
        return {}
    found = {"hardness": options.hardness_strength, "hardened": _HARDENED[options.hardness_mode]}
    if found["hardened"] == "all":
        return found
    own, of_documents = _ids(embeddings, group)
    return found | {"query_ids": own, "candidate_ids": of_documents, "same_id": "negative"}


def _ids(embeddings: Sequence[Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """Of queries, and of documents by the query that they belong to, over all processes."""
    rank = 0 if group is None else torch.distributed.get_rank()
    own = torch.arange(len(embeddings[0]), device=embeddings[0].device) + (rank << 40)
    return own, own.repeat(len(embeddings) - 1)


def _pair_scores(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return torch.linalg.vecdot(x, y)


# ---- chunks, and texts for a guide


def _whole(reps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(list(chunks)) for chunks in reps]


def _differentiated(loss: Tensor, with_backward: bool) -> Tensor:
    if not with_backward:
        return loss
    loss.backward()
    return loss.detach()


def _texts(tokenizer: Any, column: dict[str, Tensor]) -> list[str]:
    tokens: Any = column["input_ids"]
    if "cu_seq_lens_q" in column:  # one text behind the other, without padding
        tokens = [part.tolist() for part in tokens[0].split(column["cu_seq_lens_q"].diff().tolist())]
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def _tokens_of(guide: Any, texts: list[str]) -> dict[str, Any]:
    found = guide.preprocess(texts)
    return {name: value.to(guide.device) if isinstance(value, Tensor) else value for name, value in found.items()}
