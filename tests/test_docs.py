"""What README.md and docs/ print: code runs, commands parse, links lead somewhere, names exist, none is missing."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import inspect
import json
import pkgutil
import re
import shlex
from collections.abc import Callable, Iterator
from itertools import dropwhile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist

import ssl_kernels.integrations
from ssl_kernels.cli import TRAINERS, USES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", ROOT / "tests/README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
BEGIN_WITH_RUNS = {"docs/using_models.md"}
RUN_ELSEWHERE = {"docs/tour.md"}  # in tests/examples/test_tour.py, at a small size


def blocks(name: str, language: str) -> list[tuple[int, str]]:
    """The line that each begins at, and its text."""
    text = TEXTS[name]
    return [(text[: m.start()].count("\n") + 1, m[3]) for m in FENCE.finditer(text) if m[2] == language]


def spans(name: str) -> list[str]:
    """Code within sentences."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", TEXTS[name]))


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As torchrun starts it; without a port of its own, for there is nobody to be found by."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def runs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page finds that begins where `make demo` ended: a run, here of untrained towers, and photographs."""
    if request.node.callspec.params["name"] not in BEGIN_WITH_RUNS:
        return
    import torch
    from PIL import Image

    from ssl_kernels.trainers import inputs
    from ssl_kernels.trainers.models import TowerConfig, image_tower, text_tower
    from ssl_kernels.trainers.siglip import SigLip

    config = TowerConfig()
    model = SigLip(image_tower(config, 40, inverted=True), text_tower(config), ssl_kernels.SigLipLoss())
    (tmp_path / "runs/demo").mkdir(parents=True)
    about = {"inputs": inputs.of_pairs("SigLIP", model, config), "config": {"data": "openmoji"}}
    others = dict.fromkeys(("optimizer", "step", "total", "data", "rng", "elapsed_s"))
    torch.save({**about, **others, "model": model.state_dict()}, tmp_path / "runs/demo/last.pt")
    figure = {"name": "text->image R@1", "model": 0.5, "chance": 0.003}
    (tmp_path / "runs/demo/summary.json").write_text(json.dumps({"figures": [figure]}))
    (tmp_path / "photos").mkdir()
    for name in ("heart", "cat"):
        Image.new("RGB", (50, 40), "red").save(tmp_path / f"photos/{name}.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("one_process", "runs")
@pytest.mark.parametrize("name", [name for name in sorted(TEXTS.keys() - RUN_ELSEWHERE) if blocks(name, "python")])
def test_python_runs(name: str) -> None:
    """The blocks of a page follow each other, as a reader pastes them."""
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for line, block in blocks(name, "python"):
            if ">>>" in block:
                test = doctest.DocTestParser().get_doctest(block, names, name, name, line)
                runner = doctest.DocTestRunner(verbose=False)
                assert runner.run(test, clear_globs=False).failed == 0, f"{name}:{line}"
                names = test.globs
            else:
                exec(compile("\n" * line + block, ROOT / name, "exec"), names)
    finally:
        ssl_kernels.set_defaults(backend="auto", workspace_mb=64, tile_budget_mb=64)


def trainer(name: str) -> ModuleType:
    return importlib.import_module(f"ssl_kernels.trainers.{name}")


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands read their arguments, trainers check them, and all stop. Data that they name are there, and empty."""
    from ssl_kernels.bench import command as bench
    from ssl_kernels.trainers import check, command
    from ssl_kernels.trainers.data.faults import Faults
    from ssl_kernels.trainers.evaluation import compare
    from ssl_kernels.trainers.use import command as use

    for name in ("pairs.csv", *(f"shards-{number:03}.tar" for number in range(100))):
        (tmp_path / name).touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "run.yaml").write_text("lr: 0.001\n")
    monkeypatch.chdir(tmp_path)

    def run(kind: type[Any], train: object, argv: list[str], prog: str) -> int:
        if "--resume" in argv:  # what it names is in no checkout
            at = argv.index("--resume")
            argv = argv[:at] + argv[at + 2 :]
        command.parse(kind, argv, prog).check()
        return 0

    def measure(options: object, console: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(use, "run", run)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(compare, "main", lambda folders: 0)
    monkeypatch.setattr(check, "check", lambda config, console: check.Report(0, Faults(), Faults()))


def is_command(words: list[str]) -> bool:
    """Whether there is such a command here, with such arguments. Nothing is run but parsers."""
    from ssl_kernels import cli

    words = [*dropwhile(re.compile(r"[A-Z_]+=").match, words)]  # variables before it
    if words[0] == "tar":
        return True
    if words[0] == "torchrun":
        words = ["ssl-kernels", *words[words.index("ssl_kernels.cli") + 1 :]] if "-m" in words else words[3:]
    if words[0] == "ssl-kernels":
        try:
            return cli.main(words[1:]) == 0
        except SystemExit as stop:  # with 0 after --help, and where `bench` would measure
            return stop.code == 0
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        return all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
    if words[:2] == ["pip", "install"]:
        project = (ROOT / "pyproject.toml").read_text()
        extras = [match[1] for word in words if (match := re.fullmatch(r"\.\[([\w,]+)\]", word))]
        return all(
            re.search(rf"^{extra} = \[", project, re.MULTILINE) for found in extras for extra in found.split(",")
        )
    pythons = ("python", "python3", ".venv/bin/python")
    if words[:2] == ["pip", "download"]:
        return words[-1] in (ROOT / "benchmarks/gpu_bench.py").read_text()
    if words[0] in pythons and words[1] == "-m":
        return importlib.util.find_spec(words[2]) is not None
    return words[0] in pythons and (ROOT / words[1]).is_file()


@pytest.mark.usefixtures("parsed_only")
@pytest.mark.parametrize("name", [name for name in TEXTS if blocks(name, "sh")])
def test_commands_parse(name: str) -> None:
    for first, block in blocks(name, "sh"):
        for line, text in enumerate(block.splitlines(), first + 1):
            words = shlex.split(text, comments=True)
            assert not words or is_command(words), f"{name}:{line}: {text}"


def test_options_exist() -> None:
    """Those that sentences name, and what `make` is told in them."""
    from ssl_kernels.trainers import check

    modules = [trainer(name) for name in (*TRAINERS, *(f"use.{name}" for name in USES))]
    configs = [value for module in modules for value in vars(module).values() if dataclasses.is_dataclass(value)]
    configs.append(check.CheckConfig)
    options = {f"--{field.name.replace('_', '-')}" for config in configs for field in dataclasses.fields(config)}
    options |= {"--help", "--no-build-isolation"}
    for name in TEXTS.keys() - {"CONTRIBUTING.md"}:
        for span in spans(name):
            if span.startswith("--"):
                assert span.split()[0] in options, f"{name}: {span}"
            if span.startswith("make "):
                assert is_command(span.split()), f"{name}: {span}"


@pytest.mark.parametrize("name", TEXTS)
def test_names_exist(name: str) -> None:
    for span in spans(name):
        if re.fullmatch(r"(ssl_kernels|K)(\.[A-Za-z]\w*)+", span):
            pkgutil.resolve_name(re.sub(r"^K\.", "ssl_kernels.functional.", span))


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    """Files and headings, as a reader of the repository follows them."""
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", FENCE.sub("", TEXTS[name])):
        path, _, anchor = target.partition("#")
        page = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert page.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, (
                f"{name}: {target}"
            )


def test_every_setting_is_told() -> None:
    """Environment variables that the sources read, and settings of `set_defaults`."""
    sources = [ROOT / "setup.py", *(ROOT / "ssl_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]
    sources += [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    sources.remove(Path(__file__))
    read = {name for path in sources for name in re.findall(r"SSL_KERNELS_[A-Z_]*[A-Z]", path.read_text("utf-8"))}
    page = TEXTS["docs/settings.md"]
    assert read == set(re.findall(r"SSL_KERNELS_[A-Z_]*[A-Z]", page))
    for name in ("use_backend", "use_workspace", "use_tile_budget", *ssl_kernels.set_defaults.__kwdefaults__):
        assert f"{name}" in page
    assert set(re.findall(r"^\| `(\w+)` \|", page.partition("## Memory")[0], re.MULTILINE)) == {
        *ssl_kernels.settings.BACKENDS
    }


def public_names() -> set[str]:
    """Of modules that users import: what is defined there, without an underscore."""
    hidden = {"__version__", "functional", "grad_cache"}  # the last is a function in a module of its name
    names = {f"ssl_kernels.{name}" for name in ssl_kernels.__all__ if name not in hidden}
    names |= {f"ssl_kernels.functional.{name}" for name in ssl_kernels.functional.__all__}
    modules = [f"ssl_kernels.integrations.{m.name}" for m in pkgutil.iter_modules(ssl_kernels.integrations.__path__)]
    for module in (*modules, "ssl_kernels.schedules"):
        for name, value in vars(importlib.import_module(module)).items():
            if getattr(value, "__module__", None) == module and not name.startswith("_"):
                names.add(f"{module}.{name}")
    base = {"ssl_kernels.integrations.dinov2.CenteredLoss"}  # what the losses there inherit from
    others = {
        "trainers.load",
        "trainers.use.trained.Trained",
        "ema.ema_multi_avg_fn",
        "collapse.SpreadMonitor",
        "collapse.CollapseWarning",
        "grad_cache.grad_cache",
    }
    others |= {"distributed", "distributed.gather_rows"}
    return names - base | {f"ssl_kernels.{name}" for name in others}


def test_the_api_reference_is_whole() -> None:
    told = [name for text in TEXTS.values() for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    assert sorted(told) == sorted(public_names())


def test_every_argument_is_told() -> None:
    """In the docstring of a function or class; public methods have one of their own."""
    for name in public_names() - {"ssl_kernels.distributed", "ssl_kernels.collapse.CollapseWarning"}:
        value = pkgutil.resolve_name(name)
        for argument in inspect.signature(value).parameters.keys() - {"args", "kwargs"}:
            assert re.search(rf"\b{argument}\b", value.__doc__), f"{name}: {argument}"
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isfunction(function) and not method.startswith("_") and method != "extra_repr":
                assert function.__doc__, f"{name}.{method}"


@pytest.mark.parametrize(
    ("check", "page", "message"),
    [
        (test_python_runs, "```python\nassert 0, 'as told'\n```\n", "as told"),
        (test_python_runs, "```python\n>>> 1 + 1\n3\n```\n", "planted.md:1"),
        *(
            (test_commands_parse, f"```sh\n{command}\n```\n", f"planted.md:2: {command}")
            for command in (
                "ssl-kernels train siglip --epoch 3",
                "ssl-kernels train sigmoid --help",
                "ssl-kernels bench sigmoids",
                "ssl-kernels bench --quickly",
                "ssl-kernels compare",
                "ssl-kernels embed runs/demo photos",
                "ssl-kernels search runs/demo photos --queries x",
                "make tea",
                'pip install ".[tea]"',
            )
        ),
        (test_commands_parse, "```sh\nssl-kernels train dino --momentum 3\n```\n", "--momentum"),
        (test_names_exist, "`K.clip_lost`", "has no attribute 'clip_lost'"),
        (test_names_exist, "`ssl_kernels.ClipLost`", "has no attribute 'ClipLost'"),
        (test_links_lead_somewhere, "[a](docs/no.md)", "planted.md: docs/no.md"),
        (
            test_links_lead_somewhere,
            "[a](docs/install.md#no-such-heading)",
            "planted.md: docs/install.md#no-such-heading",
        ),
    ],
)
@pytest.mark.usefixtures("parsed_only")
def test_these_tests_can_fail(
    check: Callable[[str], None], page: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEXTS, "planted.md", page)
    with pytest.raises(Exception, match=re.escape(message)):
        check("planted.md")


def test_the_site_names_every_page() -> None:
    """mkdocs builds what the navigation names; `make docs` fails on what it does not."""
    navigation = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(navigation) == sorted([*(name.removeprefix("docs/") for name in TEXTS), "CHANGELOG.md"])
