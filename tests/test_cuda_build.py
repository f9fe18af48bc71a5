"""The CUDA C++ kernels without a GPU: when they are loaded and chosen, and what is said where they are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ssl_kernels
from ssl_kernels import _cuda, settings
from ssl_kernels.info import collect
from ssl_kernels.ops import ema, queue

CUDA_TORCH = torch.version.cuda is not None
loaded = pytest.mark.skipif(bool(_cuda.missing), reason=f"the CUDA C++ kernels are missing: {_cuda.missing}")


# ---- which kernel an op will use


def test_report_tells_how_they_were_built_or_why_they_are_missing() -> None:
    report = collect()
    assert report["CUDA C++ kernels"] == (_cuda.missing or f"built by {_cuda.build}")
    for op, otherwise in (("ema_update_", "eager"), ("enqueue_", "triton")):
        assert f"CUDA fp32/bf16/fp16: {otherwise if _cuda.missing else 'cuda'}" in report[op]
    assert "CUDA fp32/bf16/fp16: triton" in report["clip_loss"]


CUDA, CPU = torch.device("cuda"), torch.device("cpu")
ALL, NO_CUDA_CPP = ("cpu", "triton", "cuda"), ("cpu", "triton")


def test_auto_takes_them_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, chosen in (("", "cuda"), ("not built", "triton")):
        monkeypatch.setattr(_cuda, "missing", missing)
        assert settings.choose_backend(CUDA, torch.bfloat16, ALL) == chosen
        assert settings.choose_backend(CUDA, torch.bfloat16, NO_CUDA_CPP) == "triton"
        assert settings.choose_backend(CUDA, torch.float64, ALL) == "eager"
        assert settings.choose_backend(CPU, torch.float32, ALL) == "cpu"
        assert settings.choose_backend(torch.device("mps"), torch.float32, ALL) == "eager"
        with ssl_kernels.use_backend("triton"):
            assert settings.choose_backend(CUDA, torch.float32, ALL) == "triton"


@pytest.mark.parametrize(
    ("missing", "device", "dtype", "kernels", "message"),
    [
        ("", CUDA, torch.float32, NO_CUDA_CPP, "backend 'cuda': this op has no kernel in CUDA C\\+\\+"),
        ("not built", CUDA, torch.float32, ALL, "backend 'cuda': not built"),
        ("", CPU, torch.float32, ALL, "backend 'cuda': expected CUDA tensors, got cpu"),
        ("", CUDA, torch.float64, ALL, "backend 'cuda' has no float64 kernels"),
    ],
)
def test_asked_for_in_vain(
    missing: str,
    device: torch.device,
    dtype: torch.dtype,
    kernels: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_cuda, "missing", missing)
    with ssl_kernels.use_backend("cuda"):
        assert _cuda.missing or settings.choose_backend(CUDA, torch.float32, ALL) == "cuda"
        with pytest.raises(ValueError, match=message):
            settings.choose_backend(device, dtype, kernels)


# ---- what the ops hand to the kernels; the CPU's stand in


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each call of the kernels."""
    seen: list[Any] = []

    def update(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], m: float, there: Any) -> None:
        seen.append((m, there))
        if there is None:
            torch.ops.ssl_kernels.ema_update_(targets, sources, copies, m)

    def enqueue(rows: Tensor, pointer: Tensor, keys: Tensor, normalize: bool) -> None:
        seen.append(keys)
        torch.ops.ssl_kernels.enqueue_rows_(rows, pointer, keys, normalize)

    monkeypatch.setattr(torch.ops.ssl_kernels, "ema_update_cuda_", update, raising=False)
    monkeypatch.setattr(torch.ops.ssl_kernels, "enqueue_cuda_", enqueue, raising=False)
    return seen


def test_tensors_of_any_strides_in_one_call(calls: list[Any]) -> None:
    def make(dtype: torch.dtype) -> list[Tensor]:
        image = torch.randn(2, 3, 4, 5).to(dtype)
        return [image, image.clone(memory_format=torch.channels_last), torch.randn(6, 4).to(dtype)[:, ::2]]

    targets, sources, copies = make(torch.float32), make(torch.bfloat16), make(torch.float16)
    expected = [t.clone() for t in targets]
    m = torch.tensor(0.75, dtype=torch.float64)
    ema.reference(expected, sources, [], m)
    ema._update(targets, sources, copies, m, "cuda")
    torch.testing.assert_close(targets, expected)
    assert all(torch.equal(copy, target.half()) for copy, target in zip(copies, targets, strict=True))
    assert calls == [(0.75, None)]


