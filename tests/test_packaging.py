"""What the project hands out: version, workflows and citation agree with the checkout; sdist and wheel work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import ssl_kernels

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_changelog_begins_with_what_is_to_come_and_the_version() -> None:
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    numbered = [title.split(" - ")[0] for title in (titles[1:] if titles[0] == "Unreleased" else titles)]
    assert numbered[0] == ssl_kernels.__version__
    assert numbered == sorted(set(numbered), key=Version, reverse=True)


def test_the_version_is_written_once() -> None:
    """Beside the changelog, whose title of it the test above compares."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    written = re.compile(rf"version[\W_]+{re.escape(ssl_kernels.__version__)}\b", re.IGNORECASE)
    places = [name for name in files if name.endswith((".py", ".toml", ".cff", ".md", ".yml"))]
    assert [name for name in places if written.search((ROOT / name).read_text())] == ["ssl_kernels/__init__.py"]


def test_the_citation_is_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "The ssl_kernels developers"}]
    assert not {"url", "repository-code", "doi"} & citation.keys(), "it has a home: say so in pyproject.toml as well"


def jobs() -> list[tuple[str, dict[str, Any]]]:
    found = [
        (f"{path.name}: {name}", job)
        for path in WORKFLOWS
        for name, job in yaml.safe_load(path.read_text())["jobs"].items()
    ]
    assert len(found) >= 8
    return found


def steps() -> list[tuple[str, dict[str, Any]]]:
    return [(name, step) for name, job in jobs() for step in job.get("steps", [])]


def test_workflows_call_what_there_is() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = {(name, target) for name, step in steps() for target in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))}
    assert made
    assert {target for _, target in made} <= targets
    named = re.compile(r"(?<![\w/])(?:\$GITHUB_WORKSPACE/|\./)?((?:tests|\.ci|\.github|ssl_kernels)/[\w./-]+)")
    texts = [path.read_text() for path in WORKFLOWS] + [(ROOT / "pyproject.toml").read_text().replace("{project}/", "")]
    files = {file for text in texts for file in named.findall(text)}
    assert {"tests/check_wheel.py", ".ci/run", ".ci/test_installed"} <= files
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_jobs_end_and_may_do_no_more_than_they_need() -> None:
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}, path.name
    names = {name for name, _ in jobs()}
    for name, job in jobs():
        assert "uses" in job or job["timeout-minutes"] <= 90, name
        assert "needs" not in job or f"{name.split(':')[0]}: {job['needs']}" in names, name
    for name, step in steps():
        action = step.get("uses", "")
        assert not action or re.search(r"@(v\d+|release/v\d+)$", action), (name, action)
        assert "${{" not in step.get("run", ""), f"{name}: a shell takes such a value from its environment"


def test_versions_that_are_tested_are_those_that_are_promised() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML by itself")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons, torches = set(), set()
    for _, job in jobs():
        matrix = job.get("strategy", {}).get("matrix", {})
        for entry in [matrix, *matrix.get("include", [])]:
            for values, key in ((pythons, "python"), (torches, "torch")):
                value = entry.get(key, [])
                values.update([value] if isinstance(value, str) else value)
    (promised,) = (line.removeprefix("torch") for line in project["dependencies"] if line.startswith("torch"))
    for tested, specifier in ((pythons, project["requires-python"]), (torches, promised)):
        assert len(tested) >= 3
        assert all(version in SpecifierSet(specifier) for version in tested)
        oldest = min(map(Version, tested)).release[:2]
        assert specifier == ">=" + ".".join(map(str, oldest)), "the oldest that is promised is tested"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow  # compiles the kernels and fills an environment: minutes
def test_sdist_and_wheel_serve_an_environment_of_their_own(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", build, cwd=source)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    assert sdist.name == f"ssl_kernels-{ssl_kernels.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
        archive.extractall(tmp_path / "unpacked")
    needed = {name for name in tracked if name.startswith(("csrc/", "ssl_kernels/"))}
    texts = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    made = {"PKG-INFO", "setup.cfg", *(name for name in names if name.startswith("ssl_kernels.egg-info/"))}
    assert names == needed | texts | made

    unpacked = tmp_path / "unpacked" / sdist.name.removesuffix(".tar.gz")
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    wish = {"SSL_KERNELS_CUDA": "0", "SSL_KERNELS_NATIVE": "0"}
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", ".", cwd=unpacked, **wish)
    (wheel,) = (unpacked / "dist").glob("*.whl")
    assert wheel.name.startswith(f"ssl_kernels-{ssl_kernels.__version__}-cp310-abi3-")
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert installed == {name for name in needed if name.startswith("ssl_kernels/")} | {"ssl_kernels/_C.abi3.so"}

    home = tmp_path / "venv"
    run(sys.executable, "-m", "venv", home, cwd=tmp_path)
    python = home / "bin" / "python"
    # An older torch than the one that it was built against.
    run(python, "-m", "pip", "install", "-q", "--no-compile", wheel, "torch==2.13.0", cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    shutil.copy(ROOT / "tests" / "check_wheel.py", tmp_path)
    said = run(python, "check_wheel.py", cwd=tmp_path, PYTHONPATH="")
    assert f"loss and gradients of {home}" in said
