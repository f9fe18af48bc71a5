"""Every op on the device against its definition in float64: values, gradients, layouts, and that they repeat."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device_cases import (
    CASES,
    DEVICE,
    DTYPES,
    LARGE,
    ON_GPU,
    SMALL,
    Backends,
    Case,
    Sizes,
    assert_close,
    evaluate,
    every,
    first_of_each,
    fp32_products,
    lay_out,
    reference,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import info
from ssl_kernels.settings import choose_backend

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def test_every_op_has_a_case() -> None:
    assert {case.op for case in CASES} == {*K.__all__}


@dtypes
def test_the_device_s_own_kernels_are_chosen(dtype: torch.dtype) -> None:
    is_old = ON_GPU and torch.version.hip is None and torch.cuda.get_device_capability(DEVICE) < (8, 0)
    expected = "cpu" if not ON_GPU else "eager" if is_old else "triton"
    assert choose_backend(DEVICE, dtype, ("cpu", "triton")) == expected
    assert choose_backend(DEVICE, torch.float64, ("cpu", "triton")) == "eager"


@every
def test_the_route_of_each_op(case: Case) -> None:
    """In both passes, nothing falls back to plain PyTorch in silence."""
    with Backends() as recorded:
        evaluate(case, case.inputs(SMALL))
    if case.op in ("vicreg_loss", "barlow_twins_loss"):  # plain PyTorch but on a CPU
        assert recorded.seen == set()
    else:
        assert recorded.seen == {choose_backend(DEVICE, torch.float32, info.kernels_of(case.op))}


# These read numbers that are on the CPU by contract, or ask first whether what they read is there.
READ_ON_A_CPU = ("_as_number", "_summarise", "_check_targets")
HOST_READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@pytest.mark.skipif(
    choose_backend(DEVICE, torch.float32, ("cpu", "triton")) != "triton", reason="the CPU's kernels read scalars"
)
@every
def test_no_op_reads_a_tensor(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by the calls, where there is no device to wait for; numbers may be read that are on the CPU by contract."""
    inputs = case.inputs(SMALL)

    def refuse(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            ours = Path(caller.f_code.co_filename).is_relative_to(Path(ssl_kernels.__file__).parent / "ops")
            if ours and not (tensor.device.type == "cpu" and caller.f_code.co_name in READ_ON_A_CPU):
                raise AssertionError(f"{name}() in {caller.f_code.co_filename}:{caller.f_lineno}")
            return original(tensor, *args, **kwargs)

        return read

    for name in HOST_READS:
        monkeypatch.setattr(Tensor, name, refuse(name, getattr(Tensor, name)))
    evaluate(case, inputs)


def compare(case: Case, sizes: Sizes, dtype: torch.dtype, layout: str = "contiguous") -> None:
    inputs = lay_out(case, case.inputs(sizes, dtype), layout)
    assert_close(case, evaluate(case, inputs), reference(case, inputs), reference(case, inputs, torch.float64), dtype)


@every
@dtypes
def test_small(case: Case, dtype: torch.dtype) -> None:
    compare(case, SMALL, dtype)


@first_of_each
@dtypes
def test_larger(case: Case, dtype: torch.dtype) -> None:
    compare(case, LARGE, dtype)


@first_of_each
@hypothesis_settings(max_examples=8)  # on a GPU each may compile kernels of its own
@given(
    rows=st.integers(2, 300 if ON_GPU else 40),
    width=st.one_of(st.sampled_from([1, 16, 64]), st.integers(1, 130 if ON_GPU else 20)),
    many=st.integers(4, 700 if ON_GPU else 60),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "stepped", "shifted"]),
)
def test_any_size_and_layout(case: Case, rows: int, width: int, many: int, dtype: torch.dtype, layout: str) -> None:
    if width == 1:  # unit features of one number are 1 or -1: neighbours tie, and columns may not vary at all
        width = 2 if case.op in ("koleo_loss", "barlow_twins_loss", "vicreg_loss") else 1
    compare(case, Sizes(rows, width, many), dtype, layout)