def test_a_momentum_that_lies_on_the_device_stays_there(calls: list[Any]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        momentum = torch.empty((), dtype=dtype, device="meta")
        ema._update_cuda([torch.ones(2)], [torch.zeros(2)], [], momentum)
        _, there = calls.pop()
        assert there.device.type == "meta"
        assert there.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


def test_keys_come_as_they_are_but_for_rows_of_the_queue(calls: list[Any]) -> None:
    rows, keys = torch.randn(5, 4), torch.randn(3, 8)[:, ::2]
    with pytest.raises(RuntimeError, match="unit stride"):  # the CPU's kernel: that of the GPU takes any
        queue._enqueue(rows, torch.tensor(0), keys, False, "cuda")
    assert calls.pop().data_ptr() == keys.data_ptr()
    expected = torch.cat([rows[:1], rows[:4]])
    queue._enqueue(rows, torch.tensor(1), rows[:4], False, "cuda")
    assert torch.equal(rows, expected)


# ---- the shared object


@loaded
@pytest.mark.parametrize(("device", "named"), [("cpu", "the 'CPU' backend"), ("meta", "Meta tensors")])
def test_other_tensors_are_refused(device: str, named: str) -> None:
    x, pointer = torch.ones(2, 3, device=device), torch.zeros((), dtype=torch.int64, device=device)
    for op, arguments in (
        ("ema_update_cuda_", ([x], [x], [], 0.5, None)),
        ("enqueue_cuda_", (x, pointer, x.clone(), False)),
    ):
        with pytest.raises(NotImplementedError, match=f"ssl_kernels::{op}.*{named}"):
            getattr(torch.ops.ssl_kernels, op)(*arguments)


@loaded
def test_the_binary_keeps_to_the_stable_interfaces_and_names_no_path() -> None:
    from ssl_kernels import _C_cuda  # type: ignore[attr-defined]

    path = Path(_C_cuda.__file__)
    assert path.name.startswith("_C_cuda.abi3")
    content = path.read_bytes()
    for folder in (Path(torch.__file__).parent, path.parent.parent, Path.home()):
        assert f"{folder}/".encode() not in content
    if shutil.which("readelf"):
        needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert "libtorch_cuda" in needed
        assert "torch_python" not in needed
        assert "libpython" not in needed


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package without the CUDA C++ kernels."""
    package = Path(ssl_kernels.__file__).parent
    ignore = shutil.ignore_patterns("_C_cuda*", "__pycache__")
    return Path(shutil.copytree(package, tmp_path / "ssl_kernels", ignore=ignore))


def report_of(copied: Path, before: str = "") -> tuple[str, str]:
    """The line about the kernels, and standard error."""
    # An editable installation would find the modules of the checkout.
    code = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]
import torch
{before}
from ssl_kernels.info import collect
print(collect()["CUDA C++ kernels"])
print(collect()["ema_update_"])
import ssl_kernels.functional as K
K.ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copied.parent,
        env={name: value for name, value in os.environ.items() if name != "SSL_KERNELS_BACKEND"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    line, choice = result.stdout.splitlines()
    assert "CUDA fp32/bf16/fp16: eager" in choice
    return line, result.stderr


def test_without_them_the_report_says_how_to_get_them(copied: Path) -> None:
    line, errors = report_of(copied)
    assert line.startswith("not built; a build from source where nvcc of CUDA" if CUDA_TORCH else "torch")
    assert "RuntimeWarning" not in errors


def test_a_broken_one_is_named_when_the_package_is_imported(copied: Path) -> None:
    (copied / "_C_cuda.abi3.so").write_bytes(b"no shared object")
    line, errors = report_of(copied)
    if CUDA_TORCH:
        assert line.startswith("ssl_kernels._C_cuda cannot be loaded (")
        assert "RuntimeWarning: ssl_kernels: ssl_kernels._C_cuda cannot be loaded (" in errors
    else:
        assert "RuntimeWarning" not in errors


def test_a_torch_without_cuda_does_not_touch_them(copied: Path) -> None:
    """A wheel that holds them serves such a torch too."""
    (copied / "_C_cuda.abi3.so").write_bytes(b"no shared object")
    line, errors = report_of(copied, before="torch.version.cuda = None")
    assert line == f"torch {torch.__version__} is not a CUDA build"
    assert "RuntimeWarning" not in errors
