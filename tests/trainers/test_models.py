"""Towers and tokenizers."""

from __future__ import annotations

import pytest
import torch

from ssl_kernels.trainers import models
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.models import ImageTower, NGramTokenizer, NGramTower, TowerConfig, text_tower, tokenizer


@pytest.mark.parametrize(
    ("name", "size"), [("tiny-resnet", 16), ("tiny-resnet", 32), ("resnet10t", 32), ("vit_tiny_patch16_224", 32)]
)
def test_image_towers_embed_images_of_the_asked_size(name: str, size: int) -> None:
    torch.manual_seed(0)
    tower = ImageTower(name, size, 8)
    assert tower.training
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    embeddings = tower.eval()(images)
    assert embeddings.shape == (3, 8)
    assert embeddings.isfinite().all()
    assert not torch.equal(embeddings[0], embeddings[1])
    assert torch.allclose(embeddings[1:], tower(images[1:]), atol=1e-5)


def test_a_white_ground_is_fed_as_zero_when_inverted() -> None:
    white = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
    fed = []
    for inverted in (True, False):
        tower = ImageTower("tiny-resnet", 16, 4, inverted=inverted)
        tower.trunk.stem.register_forward_pre_hook(lambda module, args: fed.append(args[0]))
        tower(white)
    assert (fed[0] == 0).all()
    assert torch.allclose(fed[1], torch.full_like(fed[1], 2.0))


@pytest.mark.parametrize(
    ("name", "size", "pretrained", "message"),
    [
        ("no_such_net", 32, False, r"--image-model: timm has no model 'no_such_net'"),
        ("tiny-resnet", 30, False, r"--image-size: tiny-resnet needs a multiple of 8, got 30"),
        ("tiny-resnet", 32, True, r"--pretrained: tiny-resnet has no pretrained weights"),
        (
            "vit_tiny_patch16_224",
            8,
            False,
            r"--image-size: vit_tiny_patch16_224 cuts patches of 16 pixels, which do not divide 8",
        ),
    ],
)
def test_an_impossible_tower_is_refused(name: str, size: int, pretrained: bool, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        ImageTower(name, size, 8, pretrained=pretrained)
    assert "\n" not in str(error.value)


def test_a_locked_trunk_is_in_evaluation_mode_and_has_no_gradient() -> None:
    tower = ImageTower("tiny-resnet", 16, 4, locked=True).train()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    tower(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)).square().sum().backward()
    assert all(parameter.grad is None for parameter in tower.trunk.parameters())
    assert tower.head.weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items()), "statistics moved"


def test_ngram_buckets_are_stable_and_ignore_the_batch() -> None:
    """The hash decides which weights a word uses: another hash would make every checkpoint useless."""
    tokenize = NGramTokenizer()
    alone, both = tokenize(["Red apple"]), tokenize(["", "red APPLE"])
    assert alone["tokens"].tolist()[:5] == [8801, 5024, 4804, 6982, 14768]
    assert both["tokens"][both["offsets"][1] :].tolist() == alone["tokens"].tolist()
    assert int(alone["tokens"].max()) < 16_384
    # 2 words, 1 pair, 2 places; 3 + 2 grams of <red> and 5 + 4 of <apple>
    assert len(alone["tokens"]) == 2 + 1 + 2 + 5 + 9


def test_the_ngram_tower_tells_word_order() -> None:
    torch.manual_seed(0)
    tower, tokenize = NGramTower(8), NGramTokenizer()
    light_first, dark_first = tower(**tokenize(["handshake light dark", "handshake dark light"]))
    assert not torch.allclose(light_first, dark_first)


def test_the_transformer_reads_open_clip_tokens() -> None:
    config = TowerConfig(text_model="transformer", text_width=64, text_layers=1, context_length=12, dim=8)
    config.check_towers()
    tokens = tokenizer(config)(["a red apple", "a red apple", "two dogs " * 40])
    assert tokens["text"].shape == (3, 12)
    torch.manual_seed(0)
    embeddings = text_tower(config)(**tokens)
    assert embeddings.shape == (3, 8)
    assert torch.allclose(embeddings[0], embeddings[1])
    assert not torch.allclose(embeddings[0], embeddings[2])


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"dim": 0}, "--dim"), ({"text_width": 100}, "--text-width"), ({"image_lr_factor": 1.5}, "--image-lr-factor"),
     ({"context_length": 1}, "--context-length"), ({"text_layers": 0}, "--text-layers")],
)  # fmt: skip
def test_bad_values_are_named(options: dict[str, float], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        TowerConfig(**options).check_towers()  # type: ignore[arg-type]


def test_the_pieces_of_a_caption_are_cached() -> None:
    models._bag.cache_clear()
    NGramTokenizer()(["one", "two", "one"])
    assert models._bag.cache_info().hits == 1
