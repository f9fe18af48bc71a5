"""Options of the loop: where a run goes on from, how long, by which optimizer, with which log, evaluated how often."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import logged, patchworks, same_state
from test_loop import Linear, Regression, config, run
from torch import Tensor, nn

from ssl_kernels.collapse import SpreadMonitor
from ssl_kernels.trainers import dino, fabric, init_from, loggers, moco, siglip, speed
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.data.fingerprint import names_within
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.loop import fit
from ssl_kernels.trainers.loop_config import LoopConfig, absolute, plain
from ssl_kernels.trainers.optim import cosine, make_optimizer, parameter_groups
from ssl_kernels.trainers.self_supervised import Encoder
from ssl_kernels.trainers.simclr import SimClrConfig

PROG = "python -m ssl_kernels.trainers.siglip"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return patchworks(tmp_path_factory.mktemp("patchworks"), 48)


@pytest.fixture
def pictures(folder: Path) -> list[str]:
    """Arguments of trainers on images, of six steps an epoch."""
    sizes = ("--image-size", "16", "--batch-size", "8", "--hidden", "16", "--dim", "8", "--epochs", "1")
    return ["--data", str(folder), "--held-out", "0", "--accelerator", "cpu", *sizes]


# ---- where it goes on


def copy_of(table: Path, folder: Path) -> Path:
    shutil.copytree(table.parent, folder)
    return folder / table.name


def test_a_run_resumes_in_another_working_directory(
    small: list[str], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data was named by a relative path, and so was its folder."""
    monkeypatch.chdir(table.parent)
    arguments = [*small, "--data", table.name, "--output-dir", "../in-another-directory"]
    assert siglip.main([*arguments, "--epochs", "1"]) == 0
    run_folder = table.parent.parent / "in-another-directory"
    saved = json.loads((run_folder / "config.json").read_text())
    assert (saved["data"], saved["output_dir"]) == (str(table), str(run_folder))
    monkeypatch.chdir(tmp_path)
    assert siglip.main(["--resume", str(run_folder), "--epochs", "2"]) == 0
    shutil.rmtree(run_folder)


def test_the_data_may_have_moved(
    small: list[str], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = copy_of(table, tmp_path / "first"), copy_of(table, tmp_path / "second" / "place")
    held_out = table.parent / "held out.csv"
    lines = table.read_text().splitlines()
    for path in (first, second):
        (path.parent / held_out.name).write_text("\n".join([lines[0], *lines[-12:]]) + "\n")
    arguments = [*small, "--data", str(first), "--held-out-data", str(first.parent / held_out.name), "--epochs", "1"]
    assert siglip.main([*arguments, "--output-dir", str(tmp_path / "run")]) == 0
    shutil.rmtree(first.parent)
    resumed = ["--resume", str(tmp_path / "run"), "--epochs", "2"]
    moved = ["--data", str(second), "--held-out-data", str(second.parent / held_out.name)]
    assert siglip.main([*resumed, *moved]) == 0
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (saved["step"], saved["config"]["data"]) == (10, str(second))

    capsys.readouterr()
    (second.parent / held_out.name).write_text("\n".join([lines[0], *lines[-11:], lines[-13]]) + "\n")
    assert siglip.main([*resumed[:2], *moved]) == 2
    assert "--resume: the data is not what the run was trained on" in capsys.readouterr().err
    (second.parent / held_out.name).write_text("\n".join([lines[0], *lines[-11:], lines[-12] + "s"]) + "\n")
    assert siglip.main([*resumed[:2], *moved]) == 2
    assert "--held-out-data: the held-out pairs are not those" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["/a/b/x.png", "/a/b/c/y.png"], ["/d/x.png", "/d/c/y.png"]),
        (["x.png", "c/y.png"], ["/d/x.png", "/d/c/y.png"]),
        (["/a/cat1.png", "/a/cat2.png"], ["cat1.png", "cat2.png"]),
        (["/a/x.png"], ["/b/c/x.png"]),
        ([], []),
    ],
)
def test_names_do_not_depend_on_the_place(one: list[str], other: list[str]) -> None:
    assert names_within(one) == names_within(other) == names_within([Path(name) for name in one])
    assert names_within([*one, "/a/b/z.png"]) != names_within([*other, "/d/w.png"])


