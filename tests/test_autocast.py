"""Mixed dtypes under autocast: every op casts first and checks then, as the formulas of the peers do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import ssl_kernels as S
import ssl_kernels.functional as K
from ssl_kernels.ops._checks import autocast_features

KEYS = normalize(torch.linspace(-1, 1, 40).sin().view(5, 8), dim=1)

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda x, y: K.sigmoid_contrastive_loss(x, y, 10.0, -5.0),
    "clip": lambda x, y: K.clip_loss(x, y, 10.0),
    "rows": lambda x, y: K.row_softmax_loss(x, y, 10.0),
    "row_lse": lambda x, y: K.row_lse(x, y, 10.0).mean(),
    "nt_xent": lambda x, y: K.nt_xent_loss(x, y, 0.5),
    "info_nce": lambda x, y: K.info_nce_loss(x, y, KEYS, 5.0),
    "albef": lambda x, y: K.albef_contrastive_loss(x, y, y.detach(), x.detach(), KEYS, KEYS.half(), 5.0),
    "dino": lambda x, y: K.dino_loss([x, y, x], [KEYS[:4].to(x.dtype), KEYS[1:].to(y.dtype)]),
    "ibot": lambda x, y: K.ibot_patch_loss(x, y.detach()),
    "vicreg": K.vicreg_loss,
    "barlow_twins": K.barlow_twins_loss,
    "NTXentLoss": S.NTXentLoss(0.5),
    "NTXentLoss with a bank": lambda x, y: S.NTXentLoss(0.5, (64, 8))(x, y),
    "VICRegLoss": S.VICRegLoss(),
    "BarlowTwinsLoss": S.BarlowTwinsLoss(),
    "DINOLoss": lambda x, y: S.DINOLoss(8)([KEYS[:4].to(x.dtype), KEYS[1:].to(y.dtype)], [x, y, x]),
}


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
@pytest.mark.parametrize("name", LOSSES)
def test_mixed_dtypes_under_autocast(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, y = torch.randn(2, 4, 8)
    leaves = [t.to(dtype).requires_grad_() for t, dtype in zip((x, y), dtypes, strict=True)]
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](*leaves)
    torch.manual_seed(0)
    expected = LOSSES[name](*wide)
    torch.testing.assert_close(loss.float(), expected, rtol=1e-2, atol=1e-2)
    loss.backward()
    expected.backward()
    for leaf, other in zip(leaves, wide, strict=True):
        assert (leaf.grad is None) == (other.grad is None)
        if leaf.grad is not None:
            assert leaf.grad.dtype == leaf.dtype
            torch.testing.assert_close(leaf.grad.float(), other.grad, rtol=5e-2, atol=0.02 * other.grad.abs().max())


def test_mixed_dtypes_without_autocast_are_refused() -> None:
    with pytest.raises(TypeError, match=r"z1: expected the dtype of z0 \(torch.float16\), got torch.float32"):
        K.nt_xent_loss(torch.ones(2, 2).half(), torch.ones(2, 2), 0.5)
    with pytest.raises(TypeError, match=r"student\[1\]: expected the dtype of student\[0\]"):
        K.dino_loss([torch.ones(2, 2).half(), torch.ones(2, 2)], torch.ones(1, 2, 2))


def test_rows_are_normalised_before_autocast_narrows_them() -> None:
    x = 2e5 * torch.randn(4, 8)
    with torch.autocast("cpu", torch.float16):
        loss = K.nt_xent_loss(x, x.flip(0).bfloat16(), 0.5)
    torch.testing.assert_close(loss, K.nt_xent_loss(x, x.flip(0).bfloat16().float(), 0.5), rtol=1e-3, atol=0)


def test_nobody_asks_whether_cpus_and_gpus_have_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile of older versions cannot trace the question."""

    def asked(device: str) -> bool:
        raise AssertionError(f"asked for {device}")

    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)
    x, y = torch.randn(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_features(x, y)[0].dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="asked for meta"):
        autocast_features(x.to("meta"))
