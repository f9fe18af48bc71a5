"""Moving averages beside timm's, lightly's, torch's and Lightning's, and solo-learn's and MoCo's formulas."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peers import assert_same_signature
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssl_kernels.ema import ModelEma, ema_multi_avg_fn
from ssl_kernels.integrations.lightly import update_momentum
from ssl_kernels.integrations.solo import MomentumUpdater
from ssl_kernels.integrations.timm import ModelEmaV3


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def walk(model: nn.Module, seed: int) -> None:
    """A step of training, as far as an average can tell."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
            else:
                tensor.add_(1)


def assert_same_state(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol)


# ---- timm


@pytest.fixture
def timm_ema() -> Any:
    return pytest.importorskip("timm.utils", reason="timm is not installed").ModelEmaV3


def test_timm_signatures(timm_ema: Any) -> None:
    if "stochastic_rounding" not in inspect.signature(timm_ema.__init__).parameters:
        pytest.skip("this timm is older than the arguments that ours has")
    assert_same_signature(ModelEmaV3, timm_ema)
    for name in ("update", "apply_update_", "apply_update_no_buffers_", "set", "get_decay"):
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (ModelEmaV3, timm_ema))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


WARM = {"decay": 0.95, "use_warmup": True, "warmup_gamma": 2.0, "warmup_power": 0.75, "update_after_step": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9},
        {"decay": 0.9, "update_after_step": 3},
        {"decay": 0.9, "exclude_buffers": True},
        {"decay": 0.9, "foreach": False},
        WARM,
        WARM | {"min_decay": 0.7},
        {"decay": 0.9, "dtype": torch.float64},
    ],
)
def test_timm_averages(timm_ema: Any, options: dict[str, Any]) -> None:
    model = net()
    ours, theirs = ModelEmaV3(model, **options), timm_ema(model, **options)
    assert not ours.module.training
    for step in range(8):
        walk(model, step)
        for average in (ours, theirs):
            average.update(model, step=step)
        assert ours.get_decay(step) == theirs.get_decay(step)
        assert_same_state(ours, theirs)
    for average in (ours, theirs):
        average.update(model)
    assert_same_state(ours, theirs)
    for average in (ours, theirs):
        average.set(model)
    assert_same_state(ours, theirs, rtol=0, atol=0)
    ours.decay = 0.5
    assert ours.get_decay() == 0.5


def test_timm_checkpoints(timm_ema: Any) -> None:
    model, other = net(), net()
    ours, theirs = ModelEmaV3(model, decay=0.9), timm_ema(other, decay=0.9)
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours.module, other, rtol=0, atol=0)
    theirs.load_state_dict(ModelEmaV3(model).state_dict())
    assert_same_state(theirs.module, model, rtol=0, atol=0)


def test_timm_attributes(timm_ema: Any) -> None:
    """Its trainer and its users read these."""
    options = {"decay": 0.9, "device": torch.device("cpu"), "dtype": torch.float64, "stochastic_rounding_seed": 3}
    ours, theirs = ModelEmaV3(net(), **options), timm_ema(net(), **options)
    for name in set(dir(theirs)) - set(dir(nn.Module())):
        expected = getattr(theirs, name)
        if not name.startswith("_") and not callable(expected):
            assert getattr(ours, name) == expected, name


def test_timm_single_updates(timm_ema: Any) -> None:
    """With a decay of the caller, and with an attribute that changes on the way."""
    model = net()
    averages = ModelEmaV3(model), timm_ema(model)
    for step, name in enumerate(("apply_update_", "apply_update_no_buffers_")):
        walk(model, step)
        for average in averages:
            with torch.no_grad():
                getattr(average, name)(model, 0.7)
        assert_same_state(*averages)
    for average in averages:
        average.exclude_buffers, average.decay = True, 0.3
        average.update(model)
    assert_same_state(*averages)
    assert averages[0].extra_repr() == "decay=0.3, exclude_buffers=True"
    assert averages[0].module[1].running_mean.tolist() == model[1].running_mean.tolist()


def test_timm_of_wrapped_models(timm_ema: Any, tmp_path: Any) -> None:
    """As its trainers pass them, and the files that its ``CheckpointSaver`` writes."""
    utils = pytest.importorskip("timm.utils")
    model = net()
    ours, theirs = ModelEmaV3(torch.compile(model), decay=0.9), timm_ema(torch.compile(model), decay=0.9)
    walk(model, 0)
    for average in (ours, theirs):
        average.update(torch.compile(model))
    assert_same_state(utils.unwrap_model(ours), utils.unwrap_model(theirs))
    optimizer, saved = torch.optim.SGD(model.parameters(), lr=0.1), []
    for average in (ours, theirs):
        saver = utils.CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=tmp_path)
        saver.save_checkpoint(epoch=0, metric=0.0)
        saved.append(torch.load(tmp_path / "last.pth.tar", weights_only=False)["state_dict_ema"])
    assert saved[0].keys() == saved[1].keys() == model.state_dict().keys()
    fresh = ModelEmaV3(net())
    fresh.load_state_dict(theirs.state_dict())
    assert_same_state(fresh.module, utils.unwrap_model(theirs), rtol=0, atol=0)
    compiled = torch.compile(ours, backend="eager")
    walk(model, 1)
    compiled.update(model)
    theirs.update(torch.compile(model))
    assert_same_state(utils.unwrap_model(compiled), utils.unwrap_model(theirs))