def test_relative_and_absolute_names_may_be_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names_within(["a/x.png", str(tmp_path / "a/y.png")]) == ["x.png", "y.png"]


def test_paths_are_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("pairs.csv", "mnist", "home/x.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for name, stored in (
        ("pairs.csv", str(tmp_path / "pairs.csv")),
        ("../" + tmp_path.name + "/pairs.csv", str(tmp_path / "pairs.csv")),
        ("~/x.csv", str(tmp_path / "home/x.csv")),
        ("shards-{000..009}.tar", str(tmp_path / "shards-{000..009}.tar")),
        ("more/*.tar", str(tmp_path / "more/*.tar")),
        ("mnist", "mnist"),
        ("openmoji", "openmoji"),
        ("", ""),
        ("resnet18", "resnet18"),
        ("https://host/a.tar", "https://host/a.tar"),
        ("pipe:cat pairs.csv", "pipe:cat pairs.csv"),
    ):
        assert absolute(name) == stored
    stored = plain(LoopConfig(output_dir=Path("runs/x"), resume=Path("a"), overwrite=True, init_from="pairs.csv"))
    assert stored["output_dir"] == str(tmp_path / "runs/x")
    assert stored["init_from"] == str(tmp_path / "pairs.csv")
    assert (stored["resume"], stored["overwrite"], stored["betas"]) == (None, False, [0.9, 0.98])


# ---- how long


