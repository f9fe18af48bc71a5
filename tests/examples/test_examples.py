"""Each example learns, and computes what it computes once its few changed lines are changed back to the peer's own."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from processes import run_processes

FOLDER = Path(__file__).resolve().parents[2] / "examples"
ON_ONE_SCREEN = ("siglip", "clip", "moco", "simclr", "dino", "two_tower")
OF_PEERS = sorted({path.stem for path in FOLDER.glob("*.py")} - {*ON_ONE_SCREEN, "shapes"})


# The peers whose own code is on the path, where somebody has put a checkout.
OWN = {name for name in stand_ins.MODULES if "." not in name and importlib.util.find_spec(name)}


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """With its folder on the path, and what it does to the process undone."""
    for module in ("sklearn", "torchvision"):
        pytest.importorskip(module, reason="the packages of the trainers are not installed")
    monkeypatch.syspath_prepend(str(FOLDER))
    for name, module in stand_ins.MODULES.items():
        if name.split(".")[0] not in OWN:
            monkeypatch.setitem(sys.modules, name, module)
    if OWN:  # Meta's losses ask for a group
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    root, environment = logging.getLogger(), dict(os.environ)
    handlers, level, threads = list(root.handlers), root.level, torch.get_num_threads()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    root.handlers[:] = handlers
    root.setLevel(level)
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def source_of(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text()


def changes(source: str) -> list[tuple[str, str]]:
    """The hunks of the docstring's diff: the lines that go, and those that come in their place."""
    hunks = re.findall(r"(?:^    [-+] .*\n)+", source.split('"""')[1], re.MULTILINE)
    sides = [
        ["".join(re.findall(rf"^    {sign} (.*\n)", hunk, re.MULTILINE)) for sign in ("-", r"\+")] for hunk in hunks
    ]
    return [(before, after) for before, after in sides]


def changed_back(source: str) -> str:
    """The example before the change. What came is there once, at some depth."""
    _, docstring, code = source.split('"""', 2)
    for before, after in changes(source):
        places = [depth for depth in ("", " " * 4, " " * 8) if "\n" + textwrap.indent(after, depth) in code]
        assert len(places) == 1, f"expected once: {after}"
        block = "\n" + textwrap.indent(after, places[0])
        assert code.count(block) == 1, f"expected once: {after}"
        code = code.replace(block, "\n" + textwrap.indent(before, places[0]))
    assert "ssl_kernels" not in code
    return f'"""{docstring}"""{code}'


def run(source: str, *arguments: Any, **options: Any) -> Any:
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(source, "example", "exec"), namespace)
    return namespace["main"](*arguments, **options)


# ---- peers

CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # the methods, and how little of each is run
    "accelerate_loop": ((), {"epochs": 2}),
    "lightly_distributed": (("simclr", "barlow"), {"epochs": 2}),
    "lightly_dino": ((), {"epochs": 1, "size": 128}),
    "lightly_moco": ((), {"epochs": 1, "size": 256}),
    "lightly_simclr": ((), {"epochs": 1, "size": 256}),
    "lightning_module": ((), {"epochs": 1}),
    "meta_dino": ((), {"epochs": 3}),
    "meta_dinov2": ((), {"epochs": 1}),
    "meta_dinov3": ((), {"epochs": 1}),
    "open_clip_trainer": (("clip", "siglip"), {"epochs": 2}),
    "solo_moco": (("mocov2plus", "mocov3"), {"epochs": 1}),
    "solo_two_views": (("simclr", "vicreg", "barlow"), {"epochs": 1}),
    "text_embeddings": ((), {"steps": 2, "batch": 16, "chunk": 10, "most": 90, "held_out": 20}),
    "timm_ema": ((), {"epochs": 2}),
    "torch_ema": ((), {"epochs": 2}),
    "transformers_trainer": (("clip", "siglip"), {"steps": 5}),
}
SLOW = [("open_clip_trainer", "siglip")]  # open_clip's trainer is slow, and tests/distributed/ runs both


def curve(found: list[Any]) -> list[float]:
    return [float(step["clip_val_loss"] if isinstance(step, dict) else step) for step in found]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[pytest.mark.slow] if (name, method) in SLOW else [])
        for name, (methods, _) in CASES.items()
        for method in methods or ("",)
    ],
)
def test_the_change_changes_no_loss(name: str, method: str) -> None:
    source = source_of(name)
    before = changed_back(source)
    for package in re.findall(r"^(?:from|import) (\w+)", before, re.MULTILINE):
        if package not in stand_ins.MODULES:
            pytest.importorskip(package, reason=f"{package} is not installed")
    given = (method,) if method else ()
    ours, theirs = (curve(run(text, *given, **CASES[name][1])) for text in (source, before))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert max(ours) > (1 + 1e-3) * min(ours)


