"""Masked patches: their blocks, and what a vision transformer sees of them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_kernels.trainers.masking import PatchMask, block_masks
from ssl_kernels.trainers.trunks import tiny_vit


@given(
    n=st.integers(2, 40), height=st.integers(1, 9), width=st.integers(1, 9), low=st.floats(0.05, 0.9),
    probability=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_mask_is_one_block(n: int, height: int, width: int, low: float, probability: float, seed: int) -> None:
    torch.manual_seed(seed)
    masks = block_masks(n, (height, width), (low, min(0.95, low + 0.2)), probability)
    assert masks.shape == (n, height, width)
    assert int(masks.flatten(1).any(1).sum()) == max(2, round(probability * n))
    for mask in masks:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if len(rows):
            assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert int(mask.sum()) == len(rows) * len(columns)


def test_blocks_have_the_share_and_come_everywhere() -> None:
    torch.manual_seed(0)
    masks = block_masks(20_000, (20, 20), (0.1, 0.3), 1.0).float()
    shares = masks.mean((1, 2))
    assert 0.08 < shares.min() < 0.11
    assert 0.28 < shares.max() < 0.34
    assert shares.mean().item() == pytest.approx(0.2, abs=0.005)
    tall = masks.any(2).sum(1) / masks.any(1).sum(1)
    assert tall.log().mean().item() == pytest.approx(0, abs=0.02)
    assert tall.max() > 2.5
    assert tall.min() < 0.4
    corners = masks.mean(0)
    assert 0.005 < corners[0, 0] < corners[10, 10]
    assert torch.allclose(corners, corners.flip(0, 1), atol=0.02)


def test_the_generator_decides() -> None:
    torch.manual_seed(3)
    one, other = block_masks(9, (8, 8), (0.1, 0.5), 0.5), block_masks(9, (8, 8), (0.1, 0.5), 0.5)
    torch.manual_seed(3)
    assert torch.equal(block_masks(9, (8, 8), (0.1, 0.5), 0.5), one)
    assert not torch.equal(one, other)
    masked = torch.stack([block_masks(9, (8, 8), (0.1, 0.5), 0.5).flatten(1).any(1) for _ in range(200)])
    assert masked.float().mean(0).sub(4 / 9).abs().max() < 0.15  # no image is masked more often than another


@pytest.mark.parametrize("any_size", [False, True])
def test_a_hidden_patch_has_no_influence(any_size: bool) -> None:
    """What is painted over hidden patches changes nothing, over others something; and the token is what is seen."""
    torch.manual_seed(0)
    trunk = tiny_vit(16, any_size).eval()
    mask = PatchMask(trunk)
    masks = block_masks(3, (4, 4), (0.2, 0.5), 1.0)
    images = torch.randn(3, 3, 16, 16)
    hidden = masks.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    painted = torch.where(hidden, torch.randn_like(images), images)
    with mask.over(masks):
        assert torch.equal(trunk(images), trunk(painted))
        assert not torch.equal(trunk(images), trunk(torch.where(hidden, images, torch.randn_like(images))))
        before = trunk(images)
        with torch.no_grad():
            mask.token.add_(1)
        assert not torch.equal(trunk(images), before)
    assert not torch.allclose(trunk(images), trunk(painted))
    with mask.over(None):
        assert torch.equal(trunk(images), trunk(images.clone()))


def test_a_copy_hides_on_its_own() -> None:
    """The teacher is a copy of the student, which must not be blinded with it."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"trunk": tiny_vit(16, True)}).eval()
    net["mask"] = PatchMask(net["trunk"])
    twin = copy.deepcopy(net)
    images = torch.randn(2, 3, 16, 16)
    clear = net["trunk"](images)
    with net["mask"].over(torch.ones(2, 4, 4, dtype=torch.bool)):
        assert torch.equal(twin["trunk"](images), clear)
        assert not torch.equal(net["trunk"](images), clear)
    with torch.no_grad():
        twin["mask"].token.add_(1)
    masks = torch.ones(2, 4, 4, dtype=torch.bool)
    with net["mask"].over(masks), twin["mask"].over(masks):
        assert not torch.equal(twin["trunk"](images), net["trunk"](images))


def test_an_error_leaves_nothing_hidden() -> None:
    mask = PatchMask(tiny_vit(16, True))
    with pytest.raises(RuntimeError, match="stop"), mask.over(torch.ones(1, 4, 4, dtype=torch.bool)):
        raise RuntimeError("stop")
    assert mask.hidden is None