@first_of_each
def test_a_single_row_and_none(case: Case) -> None:
    """As the definition has it, NaN where that is NaN."""
    for rows in (1, 0):
        inputs = case.inputs(Sizes(rows, 5, 7))
        if case.op in ("koleo_loss", "vicreg_loss", "barlow_twins_loss"):
            with pytest.raises(ValueError, match="expected at least 2 rows"):
                evaluate(case, inputs)
            continue
        ours, exact = evaluate(case, inputs), reference(case, inputs, torch.float64)
        for a, o in zip(ours.tensors, exact.tensors, strict=True):
            if a.isnan().any() or o.isnan().any():
                assert torch.equal(a.isnan(), o.isnan())
            torch.testing.assert_close(a.to(o.dtype), o, rtol=1e-4, atol=1e-5, equal_nan=True)


@first_of_each
def test_nan_comes_out_where_nan_went_in(case: Case) -> None:
    inputs = case.inputs(SMALL)
    names = (*case.leaves, "x", "teacher", "target", "new")
    poisoned = next(inputs[name] for name in names if name in inputs)
    poisoned[(0,) * poisoned.dim()] = torch.nan
    assert any(t.isnan().any() for t in evaluate(case, inputs).outputs)


@first_of_each
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_tf32_only_where_asked_for(case: Case, precision: str) -> None:
    if case.searches and precision == "high":
        pytest.skip("TF32 may find another neighbour, as near to within its rounding")
    inputs = case.inputs(SMALL)
    with fp32_products(precision):
        ours, plain = evaluate(case, inputs), reference(case, inputs)
    exact = reference(case, inputs, torch.float64)
    assert_close(case, ours, plain, exact, torch.float32, tf32=precision == "high")


@first_of_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_runs_agree_in_every_bit(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(LARGE, dtype)
    once, again = evaluate(case, inputs), evaluate(case, inputs)
    for a, b in zip(once.tensors, again.tensors, strict=True):
        assert torch.equal(a, b)


@first_of_each
def test_float64_keeps_its_digits(case: Case) -> None:
    """There are no float64 kernels: no step may go through those of float32."""
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in case.inputs(SMALL).items()}
    ours, exact = evaluate(case, inputs), reference(case, inputs)
    for a, o in zip(ours.tensors, exact.tensors, strict=True):
        if a.dtype == torch.float64:
            torch.testing.assert_close(a, o, rtol=1e-9, atol=1e-11)


@first_of_each
def test_autocast(case: Case) -> None:
    """The same as features that were cast before, or as without: to the op's documentation."""
    inputs = case.inputs(SMALL)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours = evaluate(case, inputs)
    exact = reference(case, inputs, torch.float64)
    for a, o in zip(ours.outputs, exact.outputs, strict=True):
        assert a.dtype == (o.dtype if not o.is_floating_point() else torch.float32)
        torch.testing.assert_close(a.double(), o.double(), rtol=0.05, atol=0.05)


@first_of_each
def test_panels_of_any_size_agree(case: Case) -> None:
    inputs = case.inputs(SMALL)
    with ssl_kernels.use_workspace(0.002):
        ours = evaluate(case, inputs)
    assert_close(case, ours, reference(case, inputs), reference(case, inputs, torch.float64), torch.float32)


# What is run of which module: of the first, tests/triton_kernels has the other dtypes.
INTERPRETED = {"values": ("test_small and bfloat16 or test_no_op_reads", 2 * len(CASES)), "tiles": ("test", 80)}


@pytest.mark.slow  # tests/triton_kernels interprets the same kernels, and these cases run on the CPU's kernels
@pytest.mark.skipif(ON_GPU, reason="the kernels themselves run")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that run")
@pytest.mark.parametrize("module", INTERPRETED)
def test_the_triton_kernels_pass_these_tests_when_interpreted(module: str) -> None:
    """So that what is asked of a GPU is what its kernels do, to the rounding of each product."""
    pytest.importorskip("triton")
    here = Path(__file__).parent
    folders = [here, here.parent / "triton_kernels", os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "SSL_KERNELS_BACKEND": "triton", "SSL_KERNELS_TEST_DEVICE": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }  # fmt: skip
    wanted, least = INTERPRETED[module]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "interpreted"]
    run = subprocess.run(
        [*command, str(here / f"test_gpu_{module}.py"), "-k", wanted], cwd=here.parent.parent, env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.findall(r"(\d+) passed", run.stdout)[-1]) >= least
