"""The DINO trainer: its losses, its schedules, its teacher and centre, and runs of both versions."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import logged, patchworks, same_state
from PIL import Image
from torch import Tensor, nn

from ssl_kernels.trainers import dino
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.data.image_sets import Images
from ssl_kernels.trainers.data.views import DrawingView, PhotoView, ViewBatches
from ssl_kernels.trainers.dino import DINO, DINOv2
from ssl_kernels.trainers.dino_config import DINOConfig
from ssl_kernels.trainers.dino_students import MaskedStudent, Student
from ssl_kernels.trainers.evaluation import features
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.masking import block_masks
from ssl_kernels.trainers.optim import parameter_groups
from ssl_kernels.trainers.trunks import TinyResNet

BATCH, PROTOTYPES, STEPS = 6, 10, 20
SETTINGS = DINOConfig(
    data="mnist", image_size=16, local_size=8, local_crops=2, hidden=12, dim=5, prototypes=PROTOTYPES, epochs=4,
    warmup_teacher_epochs=2, teacher_temp=0.07, centering="mean", freeze_last_layer=1, momentum=0.9, weight_decay=0.04,
)  # fmt: skip
SETTINGS_V2 = dataclasses.replace(SETTINGS, version=2, image_model="tiny-vit", norm=False, centering="sinkhorn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty patchworks in three tints, a folder to a tint."""
    return patchworks(tmp_path_factory.mktemp("patchworks"))


@pytest.fixture
def small(folder: Path) -> list[str]:
    """Arguments of a run over the patchworks that takes a second or two."""
    return [
        *("--data", str(folder), "--held-out", "0.2", "--image-size", "8", "--local-size", "8", "--local-crops", "1"),
        *("--batch-size", "8", "--epochs", "3", "--hidden", "16", "--dim", "8", "--prototypes", "12"),
        *("--accelerator", "cpu"),
    ]


V2 = ["--version", "2", "--image-model", "tiny-vit"]
VERSIONS = pytest.mark.parametrize("version", [[], V2], ids=["v1", "v2"])


