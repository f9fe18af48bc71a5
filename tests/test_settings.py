"""Backends, workspace and what the environment may set."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run_python

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import settings
from ssl_kernels.ops import panels
from ssl_kernels.ops.panel_shape import (
    clocks,
    clocks_of_half,
    panel_clocks,
    panel_shape,
    product_clocks,
    whole_rows,
)

CPU = torch.device("cpu")
MB_64 = 64 * 2**20


def choose(device: str, dtype: torch.dtype = torch.float32, kernels: tuple[str, ...] = ("cpu", "triton")) -> str:
    return settings.choose_backend(torch.device(device), dtype, kernels)


def test_auto_chooses_by_device_and_dtype() -> None:
    assert choose("cpu") == "cpu"
    assert choose("cpu", torch.bfloat16) == "cpu"
    assert choose("cpu", torch.float64) == "eager"
    assert choose("cuda", torch.float16) == "triton"
    assert choose("cuda", torch.float64) == "eager"
    assert choose("mps") == "eager"


def test_an_op_without_the_kernel_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("cpu", kernels=("triton",)) == "eager"
    assert choose("cuda", kernels=("cpu",)) == "eager"
    with ssl_kernels.use_backend("triton"):
        assert choose("cpu", kernels=("cpu",)) == "eager"


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "message"),
    [
        ("cpu", "cuda", torch.float32, "backend 'cpu': expected CPU tensors, got cuda"),
        ("triton", "cpu", torch.float32, "backend 'triton': expected CUDA tensors, got cpu"),
        ("cpu", "cpu", torch.float64, "backend 'cpu' has no float64 kernels: use 'eager' or 'reference'"),
    ],
)
def test_a_backend_that_cannot_run_says_so(
    backend: str, device: str, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ssl_kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        choose(device, dtype)


def test_use_backend_nests_and_restores_after_an_error() -> None:
    before = settings.current_backend()
    with ssl_kernels.use_backend("eager"):
        with pytest.raises(ZeroDivisionError), ssl_kernels.use_backend("reference"):
            raise ZeroDivisionError
        assert settings.current_backend() == "eager"
    assert settings.current_backend() == before
    with (
        pytest.raises(ValueError, match=r"use_backend: expected one of auto, .* got 'gpu'"),
        ssl_kernels.use_backend("gpu"),
    ):
        pass


def test_backward_uses_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_kernels.ops import sigmoid

    calls = []
    kernel = sigmoid._PANELS["eager"]
    monkeypatch.setitem(sigmoid._PANELS, "eager", lambda *a: calls.append(1) or kernel(*a))
    x = torch.eye(3, requires_grad=True)
    with ssl_kernels.use_backend("eager"):
        loss = K.sigmoid_contrastive_loss(x, x.detach(), 10.0, -10.0, reduction="none")
    loss.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_a_workspace_must_be_positive(bad: float) -> None:
    with pytest.raises(ValueError, match="use_workspace: expected a positive number"), ssl_kernels.use_workspace(bad):
        pass


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
def test_a_tile_budget_must_not_be_negative(bad: float) -> None:
    message = "use_tile_budget: expected a number of megabytes, at least 0, got"
    with pytest.raises(ValueError, match=message), ssl_kernels.use_tile_budget(bad):
        pass


def test_use_tile_budget_nests_and_restores_after_an_error() -> None:
    before = settings.tile_budget_bytes()
    with ssl_kernels.use_tile_budget(0):
        with ssl_kernels.use_tile_budget(1.5):
            assert settings.tile_budget_bytes() == 3 * 2**19
        with pytest.raises(ZeroDivisionError), ssl_kernels.use_tile_budget(2):
            raise ZeroDivisionError
        assert settings.tile_budget_bytes() == 0
    assert settings.tile_budget_bytes() == before


@pytest.mark.parametrize("mb", [64, 1, 0.01, 1e-7])
@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 100_000), (100_000, 1), (4096, 4096), (1025, 70_001)])
@pytest.mark.parametrize("itemsize", [2, 4, 64])
def test_panels_cover_the_matrix_within_the_workspace(
    mb: float, device: str, rows: int, cols: int, itemsize: int
) -> None:
    m, n = panel_shape(rows, cols, 64, itemsize, torch.device(device), int(mb * 2**20))
    assert 1 <= m <= rows
    assert 1 <= n <= cols
    assert m * n * itemsize <= max(mb * 2**20, itemsize)


def test_preferred_panels() -> None:
    cpu = torch.device("cpu")
    assert panel_shape(4096, 4096, 512, 4, cpu, MB_64) == (1024, 1024)
    assert panel_shape(1025, 2100, 512, 4, cpu, MB_64) == (528, 1056)  # near-equal panels, not 1024 + 1
    assert panel_shape(256, 65_536, 512, 4, cpu, MB_64) == (256, 4096)  # few rows: longer panels of the same size
    assert panel_shape(1, 2**20, 1024, 4, cpu, MB_64) == (1, 2**14)  # but not so long that their features outgrow 64 MB


def test_whole_rows_are_taken_where_enough_of_them_fit() -> None:
    assert whole_rows(4096, 8192, 4, MB_64) == 688  # a sixth, 21.5 MB
    assert whole_rows(1024, 2048, 4, MB_64) == 1024  # all, 8 MB
    assert whole_rows(1024, 4096, 4, MB_64) == 512  # not all: 16 MB would be the whole matrix
    assert whole_rows(4096, 65_536, 4, MB_64) == 256
    assert whole_rows(4096, 65_537, 4, MB_64) == 0
    assert whole_rows(100, 2**17, 4, MB_64) == 100  # no more are there


@pytest.mark.parametrize(
    ("l2_mb", "half", "full"), [(50, 4096, 2816), (40, 3584, 2560), (4, 1024, 768), (0, 4096, 2816)]
)
def test_panels_of_a_gpu_stay_in_its_cache(l2_mb: int, half: int, full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = SimpleNamespace(L2_cache_size=l2_mb * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda", 90 + l2_mb)  # what is known of a device is kept
    for itemsize, side in ((2, half), (4, full)):
        assert panel_shape(100 * side, 100 * side, 255, itemsize, device, MB_64) == (side, side)


def test_a_gpu_gets_few_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels keep the tile in registers, its cache sets no limit; a symmetric matrix is not cut into eight."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 * 2**20))
    monkeypatch.setattr(torch.version, "hip", None)
    gpu, cpu = torch.device("cuda", 89), torch.device("cpu")
    assert panel_shape(32_768, 32_768, 64, 0, gpu, MB_64) == (8192, 8192)
    assert panel_shape(8192, 8192, 64, 2, gpu, MB_64, symmetric=True) == (4096, 4096)
    assert panel_shape(4096, 4096, 64, 2, gpu, MB_64, symmetric=True) == (4096, 4096)
    assert panel_shape(4096, 4096, 64, 4, cpu, MB_64, symmetric=True) == (512, 512)


@pytest.mark.parametrize("multiprocessors", [108, 132, 148, 304])
@pytest.mark.parametrize("width", [256, 512, 768, 1152])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1031, 300_000), (4096, 4096), (65_536, 65_536), (200_000, 513)])
def test_panels_of_wide_features_leave_few_multiprocessors_idle(
    rows: int, cols: int, width: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = SimpleNamespace(L2_cache_size=50 * 2**20, multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    device, workspace = torch.device("cuda", multiprocessors % 100), 256 * 2**20
    m, n = panel_shape(rows, cols, width, 2, device, workspace)
    assert (1 <= m <= rows, 1 <= n <= cols) == (True, True)
    assert (m % 256 == 0 or m == rows, n % 256 == 0 or n == cols) == (True, True)
    assert 2 * m * n <= workspace
    assert 4 * width * max(m, n) <= workspace
    assert math.ceil(rows / m) * math.ceil(cols / n) <= 2 * math.ceil(rows * cols / (2**27 - 2**20)) + 2
    if rows == cols == 65_536:
        share = 6 * rows * cols * width / 4096 / multiprocessors / clocks(rows, cols, width, m, n, multiprocessors)
        squares = 6 * rows * cols * width / 4096 / multiprocessors
        squares /= clocks(rows, cols, width, 4096, 4096, multiprocessors)
        assert share > 1.2 * squares
    if (rows, cols, width, multiprocessors) == (65_536, 65_536, 768, 132):
        assert math.ceil(rows / m) * math.ceil(cols / n) == 36  # as the CHANGELOG says


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
@pytest.mark.parametrize("width", [256, 512, 768, 1152])
def test_panels_of_a_symmetric_matrix_leave_few_multiprocessors_idle(
    width: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = SimpleNamespace(L2_cache_size=50 * 2**20, multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    device = torch.device("cuda", multiprocessors % 100)
    for rows in (16_384, 32_768, 131_072, 131_071):
        side, columns = panel_shape(rows, rows, width, 2, device, 256 * 2**20, symmetric=True)
        assert side == columns
        assert side % 256 == 0 or side == rows
        assert 2 * side**2 <= 256 * 2**20
        found = clocks_of_half(rows, width, side, multiprocessors)
        assert found <= 1.0001 * min(
            clocks_of_half(rows, width, s, multiprocessors) for s in (8192, 11_264) if s <= rows
        )
    parts = [3000, 3000, 1000]
    tiles = [panel_clocks(m, n, width, multiprocessors) for k, m in enumerate(parts) for n in parts[k + 1 :]]
    products = [(m, depth, cols) for m in parts for depth, cols in ((m, width), (width, m))]
    on_diagonal = sum(product_clocks(*shape, multiprocessors) for shape in products) + len(parts) * 50_000
    assert clocks_of_half(7000, width, 3000, multiprocessors) == pytest.approx(sum(tiles) + on_diagonal)
    alone = [product_clocks(m, n, width, multiprocessors) for k, m in enumerate(parts) for n in parts[k:]]
    without = clocks_of_half(7000, width, 3000, multiprocessors, gradients=False)
    assert without == pytest.approx(sum(alone) + 6 * 50_000)


def test_a_workspace_that_somebody_set_binds_panels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = SimpleNamespace(L2_cache_size=50 * 2**20, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(settings._workspace_mb, "default", None)  # the documentation's examples set one
    device = torch.device("cuda", 88)
    assert settings.workspace_bytes(device) == 256 * 2**20
    for mb in (64, 1, 0.1, 1e-6):
        with ssl_kernels.use_workspace(mb):
            assert settings.workspace_bytes(device) == int(mb * 2**20)
            m, n = panel_shape(65_536, 65_536, 768, 2, device, settings.workspace_bytes(device))
        assert 2 * m * n <= max(2, mb * 2**20)
        assert max(m, n) == 1 or 4 * 768 * max(m, n) <= mb * 2**20


def test_the_environment_sets_the_defaults() -> None:
    printed = "s.current_backend(), s.workspace_bytes(cpu), s.tile_budget_bytes()"
    code = f"import torch; from ssl_kernels import settings as s; cpu = torch.device('cpu'); print({printed})"
    environment = {"SSL_KERNELS_WORKSPACE_MB": "2", "SSL_KERNELS_TILE_BUDGET_MB": "0"}
    result = run_python(code, SSL_KERNELS_BACKEND="eager", **environment)
    assert result.stdout.split() == ["eager", str(2 * 2**20), "0"], result.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SSL_KERNELS_BACKEND", "fast", "SSL_KERNELS_BACKEND: expected one of auto, reference, .* got 'fast'"),
        ("SSL_KERNELS_WORKSPACE_MB", "big", "SSL_KERNELS_WORKSPACE_MB: expected a positive number .* got 'big'"),
        ("SSL_KERNELS_WORKSPACE_MB", "-3", "SSL_KERNELS_WORKSPACE_MB: expected a positive number .* got '-3'"),
        ("SSL_KERNELS_TILE_BUDGET_MB", "-1", "SSL_KERNELS_TILE_BUDGET_MB: expected a number .* at least 0, got '-1'"),
        ("SSL_KERNELS_TILE_BUDGET_MB", "all", "SSL_KERNELS_TILE_BUDGET_MB: expected a number .* at least 0, got 'all'"),
    ],
)
def test_a_bad_environment_is_reported_on_import(name: str, value: str, message: str) -> None:
    result = run_python("import ssl_kernels", **{name: value})
    assert result.returncode != 0
    assert re.search(message, result.stderr)


@pytest.mark.parametrize(("capability", "backend"), [((7, 5), "eager"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_gpus_that_triton_does_not_support_run_eagerly(
    capability: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability if index == 1 else (9, 0))
    assert choose("cuda:1") == backend
    assert choose("cuda:0") == "triton"
    assert choose("cpu") == "cpu"


def test_what_suits_a_gpu_is_a_constant_of_a_graph() -> None:
    assert vars(settings._triton_suits) == vars(torch.compiler.assume_constant_result(lambda: None))


def test_the_compiler_is_not_imported_with_the_package() -> None:
    code = "import sys, ssl_kernels; print(*{'torch._dynamo', 'torch._inductor', 'sympy'} & {*sys.modules}, 'loaded')"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip() == "loaded"


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("ssl_kernels.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(ssl_kernels, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    message = "backend 'triton': Triton is not installed; install it or use_backend"
    with ssl_kernels.use_backend("triton"), pytest.raises(ImportError, match=message):
        K.koleo_loss(torch.eye(3))


def test_the_choice_of_a_backend_is_part_of_a_graph() -> None:
    """Whatever it asks of the GPU is settled when the graph is made."""

    def doubled_where_eager(x: torch.Tensor) -> torch.Tensor:
        return 2 * x if choose("cuda:0") == "eager" else x

    compiled = torch.compile(doubled_where_eager, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(())), doubled_where_eager(torch.ones(())))


def test_blocks_may_be_left_in_any_order() -> None:
    before = settings.current_backend()
    first, second = ssl_kernels.use_backend("eager"), ssl_kernels.use_backend("reference")
    with contextlib.ExitStack() as stack:
        stack.enter_context(first)
        second.__enter__()
    assert settings.current_backend() == "reference"
    second.__exit__(None, None, None)
    assert settings.current_backend() == before
    assert torch.compile(settings.current_backend, fullgraph=True, backend="eager")() == before


def test_blocks_are_of_their_own_thread_and_task() -> None:
    async def task(name: str) -> str:
        with ssl_kernels.use_backend(name):
            await asyncio.sleep(0)
            return settings.current_backend()

    async def tasks() -> list[str]:
        return await asyncio.gather(task("eager"), task("reference"))

    before = settings.current_backend()
    with ssl_kernels.use_backend("eager"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(settings.current_backend).result() == before
    assert asyncio.run(tasks()) == ["eager", "reference"]


def test_defaults_are_those_of_all_threads() -> None:
    before = (settings.current_backend(), settings.workspace_bytes(CPU) / 2**20, settings.tile_budget_bytes() / 2**20)
    try:
        ssl_kernels.set_defaults(backend="eager", workspace_mb=2)
        with pytest.raises(ValueError, match="tile_budget_mb: expected a number of megabytes, at least 0, got -1"):
            ssl_kernels.set_defaults(backend="reference", tile_budget_mb=-1)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(settings.current_backend).result() == "eager"
            assert pool.submit(settings.workspace_bytes, CPU).result() == 2 * 2**20
        with ssl_kernels.use_backend("auto"):
            assert settings.current_backend() == "auto"
        assert settings.tile_budget_bytes() / 2**20 == before[2]
    finally:
        ssl_kernels.set_defaults(backend=before[0], workspace_mb=before[1], tile_budget_mb=before[2])


def test_settings_are_read_once_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever another thread sets meanwhile, the second pass has the panels of the first, and backward of forward."""
    x = torch.nn.functional.normalize(torch.randn(40, 4), dim=1)
    inner = panels.add_matmul

    def gradients(loss: Any, **options: Any) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_(), x.flip(0).requires_grad_()]
        loss(*leaves, 5.0, **options).sum().backward()
        return [leaf.grad for leaf in leaves]

    def meddling(*args: Any, **options: Any) -> None:
        ssl_kernels.set_defaults(workspace_mb=next(sizes))
        inner(*args, **options)

    losses = [(K.clip_loss, {}), (K.clip_loss, {"reduction": "none"}), (K.nt_xent_loss, {})]
    losses.append((functools.partial(K.sigmoid_contrastive_loss, bias=-5.0), {"reduction": "none"}))
    for loss, options in losses:
        expected = gradients(loss, **options)
        sizes = itertools.cycle([64, 0.001, 0.0003])
        with monkeypatch.context() as patch:
            patch.setattr(panels, "add_matmul", meddling)
            try:
                ssl_kernels.set_defaults(workspace_mb=0.001)
                found = gradients(loss, **options)
            finally:
                ssl_kernels.set_defaults(workspace_mb=64)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_threads_do_not_see_each_others_workspace() -> None:
    """A loss of two passes in one thread, while another enters and leaves blocks of another workspace."""
    stop = threading.Event()

    def toggle() -> None:
        while not stop.is_set():
            with ssl_kernels.use_workspace(0.01):
                pass

    x = torch.nn.functional.normalize(torch.randn(600, 4), dim=1).requires_grad_()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(toggle)
        try:
            for _ in range(20):
                K.clip_loss(x, x, 10.0).backward()
        finally:
            stop.set()