@pytest.mark.parametrize(("stop", "options"), [(18, {"epochs": 5}), (7, {"epochs": 5}), (18, {"max_steps": 20})])
def test_a_longer_run_follows_the_schedules_of_the_longer_one(
    tmp_path: Path, stop: int, options: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it had finished or not."""
    run(config(tmp_path, max_steps=0 if stop == 18 else stop, warmup=0.1))
    capsys.readouterr()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == stop
    result = run(config(tmp_path, resume=tmp_path, warmup=0.1, **options))
    total = options.get("max_steps", 30)
    assert result.steps == total
    warmup = round(0.1 * total)
    rates = [record["lr"] for record in result.records[stop:]]
    assert rates == pytest.approx([0.05 * cosine(step, total, warmup) for step in range(stop, total)])
    assert [record["step"] for record in logged(tmp_path)] == list(range(1, total + 1))
    line = capsys.readouterr().out.splitlines()[0]
    assert line == (
        f"extended from {stop} to {total} steps: from step {stop + 1} on, the learning rate (next {rates[0]:.3g}) and"
        f" all other schedules are those of a run of {total} steps"
    )


def test_a_run_may_be_cut_short_but_not_below_what_it_has_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(tmp_path, epochs=2))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save({**state, "total": 30}, tmp_path / "last.pt")
    for options, flag in (({"epochs": 1}, "--epochs"), ({"max_steps": 11}, "--max-steps")):
        with pytest.raises(
            UserError, match=f"^{flag}: the run has done 12 steps of 6 to an epoch; expected as many at"
        ):
            run(config(tmp_path, resume=tmp_path, **options))
    capsys.readouterr()
    assert run(config(tmp_path, resume=tmp_path, epochs=3)).steps == 18
    assert capsys.readouterr().out.startswith("shortened from 30 to 18 steps: from step 13 on")


@pytest.mark.parametrize("steps", [4, 9])
def test_steps_may_be_counted_instead_of_epochs(tmp_path: Path, steps: int) -> None:
    """The schedule ends with them, in mid-epoch as well."""
    data = Regression()
    result = run(config(tmp_path, epochs=1, max_steps=steps, warmup=0.0), data=data)
    assert result.steps == len(data.served) == steps
    assert [r["lr"] for r in result.records] == pytest.approx([0.05 * cosine(i, steps, 0) for i in range(steps)])
    assert load_checkpoint(tmp_path / "last.pt")["step"] == steps
    served = len(data.served)
    assert run(config(tmp_path, epochs=1, max_steps=steps, warmup=0.0, resume=tmp_path), data=data).steps == steps
    assert len(data.served) == served, "what is finished needs no data"


def test_the_other_schedules_end_with_the_steps(pictures: list[str], tmp_path: Path) -> None:
    """The momentum of a teacher reaches one; the temperature of DINO's counts epochs, whatever --epochs says."""
    assert moco.main([*pictures, "--max-steps", "4", "--queue-size", "16", "--output-dir", str(tmp_path / "m")]) == 0
    assert len(logged(tmp_path / "m")) == 4
    model = load_checkpoint(tmp_path / "m" / "last.pt")["model"]
    arguments = [*pictures, "--max-steps", "8", "--prototypes", "16", "--centering", "mean"]
    arguments += ["--teacher-temp", "0.08", "--warmup-teacher-epochs", "1"]
    assert dino.main([*arguments, "--output-dir", str(tmp_path / "d")]) == 0
    records = logged(tmp_path / "d")
    assert records[-1]["momentum"] == 1
    assert [r["teacher_temp"] for r in records[5:]] == pytest.approx([0.04 + 0.04 * 5 / 6, 0.08, 0.08])
    assert not torch.equal(model["teacher.module.head.0.weight"], model["encoder.head.0.weight"])


# ---- the optimizer


def test_sgd_is_torch_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [Linear(), Linear()]
    models[1].load_state_dict(models[0].state_dict())
    settings = config(tmp_path / "a", optimizer="sgd", optimizer_momentum=0.8, lr=0.01, clip=0.0, warmup=0.0)
    made = make_optimizer(parameter_groups(models[0], 0.01, 0.1), settings)
    theirs = torch.optim.SGD(
        [{"params": [models[1].layer.weight], "weight_decay": 0.1}, {"params": [models[1].layer.bias]}],
        lr=0.01, momentum=0.8,
    )  # fmt: skip
    engine = fabric.make_fabric(settings)
    wrapped, optimizer = engine.setup(models[0], made)
    fit(engine, wrapped, optimizer, Regression(), settings)
    for step, batch in enumerate(b for epoch in range(3) for b in Regression().batches(epoch)):
        for group in theirs.param_groups:
            group["lr"] = 0.01 * cosine(step, 18, 0)
        theirs.zero_grad()
        models[1](batch)[0].backward()
        theirs.step()
    assert torch.allclose(models[0].layer.weight, models[1].layer.weight, rtol=1e-6)
    assert torch.allclose(models[0].layer.bias, models[1].layer.bias, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_adapts_the_rate_of_matrices_alone(decay: float) -> None:
    """A step of a matrix is a thousandth of its norm times the rate, whatever its gradient; that of a bias is SGD's."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(
        parameter_groups(model, 0.5, decay), LoopConfig(optimizer="lars", optimizer_momentum=0.0, lr=0.5)
    )
    gradients = [torch.randn(2, 3), torch.randn(2)]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = 100 * gradient
    optimizer.step()
    weight, bias = before
    norm, slope = weight.norm(), 100 * gradients[0]
    trust = 0.001 * norm / (slope.norm() + decay * norm)
    assert torch.allclose(model.weight, weight - 0.5 * trust * (slope + decay * weight), rtol=1e-5)
    assert torch.allclose(model.bias, bias - 0.5 * 100 * gradients[1])


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_other_optimizers_resume_bit_exactly(tmp_path: Path, optimizer: str) -> None:
    torch.manual_seed(3)
    start = Linear(dropout=0.3).state_dict()
    options = {"optimizer": optimizer, "lr": 0.05, "checkpoint_every": 7, "keep": 2}
    for name in ("whole", "parts"):
        model = Linear(dropout=0.3)
        model.load_state_dict(start)
        run(config(tmp_path / name, **options), model)
    (tmp_path / "parts" / "last.pt").unlink()
    run(config(tmp_path / "parts", resume=tmp_path / "parts", **options), Linear(dropout=0.3))
    states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts")]
    assert "momentum_buffer" in states[0]["optimizer"]["state"][0]
    assert same_state(states[0], states[1])


# ---- precision, compiling, activations


@pytest.mark.parametrize(
    ("asked", "accelerator", "gpu", "bf16", "precision"),
    [
        ("auto", "auto", False, False, "32-true"), ("auto", "auto", True, True, "bf16-mixed"),
        ("auto", "cuda", True, True, "bf16-mixed"), ("auto", "cpu", True, True, "32-true"),
        ("auto", "auto", True, False, "32-true"), ("64-true", "auto", True, True, "64-true"),
    ],
)  # fmt: skip
def test_the_precision_depends_on_the_device(
    monkeypatch: pytest.MonkeyPatch, asked: str, accelerator: str, gpu: bool, bf16: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 and not including_emulation)
    settings = LoopConfig(precision=asked, accelerator=accelerator)  # type: ignore[arg-type]
    assert fabric.resolved_precision(settings) == precision


def test_the_precision_that_was_chosen_is_recorded(tmp_path: Path) -> None:
    run(config(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["precision"] == "32-true"
    assert load_checkpoint(tmp_path / "last.pt")["config"]["precision"] == "32-true"


def test_blocks_are_compiled_each_once() -> None:
    from timm.models.vision_transformer import VisionTransformer

    encoder = Encoder(SimClrConfig(image_size=16, image_model="tiny-vit"))
    with mock.patch.object(nn.Module, "compile", autospec=True) as compiling:
        speed.apply(SimClrConfig(compile=True), encoder)
        assert isinstance(encoder.trunk, VisionTransformer)
        assert [call.args[0] for call in compiling.call_args_list] == [*reversed(encoder.trunk.blocks)]
        compiling.reset_mock()
        speed.apply(SimClrConfig(), encoder)
        assert not compiling.called


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-vit", "tiny-resnet"])
def test_a_compiled_run_is_the_plain_one(pictures: list[str], tmp_path: Path, model: str) -> None:
    arguments = [*pictures, "--image-model", model, "--queue-size", "16"]
    for name, option in (("plain", "--no-compile"), ("compiled", "--compile")):
        assert moco.main([*arguments, option, "--output-dir", str(tmp_path / name)]) == 0
    for ours, theirs in zip(logged(tmp_path / "compiled"), logged(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_activations_are_computed_again(pictures: list[str], tmp_path: Path) -> None:
    arguments = [*pictures, "--image-model", "tiny-vit", "--queue-size", "16", "--max-steps", "2"]
    for name, option in (("plain", "--no-grad-checkpointing"), ("again", "--grad-checkpointing")):
        assert moco.main([*arguments, option, "--output-dir", str(tmp_path / name)]) == 0
    plain, again = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("plain", "again"))
    assert all(torch.allclose(again[name], value, atol=1e-6) for name, value in plain.items())

    encoder = Encoder(SimClrConfig(image_size=16, image_model="tiny-vit"))
    block = encoder.trunk.blocks[0]  # type: ignore[index, union-attr]
    calls: list[object] = []
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    speed.apply(SimClrConfig(grad_checkpointing=True), encoder, encoder.trunk)
    encoder(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).sum().backward()
    assert len(calls) == 2


def test_a_net_that_cannot_compute_activations_again_is_refused(
    pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moco.main([*pictures, "--queue-size", "16", "--grad-checkpointing", "--output-dir", str(tmp_path)]) == 2
    assert "--grad-checkpointing: TinyResNet cannot compute activations again" in capsys.readouterr().err


# ---- the log


def test_tensorboard_may_be_left_out(tmp_path: Path) -> None:
    run(config(tmp_path, tensorboard=False, epochs=1))
    assert not (tmp_path / "tensorboard").exists()
    assert len(logged(tmp_path)) == 6


class FakeRun:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.id = options, options["id"] or "abc"
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The package, of which the runs that it has made are returned."""
    made: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        made.append(FakeRun(options))
        return made[-1]

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    module.__spec__ = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return made


def test_wandb_has_the_log(tmp_path: Path, wandb: list[FakeRun]) -> None:
    folder = tmp_path / "name"
    run(config(folder, wandb="emoji", epochs=1))
    (made,) = wandb
    given = {"project": "emoji", "name": "name", "dir": str(folder), "id": None, "resume": "allow"}
    assert {key: made.options[key] for key in given} == given
    assert made.options["config"]["lr"] == 0.05
    assert [step for step, _ in made.logged] == [1, 2, 3, 4, 5, 6]
    assert made.logged[3][1]["loss"] == logged(folder)[3]["loss"]
    assert made.finished
    run(config(folder, wandb="emoji", epochs=2, resume=folder))
    assert wandb[1].options["id"] == "abc", "it is the same run"
    assert [step for step, _ in wandb[1].logged] == [7, 8, 9, 10, 11, 12]
    run(config(folder, wandb="emoji", epochs=1, overwrite=True))
    assert wandb[2].options["id"] is None


def test_wandb_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--wandb: the package wandb is not installed; pip install wandb$"):
        LoopConfig(wandb="emoji").check()


def test_the_speed_leaves_the_first_step_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which here takes seconds, and the others none."""
    clock = iter([0.0, 0.0, 100.0, 100.0, 100.5, 100.5, 101.5])
    assert run(config(tmp_path / "one", max_steps=1)).images_per_s is None
    monkeypatch.setattr("ssl_kernels.trainers.loop.time", mock.Mock(perf_counter=lambda: next(clock)))
    result = run(config(tmp_path, epochs=1, accumulate=2))
    assert result.steps == 3
    assert result.images_per_s == pytest.approx(16 / 1.5)


def test_a_collapse_is_said_by_every_trainer(
    pictures: list[str], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["--lr", "3", "--clip", "0", "--warmup", "0", "--max-steps", "8"]
    assert moco.main([*pictures, *wild, "--queue-size", "16", "--output-dir", str(tmp_path / "moco")]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("warning: step ")]
    assert len(lines) == 2, "when it is seen, and at the end"
    assert lines[0] == lines[1]
    assert "the embeddings have collapsed: every sample's is the same (spread 0.0" in lines[0]
    assert json.loads((tmp_path / "moco" / "summary.json").read_text())["notes"] == [lines[0]]

    assert siglip.main([*small, "--output-dir", str(tmp_path / "siglip")]) == 0
    assert "warning" not in capsys.readouterr().out
    record = logged(tmp_path / "siglip")[-1]
    assert 0.1 < record["image_std"] <= 1
    assert 1 < record["image_rank"] <= 16
    assert 0.1 < record["text_std"] <= 1
    assert 1 < record["text_rank"] <= 16


def test_a_monitor_warns_once_and_again_after_it_recovered() -> None:
    monitor = SpreadMonitor("they", tolerance=0.1, patience=3)

    def watch(*spreads: float) -> None:
        for spread in spreads:
            monitor(spread)

    with pytest.warns(UserWarning, match="they have collapsed") as caught:
        watch(0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0)
    assert len(caught) == 2
    for options, name in (({"tolerance": 0.0}, "tolerance"), ({"patience": 0}, "patience")):
        with pytest.raises(ValueError, match=name):
            SpreadMonitor(**options)  # type: ignore[arg-type]


# ---- evaluation while training


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    """Also over a resume, which remembers how good it was."""
    scores = iter([0.2, 0.5, 0.5, 0.4])
    seen: list[int] = []

    def evaluate() -> dict[str, float]:
        torch.rand(7)  # which must not be felt
        model.eval()
        seen.append(load_checkpoint(tmp_path / "last.pt")["step"] if (tmp_path / "last.pt").exists() else 0)
        return {"score": next(scores), "other": 1.0}

    torch.manual_seed(3)
    start = Linear(dropout=0.3).state_dict()
    model = Linear(dropout=0.3)
    model.load_state_dict(start)
    options = {"epochs": 3, "eval_every": 1, "log_every": 100}
    run(config(tmp_path, **options), model, evaluate=evaluate)
    assert [r["step"] for r in logged(tmp_path)] == [1, 6, 12, 18]
    assert [r.get("score") for r in logged(tmp_path)] == [None, 0.2, 0.5, 0.5]
    assert logged(tmp_path)[1]["other"] == 1
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 12, "the first of equals"
    assert load_checkpoint(tmp_path / "last.pt")["best"] == {"score": 0.5, "step": 12}
    run(config(tmp_path, **{**options, "epochs": 4}, resume=tmp_path), model, evaluate=evaluate)
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 12


def test_an_evaluation_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(3)
    start = Linear(dropout=0.3).state_dict()
    for name, every in (("with", 1), ("without", 0)):
        model = Linear(dropout=0.3)
        model.load_state_dict(start)

        def evaluate(model: nn.Module = model) -> dict[str, float]:
            model.eval()
            return {"score": float(torch.rand(()))}

        run(config(tmp_path / name, eval_every=every), model, evaluate=evaluate)
    with_it, without = (load_checkpoint(tmp_path / name / "last.pt") for name in ("with", "without"))
    for part in ("model", "optimizer", "rng"):
        assert same_state(with_it[part], without[part]), part


def test_two_epochs_may_lie_between_evaluations(tmp_path: Path) -> None:
    run(config(tmp_path, epochs=5, eval_every=2, log_every=100), evaluate=lambda: {"score": 1.0})
    assert [r["step"] for r in logged(tmp_path) if "score" in r] == [12, 24, 30]


def test_a_new_run_forgets_the_best_of_the_old(tmp_path: Path) -> None:
    run(config(tmp_path, eval_every=1), evaluate=lambda: {"score": 1.0})
    run(config(tmp_path, overwrite=True))
    assert not (tmp_path / "best.pt").exists()


def test_images_are_evaluated_while_they_are_learned(folder: Path, pictures: list[str], tmp_path: Path) -> None:
    """By their neighbours where folders are labels, which the tints of these are; else by distorted views."""
    for name, data, figure in (("labels", folder, "knn_accuracy"), ("none", folder / "red", "instance_r1")):
        arguments = [*pictures, "--data", str(data), "--held-out", "0.25", "--eval-every", "1", "--queue-size", "8"]
        assert moco.main([*arguments, "--epochs", "2", "--output-dir", str(tmp_path / name)]) == 0
        figures = [record[figure] for record in logged(tmp_path / name) if figure in record]
        assert len(figures) == 2
        assert all(0 <= value <= 1 for value in figures)
        assert load_checkpoint(tmp_path / name / "best.pt")["best"]["score"] == max(figures)
    assert max(record["knn_accuracy"] for record in logged(tmp_path / "labels") if "knn_accuracy" in record) > 0.5


def test_pairs_are_evaluated_while_they_are_learned(small: list[str], tmp_path: Path) -> None:
    """The last figure is that of the closing table."""
    assert siglip.main([*small, "--held-out", "0.3", "--eval-every", "2", "--output-dir", str(tmp_path)]) == 0
    records = [record for record in logged(tmp_path) if "retrieval_r1" in record]
    assert len(records) == 2
    table = {f["name"]: f["model"] for f in json.loads((tmp_path / "summary.json").read_text())["figures"]}
    assert records[-1]["text_to_image_r1"] == pytest.approx(table["text->image R@1"])
    assert records[-1]["image_to_text_r1"] == pytest.approx(table["image->text R@1"])
    assert records[-1]["retrieval_r1"] == pytest.approx((table["text->image R@1"] + table["image->text R@1"]) / 2)


def test_without_held_out_data_there_is_no_evaluation(
    pictures: list[str], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, arguments in ((moco.main, [*pictures, "--queue-size", "16"]), (siglip.main, [*small, "--held-out", "0"])):
        assert main([*arguments, "--eval-every", "1", "--output-dir", str(tmp_path)]) == 2
        assert "--eval-every: no " in capsys.readouterr().err


# ---- options from a file


def test_options_come_from_a_file_and_the_command_line_overrides_them(small: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-4\nbatch-size: 16\nbetas: [0.8, 0.9]\ntensorboard: false\nepochs: 9\nlabel_captions: 0\n")
    folder = tmp_path / "a"
    assert siglip.main(["--config", str(path), *small, "--epochs", "1", "--output-dir", str(folder)]) == 0
    saved = json.loads((folder / "config.json").read_text())
    names = ("lr", "batch_size", "betas", "tensorboard", "epochs", "label_captions", "config")
    assert [saved[name] for name in names] == [1e-4, 16, [0.8, 0.9], False, 1, 0, None]

    again = ["--config", str(folder / "config.json"), "--output-dir", str(tmp_path / "b")]
    assert siglip.main(again) == 0
    assert logged(folder) == logged(tmp_path / "b")
    other = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {k: v for k, v in other.items() if k != "output_dir"} == {
        k: v for k, v in saved.items() if k != "output_dir"
    }
    assert siglip.main(["--resume", str(folder), f"--config={folder / 'config.json'}", "--epochs", "2"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lrr: 1\nfoo: 2\n", "run.yaml has options that this command has not: lrr, foo; did you mean lr?"),
        ("zzz: 2\n", "run.yaml has options that this command has not: zzz"),
        ("epochs: many\nlr: 1\n", "run.yaml: epochs: expected a value as --epochs takes, got 'many'"),
        ("lr: 1\naugment: [1]\n", "run.yaml: augment: expected a value as --augment takes, got [1]"),
        ("data:\n", "run.yaml: data: expected a value as --data takes, got None"),
        ("- lr\n", "run.yaml: expected options by name, such as `lr: 0.001`"),
        ("lr: [\n", "run.yaml is neither YAML nor JSON: "),
        (None, "cannot read "),
    ],
)
def test_a_bad_file_of_options_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    assert siglip.main(["--config", str(path), "--output-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{PROG}: error: --config: ")
    assert message in err
    assert err.count("\n") == 1


# ---- weights to start with


def weights(folder: Path) -> dict[str, Tensor]:
    model: dict[str, Tensor] = load_checkpoint(folder / "last.pt")["model"]
    return model


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of MoCo."""
    run_folder = tmp_path_factory.mktemp("trained") / "run"
    sizes = ("--image-size", "16", "--batch-size", "8", "--hidden", "16", "--dim", "8", "--max-steps", "2")
    arguments = ["--data", str(folder), "--held-out", "0", "--accelerator", "cpu", *sizes, "--queue-size", "16"]
    assert moco.main([*arguments, "--output-dir", str(run_folder)]) == 0
    return run_folder


def untrained(model: str = "tiny-resnet", size: int = 16) -> dict[str, nn.Module]:
    """What a method holds: an encoder and a teacher of other widths of the head."""
    settings = SimClrConfig(image_size=size, image_model=model, hidden=32, dim=8)
    return {"encoder": Encoder(settings), "teacher": nn.ModuleDict({"module": Encoder(settings)})}


def is_equal(ours: nn.Module, theirs: dict[str, Tensor], place: str) -> bool:
    state = ours.state_dict()
    return all(torch.equal(value, theirs[f"{place}{name}"]) for name, value in state.items())


def test_a_run_starts_with_the_weights_of_another(
    pictures: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate of zero they stay what they are; queue and pointer are the new run's own."""
    still = [*pictures, "--queue-size", "24", "--max-steps", "1", "--lr", "0", "--seed", "5", "--momentum", "1"]
    assert moco.main([*still, "--init-from", str(trained), "--output-dir", str(tmp_path)]) == 0
    ours, theirs = weights(tmp_path), weights(trained)
    learned = [name for name in theirs if "queue" not in name and "running" not in name and "tracked" not in name]
    assert learned
    assert all(torch.equal(ours[name], theirs[name]) for name in learned if name.startswith("encoder"))
    trunk = [name.removeprefix("encoder.") for name in learned if name.startswith("encoder.trunk")]
    assert all(torch.equal(ours[f"teacher.module.{name}"], theirs[f"encoder.{name}"]) for name in trunk)
    assert ours["queue.keys"].shape == (24, 8)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("--init-from"))
    assert line.startswith(f"--init-from {trained}: loaded ")
    assert "encoder.trunk (" in line
    assert "not loaded" not in line
    assert load_checkpoint(tmp_path / "last.pt")["config"]["init_from"] == str(trained)


def test_trunks_take_the_weights_of_what_the_other_run_is_evaluated_by(trained: Path, tmp_path: Path) -> None:
    """Heads of other widths stay as they are, and the line says so."""
    state = load_checkpoint(trained / "last.pt")
    inputs = {"weights": {"image": "teacher.module."}}
    torch.save({**state, "inputs": inputs}, tmp_path / "last.pt")
    model = nn.ModuleDict(untrained())
    head = model["encoder"].head.state_dict()  # type: ignore[union-attr]
    line = init_from.start_from(str(tmp_path), model)
    for place in (model["encoder"], model["teacher"]["module"]):  # type: ignore[index]
        assert isinstance(place, ImageTower)
        assert is_equal(place.trunk, state["model"], "teacher.module.trunk.")
        assert not is_equal(place.trunk, state["model"], "encoder.trunk.")
    assert all(torch.equal(value, head[name]) for name, value in model["encoder"].head.state_dict().items())  # type: ignore[union-attr]
    assert "; not loaded: encoder.head (" in line
    torch.save({**state, "inputs": {}}, tmp_path / "last.pt")  # of an earlier version
    init_from.start_from(str(tmp_path), model)
    assert is_equal(model["encoder"].trunk, state["model"], "encoder.trunk.")  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("prefix", ["", "trunk.", "visual.trunk."])
def test_a_file_of_weights_fits_whatever_stands_before_its_names(tmp_path: Path, prefix: str) -> None:
    from safetensors.torch import save_file

    source, model = untrained()["encoder"], nn.ModuleDict(untrained())
    assert isinstance(source, ImageTower)
    saved = {f"{prefix}{name}": value.clone() for name, value in source.trunk.state_dict().items()}
    save_file({**saved, "logit_scale": torch.ones(1)}, tmp_path / "model.safetensors")
    init_from.start_from(str(tmp_path / "model.safetensors"), model)
    for tower in (model["encoder"], model["teacher"]["module"]):  # type: ignore[index]
        assert is_equal(tower.trunk, saved, prefix)  # type: ignore[union-attr, arg-type]


def test_positions_of_a_vision_transformer_are_resized(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, model = untrained("tiny-vit")["encoder"], nn.ModuleDict(untrained("tiny-vit", 24))
    assert isinstance(source, ImageTower)
    with torch.no_grad():
        source.trunk.pos_embed[:, 1:] = 3.0  # type: ignore[index, union-attr]
    save_file(source.trunk.state_dict(), tmp_path / "model.safetensors")
    line = init_from.start_from(str(tmp_path / "model.safetensors"), model)
    positions = model["encoder"].trunk.pos_embed  # type: ignore[union-attr]
    assert positions.shape == (1, 37, 96)  # type: ignore[union-attr]
    assert torch.allclose(positions[:, 1:], torch.tensor(3.0), atol=1e-4)  # type: ignore[index]
    assert "encoder.trunk" not in line.partition("not loaded")[2]


def test_a_model_of_timm_gives_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    source = timm.create_model("test_resnet", num_classes=0)
    model = nn.ModuleDict({"encoder": Encoder(SimClrConfig(image_size=32, image_model="test_resnet"))})

    def create(name: str, pretrained: bool, num_classes: int) -> nn.Module:
        assert (name, pretrained, num_classes) == ("test_resnet", True, 0)
        return source

    monkeypatch.setattr(timm, "create_model", create)
    init_from.start_from("test_resnet", model)
    assert is_equal(model["encoder"].trunk, source.state_dict(), "")  # type: ignore[union-attr, arg-type]

    def fail(*_: object, **__: object) -> nn.Module:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        UserError, match=r"^--init-from: cannot get the weights of test_resnet \(ConnectionError: no net"
    ):
        init_from.start_from("test_resnet", model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet_of_dreams",
            "expected a run's folder, a .safetensors file or the name of a model of timm, got 'resnet_",
        ),
        ("absent.safetensors", "cannot read absent.safetensors: "),
        ("absent.pt", "no checkpoint at absent.pt"),
        (".", "no checkpoint at last.pt"),
    ],
)
def test_weights_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--init-from: ") as error:
        init_from.read(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_of_which_none_fits_are_refused(
    pictures: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bias of the head's first layer alone fits, which is no weight to start with."""
    arguments = [*pictures, "--image-model", "tiny-vit", "--dim", "12", "--queue-size", "16"]
    assert moco.main([*arguments, "--init-from", str(trained), "--output-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"--init-from: none of the {len(weights(trained))} weights of {trained} has the name and the shape" in err


def test_a_resumed_run_needs_the_first_weights_no_more(
    pictures: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(trained, tmp_path / "source")
    arguments = [*pictures, "--queue-size", "16", "--init-from", str(source), "--output-dir", str(tmp_path / "run")]
    assert moco.main([*arguments, "--max-steps", "2"]) == 0
    shutil.rmtree(source)
    assert moco.main(["--resume", str(tmp_path / "run"), "--max-steps", "3"]) == 0
    assert "note: --init-from: expected a run's folder" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3


def test_the_interface_of_loggers_is_small() -> None:
    for kind in (loggers.JsonLines, loggers.TensorBoard, loggers.Wandb):
        assert {name for name in vars(kind) if not name.startswith("_")} == {"log", "close"}