def views(seed: int = 0, local: int = 2) -> dict[str, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [16, 16] + [8] * local
    shapes = [(BATCH, 3, size, size) for size in sizes]
    return {"views": tuple(torch.randint(0, 256, s, dtype=torch.uint8, generator=generator) for s in shapes)}


def perturb(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def small_dino(settings: DINOConfig = SETTINGS) -> DINO:
    torch.manual_seed(1)
    model = DINO(Student(settings), settings, STEPS).double()
    perturb(model.encoder)  # or student and teacher would be one net
    with torch.no_grad():
        model.loss.center.copy_(0.1 * torch.randn(PROTOTYPES))
    model.before_step(3, [])
    return model


def small_dino_v2(**changes: Any) -> DINOv2:
    torch.manual_seed(1)
    settings = dataclasses.replace(SETTINGS_V2, **changes)
    model = DINOv2(MaskedStudent(settings), settings, STEPS).double()
    perturb(model.encoder)
    model.before_step(3, [])
    return model


def cross_entropy(t: Tensor, s: Tensor, center: Tensor, teacher_temp: float) -> Tensor:
    p = ((t - center) / teacher_temp).softmax(-1)
    return -(p * (s / SETTINGS.temperature).log_softmax(-1)).sum(-1)


def gradients_agree(model: nn.Module, loss: Tensor, expected: Tensor) -> None:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    assert all(name.startswith("encoder.") for name in names)
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    dense = torch.autograd.grad(expected, parameters, allow_unused=True)
    for name, a, b in zip(names, ours, dense, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or (a - b).norm() <= 1e-5 * b.norm() + 1e-9, name  # the centre is kept in float32


def test_the_loss_is_the_paper_s_over_pairs_of_unlike_views() -> None:
    """In evaluation mode, where batches do not matter, one pair at a time in float64."""
    model = small_dino().eval()
    batch = views()
    loss, metrics = model(batch)
    t = [model.teacher.module.head(model.teacher.module.features(view)) for view in batch["views"][:2]]
    s = [model.encoder.head(model.encoder.features(view)) for view in batch["views"]]
    temp = 0.04 + (0.07 - 0.04) * 2 / 10  # the third step of a warm-up of ten
    pairs = [(i, j) for i in range(2) for j in range(4) if i != j]
    expected = torch.stack([cross_entropy(t[i], s[j], model.loss.center[0], temp).mean() for i, j in pairs]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients_agree(model, loss, expected)
    p = ((torch.cat(t) - model.loss.center[0]) / temp).softmax(1)
    entropy = torch.special.entr(p).sum(1).mean().item()
    assert metrics["teacher_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["teacher_entropy_share"] == pytest.approx(entropy / math.log(PROTOTYPES), rel=1e-4)
    assert metrics["kl"] == pytest.approx(loss.item() - entropy, rel=1e-3)
    center = model.loss.center - model.loss.center.mean()
    assert metrics["center_norm"] == pytest.approx(center.norm().item(), rel=1e-5)
    assert metrics["teacher_temp"] == pytest.approx(temp)


def sinkhorn(logits: Tensor, temp: float) -> Tensor:
    """The assignment by alternating normalisation of columns and rows."""
    q = (logits / temp).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q


def test_sinkhorn_knopp_balances_the_batch_s_prototypes() -> None:
    model = small_dino(dataclasses.replace(SETTINGS, centering="sinkhorn")).eval()
    batch = views()
    loss, metrics = model(batch)
    t = torch.cat([model.teacher.module.head(model.teacher.module.features(view)) for view in batch["views"][:2]])
    q = sinkhorn(t, model.teacher_temp).view(2, BATCH, -1)
    s = [model.encoder.head(model.encoder.features(view)) / SETTINGS.temperature for view in batch["views"]]
    pairs = [(i, j) for i in range(2) for j in range(4) if i != j]
    expected = torch.stack([-(q[i] * s[j].log_softmax(1)).sum(1).mean() for i, j in pairs]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients_agree(model, loss, expected)
    assert metrics["marginal_entropy"] == pytest.approx(torch.special.entr(q.mean((0, 1))).sum().item(), rel=1e-4)


@pytest.mark.parametrize("separate", [False, True])
def test_version_two_adds_patches_and_koleo_and_balances(separate: bool) -> None:
    """Every term by hand in float64: Sinkhorn-Knopp as alternating normalisation, iBOT one image at a time."""
    model = small_dino_v2(separate_heads=separate, ibot_weight=0.7, koleo_weight=0.3).eval()
    batch, temp = views(), model.teacher_temp
    torch.manual_seed(5)
    loss, metrics = model(batch)
    torch.manual_seed(5)
    masks = block_masks(2 * BATCH, (4, 4), SETTINGS.mask_share, SETTINGS.mask_probability)

    def tokens(net: Any, hide: bool) -> Tensor:
        with net.mask.over(masks if hide else None):
            out: Tensor = net.trunk.forward_features(net.normalised(torch.cat(batch["views"][:2])))
        return out

    student, teacher = model.encoder, model.teacher.module
    seen, whole = tokens(student, True), tokens(teacher, False)
    q = sinkhorn(teacher.head(whole[:, 0]), temp).view(2, BATCH, PROTOTYPES)
    logits = [student.head(x) for x in (*seen[:, 0].chunk(2), *(student.features(v) for v in batch["views"][2:]))]
    log_p = [(x / SETTINGS.temperature).log_softmax(1) for x in logits]
    pairs = [(i, j) for i in range(2) for j in range(4) if i != j]
    expected = torch.stack([-(q[i] * log_p[j]).sum(1).mean() for i, j in pairs]).mean()
    flat = masks.flatten(1)
    q_patches = sinkhorn(teacher.patch_head(whole[:, 1:][flat]), temp)
    log_patches = (student.patch_head(seen[:, 1:][flat]) / SETTINGS.temperature).log_softmax(1)
    entropies = torch.split(-(q_patches * log_patches).sum(1), flat.sum(1).tolist())
    expected = expected + 0.7 * torch.stack([part.mean() for part in entropies if len(part)]).mean()
    for view in seen[:, 0].chunk(2):
        z = F.normalize(view, dim=1)
        nearest = [min((z[i] - z[j]).norm() for j in range(BATCH) if j != i) for i in range(BATCH)]
        expected = expected - 0.3 * torch.stack(nearest).log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients_agree(model, loss, expected)
    parts = metrics["dino"] + 0.7 * metrics["ibot"] + 0.3 * metrics["koleo"]
    assert parts.item() == pytest.approx(loss.item(), rel=1e-6)
    assert (student.patch_head is student.head) != separate


@pytest.mark.parametrize("make", [small_dino, small_dino_v2])
def test_the_student_learns_and_the_teacher_does_not(make: Callable[[], DINO]) -> None:
    model = make()
    model.before_step(STEPS, [])
    model(views())[0].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("teacher.") or name.endswith("weight_g"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            if not name.endswith("bias"):
                assert parameter.grad.abs().sum() > 0, name


def test_the_schedules_are_those_of_the_step() -> None:
    model = small_dino()
    groups = parameter_groups(model.encoder, 1e-3, 0.04)
    assert [group["weight_decay"] for group in groups] == [0.04, 0.0]
    for number, temp, share, frozen in ((1, 0.04, 0.0, True), (5, 0.052, 4 / 20, True), (6, 0.055, 5 / 20, False),
                                        (11, 0.07, 10 / 20, False), (20, 0.07, 19 / 20, False)):  # fmt: skip
        model.before_step(number, groups)
        assert model.teacher_temp == pytest.approx(temp)
        decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * share)) / 2
        assert [group["weight_decay"] for group in groups] == [pytest.approx(decay), 0.0]
        prototypes = model.encoder.head.last_layer
        prototypes.weight_v.grad = torch.ones_like(prototypes.weight_v)
        model.after_backward(number)
        assert (prototypes.weight_v.grad is None) == frozen
        assert not prototypes.weight_g.requires_grad
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * number / 20)) / 2
        assert model.logged == {
            "teacher_temp": model.teacher_temp, "momentum": pytest.approx(momentum), "weight_decay": decay,
        }  # fmt: skip


def test_centre_and_teacher_advance_once_a_step() -> None:
    """Two micro-batches: the centre moves to the mean over both, and not between them."""
    model = small_dino()
    center = model.loss.center.clone()
    teacher = {name: p.clone() for name, p in model.teacher.module.named_parameters()}
    means = []
    for seed in (1, 2):
        _, t = copy.deepcopy(model).teacher(views(seed)["views"][:2])
        means.append(t.mean((0, 1)))
        model(views(seed))
        assert torch.equal(model.loss.center, center)
        assert all(torch.equal(p, teacher[name]) for name, p in model.teacher.module.named_parameters())
    model.after_step(4)
    expected = 0.9 * center + 0.1 * (means[0] + means[1]) / 2
    moved = model.loss.center.clone()
    assert torch.allclose(moved.flatten(), expected.flatten(), rtol=1e-5)
    m = 1 - 0.1 * (1 + math.cos(math.pi * 4 / STEPS)) / 2
    for name, p in model.encoder.named_parameters():
        expected = m * teacher[name] + (1 - m) * p
        assert torch.allclose(model.teacher.module.get_parameter(name), expected, rtol=1e-6), name
    model.after_step(5)
    assert torch.allclose(model.loss.center, moved), "nothing is left over for the next step"


@pytest.mark.parametrize(
    "make", [small_dino_v2, lambda: small_dino(dataclasses.replace(SETTINGS, centering="sinkhorn"))]
)
def test_sinkhorn_knopp_has_no_moving_centre(make: Callable[[], DINO]) -> None:
    model = make()
    center = model.loss.center.clone()
    model(views())
    model.after_step(1)
    assert torch.equal(model.loss.center, center)


def test_what_is_evaluated_is_the_teacher() -> None:
    model = small_dino()
    assert model.evaluated is model.teacher.module


# -- Data and nets ---------------------------------------------------------------------------------------------------


def images(n: int = 4, size: int = 32) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator))


def test_local_crops_follow_the_large_views_and_leave_them_alone() -> None:
    view = DrawingView(degrees=25, scale=1.25, shift=0.075, shear=0.2)
    options = {"size": 32, "batch_size": 4, "seed": 0}
    plain = ViewBatches(images(), view, **options)[1, 0]["views"]  # type: ignore[arg-type]
    with_crops = ViewBatches(images(), view, crops=(3, 16), **options)[1, 0]["views"]  # type: ignore[arg-type]
    assert [len(plain), len(with_crops)] == [2, 5]
    assert all(torch.equal(a, b) for a, b in zip(plain, with_crops, strict=False))
    assert [tuple(crop.shape) for crop in with_crops[2:]] == [(4, 3, 16, 16)] * 3
    assert not torch.equal(with_crops[2], with_crops[3])


def test_a_local_crop_of_a_drawing_is_half_as_wide() -> None:
    """Columns numbered by their place: a crop that is neither turned nor scaled shows 32 in a row of 64."""
    pixels = torch.arange(64).mul(4).clamp(max=255).to(torch.uint8).expand(50, 3, 64, 64).contiguous()
    still = DrawingView(degrees=0, scale=1, shift=0, shear=0).local()
    crop = still(Images(pixels), range(50), 32, np.random.default_rng(0))[:, 0, 16].float() / 4
    steps = crop[:, 1:] - crop[:, :-1]
    assert torch.allclose(steps, torch.ones(()), atol=0.6)
    assert 0 <= crop[:, 0].min() < 3
    assert 29 < crop[:, 0].max() <= 33
    turned = DrawingView(degrees=5, scale=1.1, shift=0.3, shear=0.1, brightness=0.2, ground=255.0).local()
    assert dataclasses.replace(turned, window=1.0, shift=0.3) == DrawingView(5, 1.1, 0.3, 0.1, 0.2, 255.0)


def test_a_local_crop_of_a_photograph_is_small() -> None:
    assert PhotoView().local().scale == (0.05, 0.25)
    assert PhotoView().scale == (0.2, 1.0)


def test_the_tiny_net_spreads_a_crop_over_the_places_of_the_whole() -> None:
    net = TinyResNet(32).eval()
    crop = torch.randn(2, 3, 16, 16)
    places = net(crop).view(2, 128, 4, 4)
    assert torch.equal(places, net.forward_features(crop).repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(
    ("name", "size", "grid", "attends"),
    [
        ("tiny-resnet", 32, 4, False),
        ("tiny-vit", 32, 8, True),
        ("vit_small_patch14_reg4_dinov2", 28, 2, True),
        ("test_vit2", 32, 2, False),
        ("resnet10t", 64, 2, False),
        ("swin_tiny_patch4_window7_224", 224, 7, False),
    ],
)
def test_maps_keep_their_places(name: str, size: int, grid: int, attends: bool) -> None:
    """What changes in the upper right corner of the image changes that corner of the map most."""
    torch.manual_seed(0)
    tower = ImageTower(name, size, 8, any_size=True).eval()
    one = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    other = one.clone()
    other[:, :, : size // 4, -size // 4 :] = 255 - other[:, :, : size // 4, -size // 4 :]
    with torch.no_grad():
        a, b = tower.feature_map(one), tower.feature_map(other)
        attention = tower.class_attention(one)
    assert a is not None
    assert b is not None
    assert a.shape[-2:] == (grid, grid)
    row, column = divmod(int((a - b).square().sum(1).mean(0).argmax()), grid)
    assert row < grid / 2 <= column
    assert (attention is not None) == attends
    if attention is not None:
        assert attention.shape == (2, 1, grid, grid)
        assert (attention > 0).all()
        assert (attention.sum((1, 2, 3)) < 1).all()  # the class token attends to itself as well


def test_a_net_without_a_map_trains_and_leaves_the_picture_out(small: list[str], tmp_path: Path) -> None:
    run(small, tmp_path, "--image-model", "coat_lite_tiny", "--image-size", "32", "--local-crops", "0",
        "--epochs", "1", "--batch-size", "16")  # fmt: skip
    assert (tmp_path / "summary.json").exists()
    assert not (tmp_path / "features.png").exists()


def test_attention_is_that_of_the_last_block() -> None:
    """Against timm's own unfused attention, of which the matrix is caught on its way."""
    tower = ImageTower("tiny-vit", 16, 8).eval()
    perturb(tower)
    block = tower.trunk.blocks[-1]
    block.attn.fused_attn = False
    caught: list[Tensor] = []
    hook = block.attn.attn_drop.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    attention = tower.class_attention(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8))
    hook.remove()
    assert attention is not None
    assert torch.allclose(attention.flatten(1), caught[0].mean(1)[:, 0, 1:], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("drawn_pictures")
def test_a_picture_of_features_colours_alike_what_is_alike(tmp_path: Path) -> None:
    """Maps of three kinds of places in noise: three colours, and the noise none of them."""
    torch.manual_seed(0)
    kinds = torch.tensor([[0, 1], [1, 2]])
    centres = 5 * torch.randn(3, 7)
    maps = centres[kinds].permute(2, 0, 1).expand(4, 7, 2, 2) + 0.01 * torch.randn(4, 7, 2, 2)
    colours = features.principal_components(maps)
    assert colours.shape == (4, 3, 2, 2)
    assert colours.min() >= 0
    assert colours.max() <= 1
    for i in range(3):
        of_kind = colours.movedim(1, -1)[:, kinds == i, :2].flatten(0, 1)
        assert of_kind.std(0).max() < 0.02
    assert (colours[0, :2, 0, 0] - colours[0, :2, 1, 1]).abs().max() > 0.5
    assert torch.allclose(features.principal_components(maps + 100), colours, atol=0.01)
    assert features.principal_components(maps[:, :2]).shape == (4, 3, 2, 2)
    channels = torch.randn(200, 4, 2, 2) * torch.tensor([1.0, 9.0, 0.1, 3.0]).view(4, 1, 1)
    found = features.principal_components(channels)
    for component, channel in enumerate((1, 3, 0)):  # by falling variance
        pair = torch.stack([found[:, component].flatten(), channels[:, channel].flatten()])
        assert pair.corrcoef()[0, 1].abs() > 0.97
    shown = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    features.plot_features(tmp_path / "features.png", shown, {"features": maps, "attention": maps[:, :1]}, "credit")
    with Image.open(tmp_path / "features.png") as picture:
        width, height = picture.size
        assert len(np.unique(np.array(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert width > height > 200


# -- Runs ------------------------------------------------------------------------------------------------------------


def run(arguments: list[str], output: Path, *more: str) -> Path:
    assert dino.main([*arguments, "--output-dir", str(output), *more]) == 0
    return output


@VERSIONS
@pytest.mark.usefixtures("drawn_pictures")
def test_a_run_learns_and_reports(
    small: list[str], tmp_path: Path, version: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """So short a run needs a teacher that keeps up, and shows as features that spread in fewer directions of error."""
    run(small, tmp_path, *version, "--epochs", "8", "--seed", "3", "--momentum", "0.8")
    records = logged(tmp_path)
    assert len(records) == 48
    assert sum(r["kl"] for r in records[-8:]) < 0.8 * sum(r["kl"] for r in records[6:14])
    for name in ("teacher_entropy", "teacher_entropy_share", "marginal_entropy", "center_norm", "kl", "embedding_rank",
                 "momentum", "teacher_temp", "weight_decay"):  # fmt: skip
        assert all(math.isfinite(record[name]) for record in records), name
    assert all(0 < record["teacher_entropy_share"] <= record["marginal_entropy_share"] + 1e-6 for record in records)
    assert ("ibot" in records[0]) == ("koleo" in records[0]) == bool(version)
    assert records[-1]["momentum"] == 1
    assert records[0]["teacher_temp"] == 0.04
    out = capsys.readouterr().out
    for phrase in (f"DINO v{len(version) // 4 + 1} on", "seed 3", "10 labels a class, 1-NN", "distorted query, 5-NN",
                   "raw + aug", "embedding rank", "teacher entropy share", "center norm", "features.png"):  # fmt: skip
        assert phrase in out
    assert len(json.loads((tmp_path / "summary.json").read_text())["figures"]) == 5
    assert (tmp_path / "features.png").stat().st_size > 5000
    assert (tmp_path / "curves.png").stat().st_size > 1000


@VERSIONS
def test_a_stopped_run_resumes_bit_exactly(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: list[str]
) -> None:
    """Stopped by an error between two checkpoints, in the epoch after the prototypes' release, in the warm-up."""
    settings = [*small, *(version or ["--centering", "mean"]), "--held-out", "0", "--accumulate", "2"]
    settings += ["--checkpoint-every", "4", "--epochs", "4", "--warmup-teacher-epochs", "3"]
    whole, stopped = run(settings, tmp_path / "whole"), tmp_path / "stopped"

    def fail(self: DINO, number: int) -> None:
        if number == 6:
            raise RuntimeError("out of power")
        DINO.after_step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(DINOv2 if version else DINO, "after_step", fail) if version else patch.setattr(
            dino, "DINO", type("DINO", (DINO,), {"after_step": fail})
        )
        assert dino.main([*settings, "--output-dir", str(stopped)]) == 1
    assert "RuntimeError: out of power" in (stopped / "traceback.txt").read_text()
    assert load_checkpoint(stopped / "last.pt")["step"] == 4
    assert dino.main(["--resume", str(stopped)]) == 0
    assert logged(stopped) == logged(whole)
    a, b = load_checkpoint(stopped / "last.pt"), load_checkpoint(whole / "last.pt")
    assert a["step"] == b["step"] == 12
    assert {"loss.center", "teacher.module.head.last_layer.weight_v", "encoder.head.mlp.0.weight"} < b["model"].keys()
    for part in ("model", "optimizer", "rng", "config"):
        assert same_state(a[part], b[part]), part


def test_the_prototypes_are_frozen_in_the_first_epoch(small: list[str], tmp_path: Path) -> None:
    state = {}
    for frozen in ("2", "1", "0.5"):
        run(small, tmp_path / frozen, "--held-out", "0", "--epochs", "1", "--freeze-last-layer", frozen)
        state[frozen] = load_checkpoint(tmp_path / frozen / "last.pt")["model"]
    prototypes = {frozen: model["encoder.head.last_layer.weight_v"] for frozen, model in state.items()}
    assert torch.equal(prototypes["1"], prototypes["2"])
    assert not torch.equal(prototypes["1"], prototypes["0.5"])
    assert torch.equal(state["1"]["encoder.head.mlp.0.weight"], state["2"]["encoder.head.mlp.0.weight"])


def test_a_collapse_is_said(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A teacher of a very high temperature says the same of all images."""
    options = ["--held-out", "0", "--centering", "mean", "--teacher-temp", "1000", "--warmup-teacher-temp", "1000"]
    run(small, tmp_path, *options)
    captured = capsys.readouterr()
    assert captured.out.count("warning: step 5: the teacher's output has collapsed: every sample's is uniform") == 2
    assert "CollapseWarning" not in captured.err


@VERSIONS
def test_timm_backbones_and_other_precisions_train(
    small: list[str], folder: Path, tmp_path: Path, version: list[str]
) -> None:
    """A flat folder has no labels; a ViT takes crops of another size than the views."""
    options = ["--data", str(folder / "green"), "--image-size", "64", "--local-size", "32", "--local-crops", "2"]
    options += ["--precision", "bf16-mixed", "--epochs", "1", "--batch-size", "8"]
    options += ["--version", "2", "--image-model", "test_vit", "--separate-heads", "--no-norm"] if version else [
        "--image-model", "test_resnet", "--workers", "1",
    ]  # fmt: skip
    run(small, tmp_path, *options)
    assert len(logged(tmp_path)) == 2
    (figure,) = json.loads((tmp_path / "summary.json").read_text())["figures"]
    assert figure["name"] == "instance retrieval R@1"
    assert (tmp_path / "features.png").exists()


def test_local_crops_reach_the_student_alone(small: list[str], tmp_path: Path) -> None:
    """At the first step the teacher has seen the same with and without them, and the loss is another."""
    first = []
    for crops in ("0", "2"):
        options = ["--local-crops", crops, "--epochs", "1", "--held-out", "0"]
        first.append(logged(run(small, tmp_path / crops, *options))[0])
    assert first[0]["teacher_entropy"] == first[1]["teacher_entropy"]
    assert first[0]["loss"] != first[1]["loss"]


def test_an_overwritten_run_leaves_no_picture(small: list[str], tmp_path: Path) -> None:
    options = [*small, "--epochs", "1", "--held-out", "0"]
    run(options, tmp_path)
    assert dino.main([*options, "--output-dir", str(tmp_path), "--overwrite", "--lr", "1e30", "--clip", "0"]) == 1
    assert not (tmp_path / "features.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*V2, "--centering", "mean"], "--centering: version 2 has Sinkhorn-Knopp, not mean"),
        (["--version", "2"], "--version 2 hides patches of a vision transformer, which tiny-resnet is not"),
        (
            ["--version", "2", "--image-model", "xcit_nano_12_p16_224", "--image-size", "32", "--local-crops", "0"],
            "--version 2 hides patches of a vision transformer, which xcit_nano_12_p16_224 is not",
        ),
        (
            ["--version", "2", "--image-model", "tiny-vit", "--local-size", "6"],
            "--local-size: expected 8 to --image-size 8, got 6",
        ),
        (
            ["--image-size", "16", "--image-model", "test_vit", "--local-size", "12"],
            "--local-size: test_vit cuts patches of 16 pixels, which do not divide 12",
        ),
        (
            ["--image-model", "tiny-vit", "--image-size", "18"],
            "--image-size: tiny-vit cuts patches of 4 pixels, which do not divide 18",
        ),
        (["--local-size", "16"], "--local-size: expected 8 to --image-size 8, got 16"),
        (["--local-crops", "-1"], "--local-crops: expected at least 0, got -1"),
        (["--prototypes", "1"], "--prototypes: expected at least 2, got 1"),
        (["--momentum", "1.5"], "--momentum: expected a number in [0, 1], got 1.5"),
        (["--center-momentum", "-0.1"], "--center-momentum: expected a number in [0, 1], got -0.1"),
        (["--teacher-temp", "0"], "--teacher-temp: expected a finite number > 0, got 0.0"),
        (["--temperature", "nan"], "--temperature: expected a finite number > 0, got nan"),
        (["--final-weight-decay", "-1"], "--final-weight-decay: expected a finite number >= 0, got -1.0"),
        (["--mask-share", "0.5", "0.1"], "--mask-share: expected two shares in (0, 1), the smaller first"),
        (["--data", "nowhere"], "--data: expected mnist, openmoji or a folder of images, got 'nowhere'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_argument(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert dino.main([*small, "--output-dir", str(tmp_path / "run"), *arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lr", "1e30", "--warmup", "0", "--clip", "0", "--output-dir", str(tmp_path)]
    assert dino.main([*small, *options]) == 1
    assert "is not finite; no checkpoint had been written yet" in capsys.readouterr().err


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        dino.main(["--help"], prog="ssl-kernels train dino")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split()).partition(" options ")[2]
    for field in dataclasses.fields(DINOConfig):
        flag = f"--{field.name.replace('_', '-')}"
        assert flag in text
        description = text.split(flag, 1)[1].removeprefix(f", --no-{flag[2:]}").split("(default", 1)[0]
        assert len(description.split(" --", 1)[0].split()) >= 4, f"{flag} has no help: {description}"
