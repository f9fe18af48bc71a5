"""What an image-text model has learned: retrieval, zero-shot classification, and trivial baselines beside them.

The baselines know the training pairs but learn nothing: **TF-IDF + pixels** takes a caption to the training caption
with the nearest TF-IDF vector, that caption's image to the nearest held-out image by pixels; for images the same way
backwards. What it reaches, a model has not earned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ssl_kernels.ops.unit_rows import unit_rows
from ssl_kernels.trainers.data import openmoji
from ssl_kernels.trainers.data.faults import Faults
from ssl_kernels.trainers.data.pairs import TEMPLATES, ImageTextPairs
from ssl_kernels.trainers.evaluation.baseline import TfidfPixels
from ssl_kernels.trainers.evaluation.embedder import Embedder
from ssl_kernels.trainers.evaluation.figures import PairFigure

_SUPERVISED = ", supervised by category words"

EncodeTexts = Callable[[Sequence[str]], Tensor]


def recall(similarity: Tensor, k: int, queries: Tensor | None = None) -> float:
    """R@k of a similarity matrix [N, N] whose right pairs are on the diagonal, over all rows or the chosen ones.

    Ties are broken at random, and the expected value is returned: a model that calls everything equal is at chance.
    """
    right = similarity.diagonal()[:, None]
    ahead, tied = (similarity > right).sum(1), (similarity == right).sum(1)
    found = ((k - ahead) / tied.clamp(min=1)).clamp(0, 1) * (tied > 0)  # NaN equals nothing, itself included
    return float((found if queries is None else found[queries]).mean())


def zero_shot(
    images: Tensor, encode_texts: EncodeTexts, classes: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Similarity [N, C] of image embeddings to each class: the mean embedding of its name in every template."""
    prompts = encode_texts([template.format(name) for name in classes for template in templates])
    means = prompts.view(len(classes), len(templates), -1).mean(1)
    return images @ unit_rows(means).T


def retrieval(
    images: Tensor, texts: Tensor, held_out: ImageTextPairs, baseline: TfidfPixels | None
) -> list[PairFigure]:
    """R@1, 5, 10 both ways over all held-out pairs, then R@1 of every named subset among all of them."""
    n = len(held_out)
    ways = {
        "text->image": (texts @ images.T, baseline.text_to_image() if baseline else None),
        "image->text": (images @ texts.T, baseline.image_to_text() if baseline else None),
    }
    figures = []
    for k in (1, 5, 10):
        for way, (ours, theirs) in ways.items():
            trivial = recall(theirs, k) if theirs is not None else None
            note = f"all {n} held-out pairs"
            figures.append(PairFigure(f"{way} R@{k}", recall(ours, k), trivial, min(1.0, k / n), note=note))
    for subset in dict.fromkeys(held_out.subsets or []):
        chosen = torch.tensor([label == subset for label in held_out.subsets or []])
        for way, (ours, theirs) in ways.items():
            trivial = recall(theirs, 1, chosen) if theirs is not None else None
            name, note = f"{subset}: {way} R@1", f"{int(chosen.sum())} queries among all pairs"
            figures.append(PairFigure(name, recall(ours, 1, chosen), trivial, 1 / n, note=note))
    return figures


def categories(
    images: Tensor, encode_texts: EncodeTexts, held_out: ImageTextPairs, baseline: TfidfPixels | None, *,
    supervised: bool,
) -> list[PairFigure]:  # fmt: skip
    """Zero-shot classification into the data's categories as balanced accuracy: the majority class gains nothing."""
    labels = held_out.categories or []
    known = [i for i, label in enumerate(labels) if label]
    classes = sorted({labels[i] for i in known})
    if len(classes) < 2:
        return []
    truth = np.array([classes.index(labels[i]) for i in known])
    guess = zero_shot(images[known], encode_texts, classes).argmax(1).numpy()
    are_captions = labels == held_out.captions
    note = f"{len(known)} images{_SUPERVISED if supervised and not are_captions else ''}"
    trivial = None
    if baseline is not None:
        own = baseline.train.categories or []
        found = [own[int(baseline.nearest[i])] for i in known]
        trivial = float(
            np.mean([np.mean([found[j] == name for j in np.flatnonzero(truth == c)]) for c, name in enumerate(classes)])
        )
    name = f"{len(classes)} captions as classes, balanced"
    if not are_captions:
        name = f"zero-shot {len(classes)} categories, balanced"
    from sklearn.metrics import balanced_accuracy_score

    score, chance = float(balanced_accuracy_score(truth, guess)), 1 / len(classes)
    return [PairFigure(name, score, trivial, chance, chance, note)]


