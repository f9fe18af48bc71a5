"""What is measured, when, and what is remembered of it; the clock and the card are stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

autotune = pytest.importorskip("ssl_kernels.kernels.autotune", reason="Triton is not installed")

CUDA = torch.device("cuda", 0)
SPEEDS = {"wide": 3.0, "narrow": 1.0, "deep": 2.0}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The configurations that were launched, in order. Each launch takes as long as SPEEDS says."""
    ran: list[str] = []

    def clock(launch: Callable[[], Any], device: torch.device) -> float:
        launch()
        return SPEEDS[ran[-1]]

    monkeypatch.setattr(autotune, "_milliseconds", clock)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card (80 GB)")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SSL_KERNELS_AUTOTUNE", "1")
    autotune._remembered.clear()
    yield ran
    autotune._remembered.clear()


def fastest(launch: Callable[[str], Any], shapes: str = "64 x 64", kernel: str = "sigmoid") -> str:
    found: str = autotune.fastest(kernel, shapes, CUDA, list(SPEEDS), launch)
    return found


def test_the_fastest_is_measured_once_for_a_class_of_shapes(launches: list[str]) -> None:
    assert fastest(launches.append) == "narrow"
    first = len(launches)
    assert set(launches) == set(SPEEDS)
    assert fastest(launches.append) == "narrow"
    assert len(launches) == first
    fastest(launches.append, shapes="64 x 128")
    fastest(launches.append, kernel="softmax")
    assert len(launches) == 3 * first


def test_other_processes_read_what_was_found(launches: list[str], tmp_path: Path) -> None:
    fastest(launches.append)
    autotune._remembered.clear()
    launches.clear()
    fastest(launches.append)
    assert launches == []
    (file,) = (tmp_path / "ssl_kernels").iterdir()
    assert file.name.startswith("A-Card-80-GB-ssl_kernels-")
    assert json.loads(file.read_text()) == {"sigmoid 64 x 64": "narrow"}


def test_what_another_process_found_meanwhile_stays(launches: list[str], tmp_path: Path) -> None:
    fastest(launches.append)
    (file,) = (tmp_path / "ssl_kernels").iterdir()
    file.write_text(json.dumps({"sigmoid 64 x 64": "narrow", "koleo 64 x 64": "deep"}))
    fastest(launches.append, shapes="8 x 8")
    assert json.loads(file.read_text()).keys() == {"sigmoid 64 x 64", "koleo 64 x 64", "sigmoid 8 x 8"}


def test_a_process_keeps_to_what_it_has_used(launches: list[str], tmp_path: Path) -> None:
    fastest(launches.append)
    (file,) = (tmp_path / "ssl_kernels").iterdir()
    file.write_text(json.dumps({"sigmoid 64 x 64": "deep"}))
    fastest(launches.append, shapes="8 x 8")
    assert fastest(launches.append) == "narrow"


def test_a_configuration_that_is_no_longer_shipped_is_measured_anew(launches: list[str], tmp_path: Path) -> None:
    fastest(launches.append)
    (file,) = (tmp_path / "ssl_kernels").iterdir()
    file.write_text(json.dumps({"sigmoid 64 x 64": "gone"}))
    autotune._remembered.clear()
    assert fastest(launches.append) == "narrow"
    assert json.loads(file.read_text()) == {"sigmoid 64 x 64": "narrow"}


def test_one_that_does_not_fit_the_card_is_left_out(launches: list[str]) -> None:
    def launch(config: str) -> None:
        if config == "narrow":
            raise autotune.OutOfResources(300_000, 232_448, "shared memory")
        launches.append(config)

    assert fastest(launch) == "deep"

    def refuse(config: str) -> None:
        raise autotune.OutOfResources(300_000, 232_448, "shared memory")

    with pytest.raises(RuntimeError, match=r"sigmoid 1 x 1: none of 3 configurations runs on A Card \(80 GB\)"):
        fastest(refuse, shapes="1 x 1")


@pytest.mark.filterwarnings("ignore:.*cannot be read")
@pytest.mark.parametrize("content", ["{", '["sigmoid"]'])
def test_a_damaged_file_is_replaced(content: str, launches: list[str], tmp_path: Path) -> None:
    fastest(launches.append)
    (file,) = (tmp_path / "ssl_kernels").iterdir()
    file.write_text(content)
    autotune._remembered.clear()
    assert fastest(launches.append) == "narrow"
    assert json.loads(file.read_text()) == {"sigmoid 64 x 64": "narrow"}


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_a_folder_that_cannot_be_written_is_said(
    launches: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="this process alone remembers"):
        assert fastest(launches.append) == "narrow"
    launches.clear()
    assert fastest(launches.append) == "narrow"
    assert launches == []


def test_while_a_graph_is_captured_what_was_measured_before_holds(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(launches.append)
    launches.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest(launches.append) == "narrow"
    autotune._remembered.clear()  # and in the file
    assert fastest(launches.append) == "narrow"
    assert autotune.fastest("sigmoid", "8 x 8", CUDA, list(SPEEDS), launches.append) is None
    assert launches == []


def test_nothing_is_measured_unasked(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert autotune.is_wanted(CUDA)
    assert not autotune.is_wanted(torch.device("cpu"))
    for value in ("", "0"):
        monkeypatch.setenv("SSL_KERNELS_AUTOTUNE", value)
        assert not autotune.is_wanted(CUDA)
    monkeypatch.setenv("SSL_KERNELS_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="SSL_KERNELS_AUTOTUNE: expected 0 or 1, got 'yes'"):
        autotune.is_wanted(CUDA)
