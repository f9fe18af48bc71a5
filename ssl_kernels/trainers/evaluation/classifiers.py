"""Classes and images found by features as they are: nearest neighbours, logistic regression, the nearest image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.ops.unit_rows import unit_rows


def nearest_classes(
    queries: Tensor, gallery: Tensor, labels: Tensor, k: int, temperature: float | None = None
) -> Tensor:
    """The class [n] that the k nearest of the gallery vote for; rows are compared by their cosine.

    Without `temperature` each has one vote, and of classes with as many the one whose voters are nearer wins; with it
    a neighbour of similarity s votes with exp(s / temperature), as in Wu 2018, arXiv 1805.01978.
    """
    return vote(cosines(queries, gallery), labels, k, temperature)


def cosines(queries: Tensor, gallery: Tensor) -> Tensor:
    """The cosine [n, N] of each query [n, D] and each of the gallery [N, D]."""
    return unit_rows(queries) @ unit_rows(gallery).T


def vote(similarity: Tensor, labels: Tensor, k: int, temperature: float | None = None) -> Tensor:
    """`nearest_classes` of queries whose cosines [n, N] with the gallery are known."""
    nearest, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
    # k cosines lie between -k and k: divided by 3 k they decide between equal votes, and never against one vote more.
    weight = 1 + nearest / (3 * k) if temperature is None else ((nearest - 1) / temperature).exp()
    votes = similarity.new_zeros(len(similarity), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[index], weight.to(votes.dtype)).argmax(1)


def linear_probe(
    queries: Tensor, gallery: Tensor, labels: Tensor, weight_decay: float = 1e-4, iterations: int = 100
) -> Tensor:
    """The class [n] that multinomial logistic regression on the standardised features predicts."""
    std, mean = torch.std_mean(gallery, 0)
    queries, gallery = ((x - mean) / std.clamp(min=1e-3 * float(std.max()) + 1e-12) for x in (queries, gallery))
    weight = gallery.new_zeros(int(labels.max()) + 1, gallery.shape[1], requires_grad=True)
    bias = gallery.new_zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(gallery, weight, bias), labels) + weight_decay * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.linear(queries, weight, bias).argmax(1).detach()


def instance_recall(queries: Tensor, gallery: Tensor, copies: int = 1) -> float:
    """How often the nearest of the gallery, by cosine, is the query's own image; row i of `copies` x [n, D] shows
    image i modulo n. Ties are broken at random, and the expected value is returned."""
    n = len(queries)
    similarity = unit_rows(queries) @ unit_rows(gallery).T
    best = similarity.view(n, copies, n).amax(1)  # of every image's copies
    right = best.diagonal()[:, None]
    ahead, tied = (best > right).any(1), (best == right).sum(1)
    return float((~ahead / tied.clamp(min=1) * (tied > 0)).mean())  # NaN equals nothing, itself included