def test_every_example_of_a_peer_is_compared() -> None:
    assert sorted(CASES) == OF_PEERS


@pytest.mark.parametrize("name", OF_PEERS)
def test_a_user_changes_three_lines_at_most(name: str) -> None:
    hunks = changes(source_of(name))
    assert 1 <= sum(after.count("\n") for _, after in hunks) <= 3


# ---- methods on one screen


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_held_out_captions_find_their_images(name: str) -> None:
    found = run(source_of(name), steps=60)
    assert found["trained"] > 0.5
    assert found["untrained"] < 0.1


@pytest.mark.parametrize(("name", "steps"), [("moco", 80), ("simclr", 40), ("dino", 60)])
def test_distorted_digits_find_their_kind(name: str, steps: int) -> None:
    found = run(source_of(name), steps=steps)
    assert found["trained"] > max(0.7, found["pixels"] + 0.1, found["untrained"] + 0.1)


def test_new_users_find_their_items() -> None:
    found = run(source_of("two_tower"), steps=120)
    assert found["corrected"] > found["most popular"] + 0.02
    assert found["most popular"] > found["uncorrected"] + 0.1
    assert abs(found["corrected"] - found["full catalogue"]) < 0.05


# ---- all of them


@pytest.mark.parametrize("name", [*ON_ONE_SCREEN, *OF_PEERS])
def test_files_are_short(name: str) -> None:
    assert source_of(name).count("\n") <= 100


def test_the_table_says_what_changes_and_how_to_run_it() -> None:
    table = (FOLDER / "README.md").read_text()
    for name in (*ON_ONE_SCREEN, *OF_PEERS):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| [{name}.py]({name}.py) |")]
        for _, after in changes(source_of(name)):
            assert all(f"`{line.strip()}`" in row for line in after.splitlines())
        assert f"examples/{name}.py" in row


SHORTER = {"text_embeddings": {"batch": 256}}  # what takes minutes on two processors


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ON_ONE_SCREEN, *OF_PEERS])
def test_runs_as_a_script(name: str, tmp_path: Path) -> None:
    command = [str(FOLDER / f"{name}.py")]
    if name in SHORTER:
        command = ["-c", f"import sys; sys.path[0] = {str(FOLDER)!r}; import {name}; {name}.main(**{SHORTER[name]})"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loss" in done.stdout


def printed(*command: str) -> list[str]:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith(("epoch", "held-out"))]


DISTRIBUTED = """
import json, os
from pathlib import Path
import test_examples

os.environ.update(
    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
    TORCHELASTIC_RUN_ID="test",
)
for method in ("simclr", "barlow"):
    losses = test_examples.run(test_examples.source_of("lightly_distributed"), method, epochs=2)
    Path(FOLDER, f"{method} on {rank}").write_text(json.dumps(losses))
"""


@pytest.mark.slow  # tests/distributed/ has the losses; here each process imports Lightning
def test_two_processes_of_lightly_s_losses_train_as_one_does(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); FOLDER = {str(tmp_path)!r}\n{DISTRIBUTED}"
    run_processes(code, tmp_path)
    for method in ("simclr", "barlow"):
        alone = run(source_of("lightly_distributed"), method, epochs=2)
        for rank in range(2):
            assert json.loads((tmp_path / f"{method} on {rank}").read_text()) == pytest.approx(alone, rel=1e-4)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_two_processes_of_accelerate_train_as_one_does() -> None:
    script = str(FOLDER / "accelerate_loop.py")
    alone, two = ([float(line.split()[-1]) for line in printed(*how, script)[:-1]] for how in ((), TORCHRUN))
    assert len(alone) == 20
    assert two == pytest.approx(alone, rel=2e-3)


@pytest.mark.slow
def test_open_clip_s_trainer_learns_under_torchrun() -> None:
    told = printed(*TORCHRUN, str(FOLDER / "open_clip_trainer.py"))
    losses = [float(line.rsplit(maxsplit=1)[1]) for line in told]
    assert len(losses) == 12
    assert losses[-1] < 0.6 * losses[0]
