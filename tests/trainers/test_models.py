"""Towers and tokenizers."""

from __future__ import annotations

import pytest
import torch
from memory import saved_bytes
from timm.models import vision_transformer
from torch import Tensor, nn

from ssl_kernels.trainers import image_towers, text_towers
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.models import TowerConfig, image_tower, text_tower, tokenizer
from ssl_kernels.trainers.text_towers import NGramTokenizer, NGramTower


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


# A class token; with registers; with a distillation token; registers alone; no prefix at all.
VITS = {
    "test_vit": (1, True), "vit_small_patch16_dinov3": (5, True), "deit_tiny_distilled_patch16_224": (2, True),
    "test_vit2": (1, False), "test_vit_relpos": (0, False),
}  # fmt: skip


def test_dinotxt_embeds_the_class_token_beside_the_mean_of_the_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks, norm and projection out of the way, for every kind of prefix that timm's ViTs have."""
    monkeypatch.setattr(vision_transformer, "Block", lambda *_, **__: nn.Identity())
    monkeypatch.setattr(nn, "LayerNorm", lambda *_, **__: nn.Identity())
    for name, (prefix, has_class) in VITS.items():
        tokens = torch.randn(3, prefix + 4, 8)
        trunk = nn.Module()
        trunk.num_features, trunk.num_prefix_tokens = 8, prefix  # type: ignore[assignment]
        trunk.cls_token = nn.Parameter(torch.zeros(1)) if has_class else None  # type: ignore[assignment]
        head = image_towers.DinoTxtHead(trunk, 5)
        patches = tokens[:, prefix:].mean(1)
        expected = torch.cat([tokens[:, 0], patches], 1) if has_class else patches
        assert torch.allclose(head(tokens), expected @ head.projection.weight.T, atol=1e-6), name


@pytest.mark.parametrize(("name", "prefix", "has_class"), [(name, *kind) for name, kind in VITS.items()])
def test_dinotxt_takes_any_vit(name: str, prefix: int, has_class: bool) -> None:
    torch.manual_seed(0)
    tower = ImageTower(name, 32, 8, head="dinotxt").eval()
    assert (tower.head.prefix, tower.head.has_class) == (prefix, has_class)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    embeddings = tower(images)
    assert embeddings.shape == (3, 8)
    assert torch.allclose(embeddings[1:], tower(images[1:]), atol=1e-5)
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-4
    embeddings.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.head.parameters())

    # The order of patches means nothing above the trunk, where they lie already known; the prefix is no patch.
    tokens = torch.randn(2, prefix + 4, tower.trunk.num_features)
    order = [*range(prefix), *(prefix + i for i in (2, 0, 3, 1))]
    assert torch.allclose(tower.head(tokens), tower.head(tokens[:, order]), atol=1e-5)
    if prefix:
        order = [prefix, *range(1, prefix), 0, *range(prefix + 1, prefix + 4)]
        assert not torch.allclose(tower.head(tokens), tower.head(tokens[:, order]), atol=1e-3)


@pytest.mark.parametrize("name", ["tiny-resnet", "resnet10t", "swin_tiny_patch4_window7_224"])
def test_dinotxt_refuses_a_trunk_without_patch_tokens(name: str) -> None:
    with pytest.raises(
        UserError, match=f"--image-head: dinotxt reads the patch tokens of .* which {name} lacks"
    ) as error:
        ImageTower(name, 224, 8, head="dinotxt")
    assert "vit_small_patch14_dinov2" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "head"), [("resnet10t", "linear"), ("test_vit", "linear"), ("test_vit", "dinotxt")])
def test_a_locked_trunk_keeps_nothing_for_backward(name: str, head: str) -> None:
    """What is saved is what the head alone saves, of features that have no history."""
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    saved = {}
    for locked in (True, False):
        tower = ImageTower(name, 64, 8, locked=locked, head=head).train()
        seen: list[Tensor] = []
        tower.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # noqa: B023
        with saved_bytes() as sizes:
            embeddings = tower(images)
        saved[locked] = sum(sizes)
        assert embeddings.requires_grad
        assert seen[0].requires_grad != locked
        if locked:
            with saved_bytes() as sizes:
                again = tower.head(seen[0])
            assert saved[locked] == sum(sizes)
            assert torch.equal(again, embeddings)
    assert saved[True] < saved[False] / 2


def test_a_configuration_names_its_image_tower() -> None:
    for options, locked in (({}, False), ({"lock_image": True}, True), ({"image_lr_factor": 0.0}, True)):
        config = TowerConfig(image_model="test_vit", image_head="dinotxt", dim=4, **options)  # type: ignore[arg-type]
        config.check_towers()
        tower = image_tower(config, 32, inverted=True)
        assert tower.locked == locked
        assert isinstance(tower.head, image_towers.DinoTxtHead)
        assert tower.mean.mean() == 1
        assert any(p.requires_grad for p in tower.trunk.parameters()) != locked


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


def test_patches_that_overlap_need_not_divide_the_image() -> None:
    tower = ImageTower("pvt_v2_b0", 64, 4)  # patches of 7 pixels, 4 apart
    assert tower(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 4)


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
    text_towers._bag.cache_clear()
    NGramTokenizer()(["one", "two", "one"])
    assert text_towers._bag.cache_info().hits == 1
