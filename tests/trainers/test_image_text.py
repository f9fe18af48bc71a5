"""Retrieval, zero-shot figures and baselines on cases whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.trainers.data import openmoji
from ssl_kernels.trainers.data.pairs import TEMPLATES, ImageTextPairs
from ssl_kernels.trainers.evaluation import image_text
from ssl_kernels.trainers.evaluation.baseline import TfidfPixels


def test_recall_of_known_similarities() -> None:
    similarity = torch.tensor([[3.0, 1, 2], [5, 4, 3], [9, 8, 7]])
    assert [image_text.recall(similarity, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert image_text.recall(similarity, 1, torch.tensor([False, True, True])) == 0
    assert image_text.recall(torch.eye(5), 1) == 1


def test_ties_count_as_chance() -> None:
    assert image_text.recall(torch.zeros(8, 8), 1) == pytest.approx(1 / 8)
    assert image_text.recall(torch.zeros(8, 8), 5) == pytest.approx(5 / 8)
    assert image_text.recall(torch.full((4, 4), math.nan), 1) == 0
    mixed = torch.tensor([[1.0, 1, 0], [2, 1, 1], [0, 0, 1]])
    assert image_text.recall(mixed, 1) == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert image_text.recall(mixed, 2) == pytest.approx((1 + 1 / 2 + 1) / 3)


WORDS = ["cat", "dog", *openmoji.TONES, "skin", "tone", "Flags", "Objects", "man", "boy", "kite"]


def encode(texts: object) -> Tensor:
    """Counts of known words, normalised: an encoder that reads."""
    rows = []
    for text in texts:  # type: ignore[attr-defined]
        words = text.split()
        rows.append([float(words.count(word)) for word in WORDS])
    return F.normalize(torch.tensor(rows) + 1e-6, dim=-1)


def test_zero_shot_averages_the_templates() -> None:
    images = encode(["cat", "dog", "dog"])
    similarity = image_text.zero_shot(images, encode, ["dog", "cat"])
    assert similarity.argmax(1).tolist() == [1, 0, 0]
    by_hand = F.normalize(encode([t.format("dog") for t in TEMPLATES]).mean(0), dim=0)
    assert torch.allclose(similarity[:, 0], images @ by_hand)


@pytest.fixture
def emoji() -> tuple[ImageTextPairs, ImageTextPairs]:
    """Grey squares whose brightness is the skin tone, and flags; a held-out image resembles a training image."""

    def make(names: list[str], shift: int) -> ImageTextPairs:
        captions, images, categories = [], [], []
        for name in names:
            for t, tone in enumerate(openmoji.TONES):
                captions.append(f"{name} {tone} skin tone")
                image = torch.full((3, 16, 16), 255.0)
                image[:, 4 : 12 + shift, 4:12] = 40.0 * t
                images.append(image)
                categories.append("Objects")
        for i, flag in enumerate(("kite", "dog", "cat")):
            captions.append(f"{flag} {shift}")
            images.append(torch.full((3, 16, 16), 255.0))
            images[-1][i, :, shift:8] = 0
            categories.append("Flags")
        return ImageTextPairs(torch.stack(images).to(torch.uint8), captions, categories)

    return make(["man"], 1), make(["boy"], 0)


def test_figures_of_a_perfect_model_and_of_the_baseline(emoji: tuple[ImageTextPairs, ImageTextPairs]) -> None:
    train, held_out = emoji
    baseline = TfidfPixels(train, held_out, 16)
    perfect = encode(held_out.captions)
    tone = image_text.skin_tone(perfect, encode, held_out, baseline)
    assert tone.model == 1
    assert tone.baseline == 1  # grey squares of another shape: colours alone tell the tone
    assert tone.chance == tone.majority == pytest.approx(0.2)

    flags = image_text.flags(encode(held_out.categories), encode, held_out, baseline, supervised=True)
    assert flags.model == 1
    assert flags.baseline is not None
    assert "supervised" in flags.note
    classes = image_text.categories(encode(held_out.categories), encode, held_out, baseline, supervised=False)
    assert [(f.model, f.baseline, f.chance, f.majority) for f in classes] == [(1, 1, 0.5, 0.5)]
    assert "supervised" not in classes[0].note

    held_out.subsets = ["combinations"] * 5 + ["novel concepts"] * 3
    figures = {f.name: f for f in image_text.retrieval(perfect, perfect, held_out, baseline)}
    assert figures["text->image R@1"].model == figures["combinations: image->text R@1"].model == 1
    assert figures["text->image R@5"].chance == 5 / 8
    assert figures["combinations: text->image R@1"].note.startswith("5 queries")
    assert figures["combinations: text->image R@1"].baseline == pytest.approx(0.6)


def test_wrong_models_score_what_they_deserve(emoji: tuple[ImageTextPairs, ImageTextPairs]) -> None:
    train, held_out = emoji
    baseline = TfidfPixels(train, held_out, 16)
    one_tone = encode(["boy light skin tone"] * len(held_out))
    assert image_text.skin_tone(one_tone, encode, held_out, baseline).model == pytest.approx(0.2)
    swapped = encode(["Objects" if c == "Flags" else "Flags" for c in held_out.categories or []])
    assert image_text.flags(swapped, encode, held_out, baseline, supervised=False).model == 0
    majority = encode(["Objects"] * len(held_out))
    assert image_text.categories(majority, encode, held_out, None, supervised=False)[0].model == 0.5


def test_a_model_cannot_gain_on_the_baseline_by_copying_training_pairs(
    emoji: tuple[ImageTextPairs, ImageTextPairs],
) -> None:
    """The baseline goes by way of training pairs only: shuffling the held-out captions must break it."""
    train, held_out = emoji
    right = TfidfPixels(train, held_out, 16)
    assert isinstance(held_out.images, Tensor)
    wrong = TfidfPixels(train, ImageTextPairs(held_out.images.flip(0), held_out.captions), 16)
    assert image_text.recall(right.text_to_image(), 1) > 0.6 > 0.3 > image_text.recall(wrong.text_to_image(), 1)
    assert image_text.recall(right.image_to_text(), 1) > image_text.recall(wrong.image_to_text(), 1)
