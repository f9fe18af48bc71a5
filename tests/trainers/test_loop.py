"""The shared loop: schedule, accumulation, clipping, logs, checkpoints and what stops a run."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import logged, same_state
from torch import Tensor, nn

from ssl_kernels.trainers import checkpoints
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.errors import InterruptedRunError, NonFiniteError, UserError
from ssl_kernels.trainers.fabric import import_fabric, make_fabric
from ssl_kernels.trainers.loop import fit
from ssl_kernels.trainers.loop_config import LoopConfig
from ssl_kernels.trainers.optim import cosine, make_optimizer, parameter_groups
from ssl_kernels.trainers.training import Result

PAIRS, DIM = 24, 3


class Regression:
    """Least squares in batches: all that the loop knows of data."""

    fingerprint = "regression"

    def __init__(self, batch_size: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(PAIRS, DIM, generator=generator)
        self.y = self.x @ torch.tensor([1.0, -2.0, 3.0]) + 0.1 * torch.randn(PAIRS, generator=generator)
        self.batch_size = batch_size
        self.served: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return PAIRS // self.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(start, len(self)):
            self.served.append((epoch, number))
            chosen = slice(number * self.batch_size, (number + 1) * self.batch_size)
            yield self.x[chosen], self.y[chosen]


class Linear(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(DIM, 1), nn.Dropout(dropout)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        error = self.dropout(self.layer(x)[:, 0]) - y
        return error.square().mean(), {"error": error.detach().abs().mean()}


def config(folder: Path, **options: object) -> LoopConfig:
    values = {"epochs": 3, "batch_size": 4, "lr": 0.05, "accelerator": "cpu", "output_dir": folder, **options}
    return LoopConfig(**values)  # type: ignore[arg-type]


def run(
    settings: LoopConfig, model: nn.Module | None = None, data: Regression | None = None, **options: object
) -> Result:
    fabric = make_fabric(settings)
    model = model or Linear()
    groups = parameter_groups(model, settings.lr, settings.weight_decay)
    wrapped, optimizer = fabric.setup(model, make_optimizer(groups, settings))
    return fit(fabric, wrapped, optimizer, data or Regression(settings.batch_size), settings, **options)  # type: ignore[arg-type]


def test_the_loss_falls_and_everything_is_logged(tmp_path: Path) -> None:
    result = run(config(tmp_path, epochs=40))
    assert result.steps == len(result.records) == 240
    assert result.records[-1]["loss"] < 0.2 < 5 < result.records[0]["loss"]
    assert [r["step"] for r in result.records] == list(range(1, 241))
    on_disk = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert on_disk == result.records
    assert {"loss", "error", "lr", "grad_norm", "images_per_s", "peak_mb", "elapsed_s", "epoch"} < on_disk[0].keys()
    assert result.peak_mb > 50
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.05
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([r["loss"] for r in on_disk], rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process inherits nothing")
def test_a_peak_is_not_that_of_who_started_the_process() -> None:
    held = torch.ones(2**30, dtype=torch.uint8)
    code = "import torch; from ssl_kernels.trainers.log import peak_memory_mb as mb; print(mb(torch.device('cpu')))"
    assert 100 < float(subprocess.check_output([sys.executable, "-c", code])) < held.nbytes / 2**20


def test_fabric_comes_without_torchmetrics_which_takes_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in (("torchmetrics", "slow = True"), ("lightning_fabric", "import torchmetrics")):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setitem(sys.modules, name, None)  # so that what was there comes back
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="torchmetrics"):
        import_fabric()
    import torchmetrics

    assert torchmetrics.slow  # for whoever asks for it later
    import_fabric()
    assert sys.modules["torchmetrics"] is torchmetrics  # of whoever had it before


def test_log_every_thins_the_log_but_keeps_its_ends(tmp_path: Path) -> None:
    result = run(config(tmp_path, log_every=5))
    assert [r["step"] for r in result.records] == [1, 5, 10, 15, 18]


def test_cosine_warms_up_peaks_and_ends_near_zero() -> None:
    factors = [cosine(step, 100, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(factors) == factors[10] == 1
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.001
    assert factors[55] == pytest.approx(0.5)
    assert cosine(0, 1, 0) == 1


def test_the_schedule_scales_every_group_from_its_own_peak(tmp_path: Path) -> None:
    fabric = make_fabric(settings := config(tmp_path, epochs=1, warmup=0.0))
    model = Linear()
    groups = [
        {"params": [model.layer.weight], "lr": 1e-2, "peak_lr": 1e-2},
        {"params": [model.layer.bias], "lr": 1e-3, "peak_lr": 1e-3},
    ]
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(groups))
    seen: list[list[float]] = []
    fit(
        fabric,
        wrapped,
        optimizer,
        Regression(),
        settings,
        after_step=lambda n: seen.append([g["lr"] for g in optimizer.param_groups]),
    )
    assert seen == [pytest.approx([1e-2 * cosine(i, 6, 0), 1e-3 * cosine(i, 6, 0)]) for i in range(6)]


def test_weight_decay_spares_vectors() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(True)
    decayed, plain = parameter_groups(model, 0.1, 0.2)
    assert [p.ndim for p in decayed["params"]] == [2]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    assert len(plain["params"]) == 3
    assert parameter_groups(model.requires_grad_(False), 0.1, 0.2) == []


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (4, 6)])
def test_accumulated_batches_step_like_one_large_batch(tmp_path: Path, batch_size: int, accumulate: int) -> None:
    """True of a loss that is a mean over examples, as here; a contrastive loss would see other negatives."""
    models = [Linear(), Linear()]
    models[1].load_state_dict(models[0].state_dict())
    large = batch_size * accumulate
    whole = run(config(tmp_path / "a", batch_size=large), models[0], Regression(large))
    parts = run(config(tmp_path / "b", batch_size=batch_size, accumulate=accumulate), models[1], Regression(batch_size))
    assert whole.steps == parts.steps == 3 * (PAIRS // large)
    for a, b in zip(whole.records, parts.records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert torch.allclose(models[0].layer.weight, models[1].layer.weight, atol=1e-5)


def test_after_step_runs_once_per_optimizer_step(tmp_path: Path) -> None:
    counted: list[int] = []
    data = Regression(2)
    run(config(tmp_path, batch_size=2, accumulate=5, epochs=2), data=data, after_step=counted.append)
    assert counted == [1, 2, 3, 4]
    assert len(data.served) == 20  # the two batches that fill no step are left over in each epoch


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_clipping_bounds_what_the_optimizer_sees(tmp_path: Path, clip: float) -> None:
    model = Linear()
    norms: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()))
            super().step()

    fabric = make_fabric(settings := config(tmp_path, clip=clip, lr=1e-3, epochs=1))
    wrapped, optimizer = fabric.setup(model, Spy(parameter_groups(model, 1e-3, 0.0)))
    result = fit(fabric, wrapped, optimizer, Regression(), settings)
    logged_norms = [r["grad_norm"] for r in result.records]
    assert min(logged_norms) > 0.5, "the log shows the norm before clipping"
    assert norms == pytest.approx([0.5] * 6 if clip else logged_norms, rel=1e-4)


@pytest.mark.parametrize(("stop_at", "accumulate"), [(1, 1), (6, 1), (7, 1), (17, 1), (4, 2)])
def test_a_resumed_run_is_bit_exact(tmp_path: Path, stop_at: int, accumulate: int) -> None:
    """Dropout draws from torch's generator, so the weights agree only if its state does too."""
    torch.manual_seed(3)
    start = Linear(dropout=0.3).state_dict()

    def fresh() -> Linear:
        model = Linear(dropout=0.3)
        model.load_state_dict(start)
        return model

    run(config(tmp_path / "whole", accumulate=accumulate), fresh())

    def interrupt(step: int) -> None:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError) as stop:
        run(config(tmp_path / "parts", accumulate=accumulate), fresh(), after_step=interrupt)
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert stop.value.checkpoint == str(tmp_path / "parts" / "last.pt")
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == stop_at
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the handler must be gone"

    with open(tmp_path / "parts" / "metrics.jsonl", "a") as log:  # what a kill after the checkpoint leaves behind
        log.write(json.dumps({"step": stop_at + 1, "loss": 0.0}) + '\n{"step": 9')
    data = Regression()
    settings = config(tmp_path / "parts", resume=tmp_path / "parts", accumulate=accumulate)
    run(settings, Linear(dropout=0.3), data)
    epoch, step = divmod(stop_at, 6 // accumulate)
    assert data.served[0] == (epoch, step * accumulate)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts")]
    assert same_state(states[0], states[1])


def test_all_random_generators_are_restored(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> tuple[object, ...]:
        legacy = np.random.rand(), np.random.randn()  # noqa: NPY002
        return random.random(), random.gauss(0, 1), *legacy, torch.rand(3).tolist()

    # The second of a pair of normal draws waits inside the generators.
    random.gauss(0, 1), np.random.randn(1)  # noqa: NPY002
    state = checkpoints.rng_state()
    torch.save(state, tmp_path / "rng.pt")
    first = draw()
    draw()
    checkpoints.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == first


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoints.write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the new")
        assert path.read_text() == "old"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("after", [0, 8])
@pytest.mark.parametrize("term", ["the loss", "the gradient of layer.weight"])
def test_a_nonfinite_term_stops_the_run(tmp_path: Path, term: str, after: int) -> None:
    model = Linear()
    seen = 0

    def step(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal seen
        seen += 1
        loss, metrics = model(batch)
        if seen > after:
            # sqrt has an infinite slope at zero, and 0 * inf is no number: a finite loss with a gradient that is not
            loss = loss * math.nan if term == "the loss" else loss + (model.layer.weight * 0).sum().sqrt()
        return loss, metrics

    with pytest.raises(NonFiniteError) as error:
        run(config(tmp_path, checkpoint_every=4), model, step=step)
    assert (error.value.step, error.value.term) == (after + 1, term)
    if after:
        assert error.value.checkpoint == str(tmp_path / "last.pt")
        assert error.value.checkpoint in str(error.value)
        assert load_checkpoint(tmp_path / "last.pt")["step"] == 8
        assert all(value.isfinite().all() for value in load_checkpoint(tmp_path / "last.pt")["model"].values())
    else:
        assert error.value.checkpoint is None
        assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_the_parameter_that_went_bad_is_the_one_named(tmp_path: Path, clip: float) -> None:
    model = Linear()

    def step(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = model(batch)
        return loss + (model.layer.bias * 0).sum().sqrt(), metrics  # not the first parameter

    with pytest.raises(NonFiniteError, match=r"the gradient of layer\.bias"):
        run(config(tmp_path, clip=clip), model, step=step)


def test_terms_of_the_loss_are_named(tmp_path: Path) -> None:
    model = Linear()

    def step(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, metrics = model(batch)
        term = (model.layer.weight * math.inf).sum()
        return loss + term, {**metrics, "fine": loss.detach(), "ibot": term.detach(), "share": math.nan}

    with pytest.raises(NonFiniteError, match=r"step 1: the loss \(with ibot, share\) is not finite"):
        run(config(tmp_path), model, step=step)


def test_statistics_that_went_bad_are_not_checkpointed(tmp_path: Path) -> None:
    model = Linear()
    model.register_buffer("center", torch.zeros(3))
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))  # which is meant

    def spoil(step: int) -> None:
        if step == 6:
            model.center[1] = math.nan

    with pytest.raises(NonFiniteError, match=r"the buffer center is not finite; the last good checkpoint is .*last.pt"):
        run(config(tmp_path, checkpoint_every=3), model, after_step=spoil)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3


def test_weights_that_overflow_are_not_checkpointed(tmp_path: Path) -> None:
    model = Linear()

    def spoil(step: int) -> None:
        if step == 6:
            with torch.no_grad():
                model.layer.bias.fill_(math.inf)

    with pytest.raises(
        NonFiniteError, match=r"updated parameter layer.bias is not finite; the last good checkpoint is .*last.pt"
    ):
        run(config(tmp_path, checkpoint_every=3), model, after_step=spoil)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_output_folder(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output-dir: cannot create .*file: File exists"):
        run(config(tmp_path / "file", overwrite=overwrite))


def test_a_folder_with_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    run(config(tmp_path))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        run(config(tmp_path))
    assert (tmp_path / "last.pt").read_bytes() == before
    result = run(config(tmp_path, overwrite=True, epochs=1))
    assert result.steps == load_checkpoint(tmp_path / "last.pt")["step"] == len(logged(tmp_path)) == 6


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half", {"model": {}}])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: object) -> None:
    run(config(tmp_path / "run"))
    path = tmp_path / "run" / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"--resume: .*last\.pt is not a") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    class Other(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, 2)

    run(config(tmp_path))
    with pytest.raises(UserError, match="--resume: the checkpoint does not fit this model"):
        run(config(tmp_path, resume=tmp_path), Other())
    with pytest.raises(UserError, match="--resume: no checkpoint at"):
        run(config(tmp_path, resume=tmp_path / "nothing"))


def test_an_epoch_too_short_for_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--batch-size 4 x --accumulate 7: more than one epoch holds \(6 batches"):
        run(config(tmp_path, accumulate=7))


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"epochs": 0}, "--epochs"), ({"batch_size": 0}, "--batch-size"), ({"lr": math.nan}, "--lr"),
     ({"clip": -1.0}, "--clip"), ({"warmup": 2.0}, "--warmup"), ({"workers": -1}, "--workers"),
     ({"seed": -1}, "--seed"), ({"seed": 2**64}, "--seed"), ({"betas": (0.9, 1.0)}, "--betas")],
)  # fmt: skip
def test_bad_values_are_named(tmp_path: Path, options: dict[str, float], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        config(tmp_path, **options).check()


def test_precision_that_the_device_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--precision: 16-mixed needs a GPU"):
        make_fabric(config(tmp_path, precision="16-mixed"))


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_precision_that_shards_lack_is_refused(tmp_path: Path, precision: str) -> None:
    wanted = f"--precision: expected 32-true or bf16-mixed under --strategy fsdp, got {precision}"
    with pytest.raises(UserError, match=wanted):
        config(tmp_path, precision=precision, strategy="fsdp").check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--accelerator cuda"):
        make_fabric(config(tmp_path, accelerator="cuda"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train(tmp_path: Path, precision: str) -> None:
    model = Linear()

    def step(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        weight = model.layer.weight
        return wrapped([value.to(weight.dtype) for value in batch])

    settings = config(tmp_path, epochs=20, precision=precision)
    fabric = make_fabric(settings)
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(parameter_groups(model, 0.05, 0.0)))
    result = fit(fabric, wrapped, optimizer, Regression(), settings, step=step)
    assert result.records[-1]["loss"] < 0.3 * result.records[0]["loss"]