def flags(
    images: Tensor, encode_texts: EncodeTexts, held_out: ImageTextPairs, baseline: TfidfPixels, supervised: bool
) -> PairFigure:
    """How well the prompt "Flags" ranks flags before everything else, as the area under the ROC curve."""
    truth = np.array([label == "Flags" for label in held_out.categories or []])
    score = zero_shot(images, encode_texts, ["Flags"])[:, 0]
    is_flag = torch.tensor([label == "Flags" for label in baseline.train.categories or []])
    trivial = baseline.pixels[:, is_flag].amax(1) - baseline.pixels[:, ~is_flag].amax(1)
    note = f"{int(truth.sum())} flags{_SUPERVISED if supervised else ''}"
    from sklearn.metrics import roc_auc_score

    ours, theirs = float(roc_auc_score(truth, score)), float(roc_auc_score(truth, trivial))
    return PairFigure("flag or not, AUC", ours, theirs, 0.5, 0.5, note)


def skin_tone(images: Tensor, encode_texts: EncodeTexts, held_out: ImageTextPairs, baseline: TfidfPixels) -> PairFigure:
    """Zero-shot tone of five: which of an emoji's own caption and its four with another tone lies nearest."""
    tones = [openmoji.tone_of(caption) for caption in held_out.captions]
    known = [(i, tone) for i, tone in enumerate(tones) if tone is not None]
    options = [[openmoji.with_tone(held_out.captions[i], t) for t in range(len(openmoji.TONES))] for i, _ in known]
    texts = encode_texts([caption for captions in options for caption in captions])
    similarity = (texts.view(len(known), len(openmoji.TONES), -1) @ images[[i for i, _ in known], :, None])[..., 0]
    truth = torch.tensor([tone for _, tone in known])
    ours = float((similarity.argmax(1) == truth).float().mean())
    theirs = float((baseline.tones_by_colour([i for i, _ in known]) == truth).float().mean())
    majority = Counter(truth.tolist()).most_common(1)[0][1] / len(known)
    note = f"{len(known)} images, tone word swapped; baseline: colours"
    return PairFigure("zero-shot skin tone of five", ours, theirs, 1 / len(openmoji.TONES), majority, note)


def report_card(
    embedder: Embedder, train: ImageTextPairs | None, held_out: ImageTextPairs, supervised: bool, faults: Faults
) -> tuple[list[PairFigure], Tensor, ImageTextPairs]:
    """Every figure that the data allows, and the similarity [N, N] of the held-out captions to the held-out images.

    Returned last are the pairs that these are of: those whose images can be read. `faults` is told of the others.
    """
    images, held_out = embedder.images(held_out, faults)
    if not len(held_out):
        return [], images, held_out
    texts = embedder.texts(held_out.captions)
    drawn = train is not None and isinstance(train.images, Tensor)
    embedder.stages.plan(1 + drawn)
    if drawn:
        embedder.stages.begin("baseline")
    baseline = TfidfPixels(train, held_out, embedder.size) if drawn and train else None
    embedder.stages.begin("figures")
    is_gallery = len(set(held_out.captions)) == len(held_out)  # captions that name classes have many right answers
    figures = retrieval(images, texts, held_out, baseline) if is_gallery else []
    if baseline is not None:
        figures.append(skin_tone(images, embedder.texts, held_out, baseline))
    figures += categories(images, embedder.texts, held_out, baseline, supervised=supervised)
    if baseline is not None:
        figures.append(flags(images, embedder.texts, held_out, baseline, supervised))
    return figures, texts @ images.T, held_out