def test_timm_averages_tied_weights_once() -> None:
    """timm once for each name, so that they follow twice as fast."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    average = ModelEmaV3(model, decay=0.75)
    with torch.no_grad():
        average.module[0].weight.zero_()
        model[0].weight.fill_(8.0)
    average.update(model)
    assert average.module[1].weight.unique().tolist() == [2.0]


def test_timm_rounds_bfloat16_at_random() -> None:
    """Its mean is the average in float32; the same seed gives the same bits and leaves torch's generator alone."""
    model = nn.Linear(100, 100).bfloat16()
    averages = [ModelEmaV3(model, decay=0.999, stochastic_rounding_seed=seed) for seed in (0, 0, 1)]
    exact, still = ModelEmaV3(model, decay=0.999, dtype=torch.float32), copy.deepcopy(averages[0])
    still.stochastic_rounding = False
    start = model.weight.detach().float()
    with torch.no_grad():
        model.weight.mul_(1.25)
    state = torch.get_rng_state()
    for _ in range(100):
        for average in (*averages, exact, still):
            average.update(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(averages[0].module.weight, averages[1].module.weight)
    assert not torch.equal(averages[0].module.weight, averages[2].module.weight)
    assert torch.equal(still.module.weight.float(), start)
    size = start.abs()
    travelled = ((averages[0].module.weight.float() - start) * start.sign()).sum() / size.sum()
    wanted = ((exact.module.weight - start) * start.sign()).sum() / size.sum()
    assert wanted == pytest.approx(0.25 * (1 - 0.999**100), rel=1e-3)
    assert travelled == pytest.approx(wanted.item(), rel=0.05)
    assert averages[0].module.weight.dtype == torch.bfloat16


def test_timm_random_rounding_keeps_what_has_no_fraction() -> None:
    special = torch.tensor([[0.0, -0.0], [torch.inf, -torch.inf], [1.5, -2.25], [torch.nan, torch.nan]])
    special.view(torch.int32)[3, 1] = 0x7FFFFFFF  # the NaN to which nothing can be added
    model = nn.Linear(2, 4, bias=False)
    model.weight.data = special
    average = ModelEmaV3(model, decay=0.0, dtype=torch.bfloat16)
    with torch.no_grad():
        average.module.weight.zero_()
    average.update(model)
    torch.testing.assert_close(average.module.weight, special.bfloat16(), rtol=0, atol=0, equal_nan=True)


# ---- lightly, solo-learn, MoCo


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lightly_update_momentum(dtype: torch.dtype) -> None:
    theirs = pytest.importorskip("lightly.models.utils", reason="lightly is not installed").update_momentum
    ours_signature, their_signature = (inspect.signature(f).parameters for f in (update_momentum, theirs))
    assert list(ours_signature) == list(their_signature)
    model, average = net().to(dtype), net().to(dtype)
    other = copy.deepcopy(average)
    for step in range(4):
        walk(model, step)
        update_momentum(model, average, m=0.9)
        theirs(model, other, m=0.9)
    assert_same_state(average, other)


def test_pairs_by_order_take_wrapped_models() -> None:
    model, average = net(), net()
    start = copy.deepcopy(average)
    update_momentum(torch.compile(model), nn.DataParallel(average), m=0.75)
    MomentumUpdater(0.5).update(nn.DataParallel(model), torch.compile(average))
    for new, old, towards in zip(average.parameters(), start.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, 0.375 * old + 0.625 * towards)
    averaged = AveragedModel(torch.compile(model), multi_avg_fn=ema_multi_avg_fn(0.75))
    averaged.update_parameters(nn.DataParallel(model))  # copies
    old = copy.deepcopy(model)
    walk(model, 0)
    averaged.update_parameters(nn.DataParallel(model))
    update_momentum(model, old, m=0.75)
    for new, expected in zip(averaged.parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(new, expected)


def test_a_model_that_fabric_wraps() -> None:
    fabric = pytest.importorskip("lightning.fabric", reason="Lightning is not installed").Fabric(accelerator="cpu")
    model = net()
    wrapped = fabric.setup_module(torch.compile(model))
    averages = ModelEma(model, 0.75), ModelEma(wrapped, 0.75)
    walk(model, 0)
    averages[0].update(wrapped)
    averages[1].update(model)
    assert_same_state(*averages, rtol=0, atol=0)
    torch.testing.assert_close(averages[0].module[1].running_mean, 0.25 * model[1].running_mean)


def test_lightly_update_momentum_refuses_another_network() -> None:
    with pytest.raises(ValueError, match="sources: expected 2 tensors as targets has, got 4"):
        update_momentum(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2), 0.9)
    with pytest.raises(ValueError, match=r"sources\[0\]: expected shape \(2, 2\) as targets\[0\] has, got \(2, 3\)"):
        update_momentum(nn.Linear(3, 2), nn.Linear(2, 2), 0.9)


@given(base=st.floats(0, 1), final=st.floats(0, 1), steps=st.integers(1, 5))
def test_solo_momentum_updater(base: float, final: float, steps: int) -> None:
    base, final = min(base, final), max(base, final)
    online, momentum = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = [p.detach().double() for p in momentum.parameters()]
    updater = MomentumUpdater(base, final)
    assert updater.cur_tau == base
    for step in range(steps):
        walk(online, step)
        updater.update(online, momentum)
        tau = updater.cur_tau
        expected = [
            tau * e + (1 - tau) * p.detach().double() for e, p in zip(expected, online.parameters(), strict=True)
        ]
        updater.update_tau(cur_step=step + 1, max_steps=steps)
        cosine = (math.cos(math.pi * (step + 1) / steps) + 1) / 2
        assert updater.cur_tau == pytest.approx(final - (final - base) * cosine, abs=1e-12)
    assert updater.cur_tau == final
    for parameter, wanted in zip(momentum.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-5, atol=1e-5)


def test_solo_momentum_updater_checks_its_arguments() -> None:
    assert [(p.name, p.default) for p in inspect.signature(MomentumUpdater).parameters.values()] == [
        ("base_tau", 0.996),
        ("final_tau", 1.0),
    ]
    with pytest.raises(ValueError, match=r"base_tau: expected a number in \[0, 1\], got -1"):
        MomentumUpdater(-1)
    with pytest.raises(ValueError, match=r"final_tau: expected at least base_tau \(0.9\), got 0.5"):
        MomentumUpdater(0.9, 0.5)


# ---- torch and Lightning


@pytest.mark.parametrize("use_buffers", [False, True])
def test_torch_averaged_model(use_buffers: bool) -> None:
    model = net()
    ours = AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    for step in range(5):
        walk(model, step)
        for average in (ours, theirs):
            average.update_parameters(model)
    if use_buffers:  # torch averages the counter of batches, and rounds it
        assert ours.module[1].num_batches_tracked == model[1].num_batches_tracked
        theirs.module[1].num_batches_tracked.copy_(model[1].num_batches_tracked)
    assert_same_state(ours, theirs)


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 13),
    reason="the AveragedModel of torch before 2.13 takes tensors of one dtype",
)
def test_torch_averaged_model_in_float32_of_a_bfloat16_model() -> None:
    """Which torch's own ``get_ema_multi_avg_fn`` refuses."""
    model = net().bfloat16()
    ours = AveragedModel(
        copy.deepcopy(model).float(), multi_avg_fn=ema_multi_avg_fn(torch.tensor(0.9)), use_buffers=True
    )
    ours.update_parameters(model)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(5):
        walk(model, step)
        ours.update_parameters(model)
        for name, value in model.state_dict().items():
            floating = value.is_floating_point()
            expected[name] = 0.9 * expected[name] + 0.1 * value.double() if floating else value.double()
    for name, value in ours.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_the_tensor_of_a_schedule_is_read_at_every_update() -> None:
    m, values = torch.tensor(0.5), [torch.zeros(1)]
    average = ema_multi_avg_fn(m)
    average(values, [torch.ones(1)], 1)
    m.fill_(1.0)
    average(values, [torch.zeros(1)], 2)
    assert values[0].item() == 0.5
    with pytest.raises(ValueError, match=r"momentum: expected a number in \[0, 1\], got 2"):
        ema_multi_avg_fn(2.0)


def test_lightning_weight_averaging(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    callbacks = pytest.importorskip(
        "lightning.pytorch.callbacks.weight_averaging", reason="Lightning is older than 2.6"
    )

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.seen = [self.layer.weight.detach().clone()]

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.layer(batch).square().mean()

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.seen.append(self.layer.weight.detach().clone())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callbacks.WeightAveraging(multi_avg_fn=ema_multi_avg_fn(0.75))],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(12, 3), batch_size=4))
    average = module.seen[1]  # the first update copies
    for weight in module.seen[2:]:
        average = 0.75 * average + 0.25 * weight
    assert len(module.seen) == 4
    torch.testing.assert_close(module.layer.weight.detach(), average)
