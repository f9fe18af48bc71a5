"""The moving average of a list of tensors: values, layouts, exact ends, autograd, shared memory, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory import linux_only, peak_mb
from torch import Tensor, nn

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.ops import ema
from ssl_kernels.ops.ema import _update, reference

BACKENDS = ("reference", "eager", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "transposed", "slice", "column", "flipped axes")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values [A, B, C, D] in memory of that layout; what lies beside them is 7."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "flipped axes":
        return values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if layout in ("slice", "column"):
        a, b, c, d = values.shape
        around = torch.full((a, b, c, d + 3) if layout == "slice" else (a, b, c, d, 2), 7.0, dtype=values.dtype)
        inside = around[..., :d] if layout == "slice" else around[..., 0]
        return inside.copy_(values)
    return values.clone()


def exact(target: Tensor, source: Tensor, m: float) -> Tensor:
    return m * target.double() + (1 - m) * source.double()


# ---- values


entries = st.tuples(
    st.tuples(*[st.integers(0, 5)] * 3, st.integers(0, 70)),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from((None, *DTYPES)),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
)
momenta = st.one_of(st.sampled_from([0.0, 0.5, 0.999, 0.9999, 1.0]), st.floats(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    drawn=st.lists(entries, max_size=6), m=momenta, as_tensor=st.booleans(), double=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_follows_the_equation(
    backend: str, drawn: list[Any], m: float, as_tensor: bool, double: bool, size: float, seed: int
) -> None:
    """Any list, against float64, and no worse than twice plain arithmetic of the same dtypes."""
    torch.manual_seed(seed)
    targets, sources, copies = [], [], []
    for shape, target_dtype, source_dtype, copy_dtype, layout, other in drawn:
        wide = torch.float64 if double and backend != "cpu" else target_dtype  # which has no kernel for it
        targets.append(laid_out((size * torch.randn(shape)).to(wide), layout))
        sources.append(laid_out((size * torch.randn(shape)).to(source_dtype), other))
        copies.append(None if copy_dtype is None else laid_out(torch.zeros(shape, dtype=copy_dtype), layout))
    plain = [target.clone() for target in targets]
    reference(plain, sources, [], torch.tensor(m, dtype=torch.float64))
    expected = [exact(t, s, m) for t, s in zip(targets, sources, strict=True)]
    with ssl_kernels.use_backend(backend):
        K.ema_update_(targets, sources, torch.tensor([m], dtype=torch.float64) if as_tensor else m, copies)
    for target, source, there, same_dtype, other in zip(targets, sources, expected, plain, copies, strict=True):
        if target.numel():
            tolerance = 1e-15 if target.dtype == torch.float64 else 3e-7
            allowed = 2 * (same_dtype.double() - there).abs().max()
            allowed += tolerance * (there.abs().max() + source.double().abs().max())
            assert (target.double() - there).abs().max() <= allowed
        if other is not None:
            assert torch.equal(other, target.to(other.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["slice", "column"])
def test_memory_beside_a_view_stays_as_it_was(backend: str, layout: str) -> None:
    target, beside = (laid_out(torch.randn(2, 3, 4, 5), layout) for _ in range(2))
    with ssl_kernels.use_backend(backend):
        K.ema_update_([target], [torch.randn(2, 3, 4, 5)], 0.5, [beside])
    for tensor in (target, beside):
        assert tensor._base is not None
        outside = tensor._base[..., 5:] if layout == "slice" else tensor._base[..., 1]
        assert (outside == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("target_dtype", "source_dtype"), itertools.product((*DTYPES, torch.float64), repeat=2))
def test_every_pair_of_dtypes(backend: str, target_dtype: torch.dtype, source_dtype: torch.dtype) -> None:
    target, source = torch.full((3,), 4.0, dtype=target_dtype), torch.full((3,), 8.0, dtype=source_dtype)
    beside = torch.zeros(3, dtype=torch.float64)
    with ssl_kernels.use_backend("auto" if backend == "cpu" else backend):
        K.ema_update_([target], [source], 0.75, [beside])
    assert target.tolist() == beside.tolist() == [5.0] * 3


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("m", [0.0, 0.75, 1.0])
def test_a_momentum_that_the_host_does_not_read(monkeypatch: pytest.MonkeyPatch, backend: str, m: float) -> None:
    """As one on a GPU: it stays a tensor all the way."""
    monkeypatch.setattr(ema, "_as_number", lambda momentum: momentum)
    targets, sources = ([torch.full((3,), value, dtype=dtype) for dtype in DTYPES] for value in (4.0, 8.0))
    with ssl_kernels.use_backend(backend):
        K.ema_update_(targets, sources, torch.tensor(m))
    assert [target.tolist() for target in targets] == [[8.0 - 4.0 * m] * 3] * len(DTYPES)


def test_float64_keeps_its_digits() -> None:
    target, source = torch.randn(100, dtype=torch.float64), torch.randn(100)
    expected = exact(target, source, 0.9)
    K.ema_update_([target], [source], 0.9)
    torch.testing.assert_close(target, expected, rtol=1e-15, atol=1e-15)


SPECIAL = [0.0, -0.0, 1.5, torch.inf, -torch.inf, torch.nan, 6e4, 1e-7]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0.0, 1.0])
def test_momentum_one_keeps_every_bit_and_zero_takes_every_bit(backend: str, dtype: torch.dtype, m: float) -> None:
    pairs = list(itertools.product(SPECIAL, repeat=2))
    targets = [torch.tensor([pair[0] for pair in pairs], dtype=dtype)]
    sources = [torch.tensor([pair[1] for pair in pairs], dtype=dtype)]
    wanted = (targets if m else sources)[0].clone()
    with ssl_kernels.use_backend(backend):
        K.ema_update_(targets, sources, m)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(targets[0].isnan(), wanted.isnan())
    numbers = ~wanted.isnan()
    assert torch.equal(targets[0].view(integers)[numbers], wanted.view(integers)[numbers])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_come_through(backend: str) -> None:
    target = torch.tensor([torch.nan, 1.0, torch.inf, 1.0, torch.inf])
    source = torch.tensor([1.0, torch.nan, 1.0, -torch.inf, -torch.inf])
    with ssl_kernels.use_backend(backend):
        K.ema_update_([target], [source], 0.9)
    assert target[[0, 1, 4]].isnan().all()
    assert not target[2:4].isfinite().any()


def test_infinities_that_agree_stay() -> None:
    """As in a mask among a model's buffers."""
    target = torch.tensor([-torch.inf, 2.0, torch.inf] * 7)
    expected = target.clone()
    K.ema_update_([target], [target.clone()], 0.25)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("m", [0.3, 0.99])
def test_the_result_depends_neither_on_threads_nor_on_how_tensors_are_cut(m: float) -> None:
    sizes = [1] * 3000 + [100_003, 0, 70_001, 17]
    start, towards = torch.randn(sum(sizes)), torch.randn(sum(sizes)).bfloat16()
    results = []
    before = torch.get_num_threads()
    try:
        for threads, whole in ((1, False), (1, True), (3, False), (2, True)):
            torch.set_num_threads(threads)
            target, source = start.clone(), towards.clone()
            beside = torch.empty(sum(sizes), dtype=torch.float16)
            lists = [[t] if whole else t.split(sizes) for t in (target, source, beside)]
            K.ema_update_(lists[0], lists[1], m, lists[2])
            results.append((target, beside))
    finally:
        torch.set_num_threads(before)
    for target, beside in results[1:]:
        assert torch.equal(target, results[0][0])
        assert torch.equal(beside, results[0][1])


def test_uninitialised_memory_is_written_not_read(poisoned_memory: None) -> None:
    target, beside = torch.empty(1000), torch.empty(1000, dtype=torch.bfloat16)
    K.ema_update_([target], [torch.ones(1000)], 0.0, [beside])
    K.ema_update_([target], [torch.zeros(1000)], 0.75, [beside])
    assert (target == 0.75).all()
    assert (beside == 0.75).all()


def test_what_may_be_a_list() -> None:
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = [exact(t, s, 0.5) for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    K.ema_update_(teacher.parameters(), tuple(student.parameters()), 0.5)
    for target, wanted in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(target.double(), wanted, rtol=1e-6, atol=1e-7)
    K.ema_update_([], [], 0.5)
    K.ema_update_([torch.zeros(0, 3)], [torch.zeros(0, 3)], 0.5, [torch.zeros(0, 3)])


# ---- autograd and torch's machinery


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_are_constants_to_autograd(backend: str) -> None:
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    with ssl_kernels.use_backend(backend):
        K.ema_update_(teacher.parameters(), student.parameters(), 0.5)
    for parameter in (*teacher.parameters(), *student.parameters()):
        assert parameter.requires_grad
        assert parameter.is_leaf


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("written", ["target", "copy"])
def test_autograd_sees_that_values_have_changed(backend: str, written: str) -> None:
    """A loss that keeps them for its backward pass fails loudly instead of using the new ones."""
    x, target, beside = torch.randn(4, requires_grad=True), torch.randn(4), torch.randn(4)
    loss = (x * (target if written == "target" else beside)).sum()
    with ssl_kernels.use_backend(backend):
        K.ema_update_([target], [torch.randn(4)], 0.5, [beside])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_opcheck(backend: str) -> None:
    for target_dtype, source_dtype in itertools.product(DTYPES, repeat=2):
        for count in (0, 1, 2):
            targets = [torch.randn(3, 4).to(target_dtype), torch.randn(5).to(target_dtype)]
            sources = [torch.randn(3, 4).to(source_dtype), torch.randn(5).to(source_dtype)]
            copies = [torch.zeros(3, 4), torch.zeros(5)][:count]
            torch.library.opcheck(_update, (targets, sources, copies, torch.tensor(0.9), backend))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_compiles_without_a_graph_break(compiler: str, as_tensor: bool) -> None:
    """Also when every step has a momentum of its own: more of them than torch.compile would compile anew."""
    torch._dynamo.reset()

    def step(targets: list[Tensor], sources: list[Tensor], m: Tensor | float, copies: list[Tensor | None]) -> Tensor:
        K.ema_update_(targets, [2 * source for source in sources], m, copies)
        return targets[0].sum()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    targets, copies = [[torch.zeros(3, 4), torch.zeros(5)] for _ in range(2)], [torch.zeros(5) for _ in range(2)]
    for number in range(20):
        sources = [torch.randn(3, 4), torch.randn(5).bfloat16()]
        m = 0.5 + number / 50
        sums = [
            call(targets[i], sources, torch.tensor(m) if as_tensor else m, [None, copies[i]])
            for i, call in enumerate((compiled, step))
        ]
        torch.testing.assert_close(*sums)
    for one, other in ((targets[0], targets[1]), (copies[:1], copies[1:])):
        torch.testing.assert_close(one, other)


def test_inference_mode_and_autocast() -> None:
    target, source = torch.zeros(3), torch.tensor([1.0, 2**-20, 3.0])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        K.ema_update_([target], [source], 0.75)
    assert torch.equal(target, source / 4)


def test_inference_tensors_are_updated() -> None:
    with torch.inference_mode():
        target = torch.zeros(3)
    K.ema_update_([target], [torch.ones(3)], 0.75)
    assert torch.equal(target, torch.full((3,), 0.25))


@pytest.mark.parametrize("m", [0.5, torch.tensor(0.5), torch.tensor(0.5, device="meta")])
def test_other_devices_go_through_the_fake_op(m: Tensor | float) -> None:
    """A momentum that lies on the device is not read, which here would fail."""
    targets = [torch.empty(3, 4, device="meta"), torch.empty(2, dtype=torch.bfloat16, device="meta")]
    versions = [target._version for target in targets]
    K.ema_update_(targets, [torch.empty_like(target) for target in targets], m)
    assert all(target._version > version for target, version in zip(targets, versions, strict=True))


@linux_only
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nothing_of_the_size_of_the_parameters_is_allocated(
    source_dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    targets, sources, copies = (
        [torch.zeros(512, 512, 3, 3, dtype=dtype).to(memory_format=memory_format) for _ in range(4)]
        for dtype in (torch.float32, source_dtype, torch.bfloat16)
    )
    K.ema_update_(targets, sources, 0.9, copies)
    assert peak_mb(lambda: K.ema_update_(targets, sources, 0.9, copies), calls=3) < 2


# ---- shared memory


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_that_is_written_twice_is_refused(backend: str) -> None:
    a, b = torch.zeros(3), torch.zeros(3)
    with ssl_kernels.use_backend(backend):
        with pytest.raises(ValueError, match=r"targets\[2\]: expected each tensor once"):
            K.ema_update_([a, b, a], [torch.ones(3)] * 3, 0.5)
        with pytest.raises(ValueError, match=r"copies\[1\]: expected each tensor once"):
            K.ema_update_([a, b], [torch.ones(3)] * 2, 0.5, [None, a])
    assert not a.any()


def test_tensors_that_overlap_are_refused() -> None:
    memory = torch.zeros(10)
    apart = [torch.ones(4), torch.ones(4)]
    for lists, message in (
        (([memory[:4], memory[3:7]], apart, []), r"targets\[1\]: .* overlap with targets\[0\]"),
        (([memory[3:7], memory[:4]], apart, []), r"targets\[0\]: .* overlap with targets\[1\]"),
        (([memory[:4], memory[4:8]], [memory[5:9], apart[0]], []), r"sources\[0\]: .* overlap with targets\[1\]"),
        (([memory[5:9], apart[0]], [apart[1], memory[4:8]], []), r"targets\[0\]: .* overlap with sources\[1\]"),
        (([memory[:4]], apart[:1], [memory[2:6]]), r"copies\[0\]: .* overlap with targets\[0\]"),
        (([memory[4:8], memory[1:2]], [apart[0], apart[1][:1]], [memory[:4]]), r"targets\[1\]: .* with copies\[0\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            K.ema_update_(lists[0], lists[1], 0.5, [*lists[2], *[None] * (len(lists[0]) - len(lists[2]))])
    assert not memory.any()


def test_neighbours_and_shared_sources_are_fine() -> None:
    memory, source = torch.zeros(9), torch.ones(3)
    K.ema_update_([memory[3:6], memory[:3], memory[6:]], [source, source, source], 0.5)
    assert (memory == 0.5).all()
    K.ema_update_([memory[:3]], [memory[:3]], 0.9)
    assert (memory == 0.5).all()


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.zeros(2, 3)}, TypeError, "targets: expected a list of tensors, got Tensor"),
        ({"sources": 3}, TypeError, "sources: expected a list of tensors, got int"),
        ({"sources": [torch.zeros(3)]}, ValueError, "sources: expected 2 tensors as targets has, got 1"),
        ({"copies": [torch.zeros(3)]}, ValueError, "copies: expected 2 tensors as targets has, got 1"),
        ({"copies": [None] * 3}, ValueError, "copies: expected 2 tensors as targets has, got 3"),
        ({"targets": [None, torch.zeros(2)]}, TypeError, r"targets\[0\]: expected a tensor, got NoneType"),
        ({"sources": [torch.zeros(3), 1.0]}, TypeError, r"sources\[1\]: expected a tensor, got float"),
        ({"sources": [torch.zeros(3), torch.zeros(2).long()]}, TypeError, r"sources\[1\]: .* got torch.int64"),
        ({"targets": [torch.zeros(3), torch.zeros(2).long()]}, TypeError, r"targets\[1\]: .* got torch.int64"),
        ({"copies": [torch.zeros(3).bool(), None]}, TypeError, r"copies\[0\]: .* got torch.bool"),
        (
            {"sources": [torch.zeros(3), torch.zeros(2, 1)]},
            ValueError,
            r"sources\[1\]: expected shape \(2,\) as targets\[1\] has, got \(2, 1\)",
        ),
        (
            {"sources": [torch.zeros(3), torch.zeros(2, device="meta")]},
            ValueError,
            r"sources\[1\]: expected the device of targets\[0\] \(cpu\), got meta",
        ),
        (
            {"targets": [torch.zeros(3, device="meta"), torch.zeros(2)]},
            ValueError,
            r"targets\[1\]: expected the device of targets\[0\] \(meta\), got cpu",
        ),
        ({"targets": [torch.zeros(1).expand(3), torch.zeros(2)]}, ValueError, r"targets\[0\]: .* an expanded tensor"),
        ({"momentum": 1.5}, ValueError, r"momentum: expected a number in \[0, 1\], got 1.5"),
        ({"momentum": torch.tensor(-0.5)}, ValueError, r"momentum: expected a number in \[0, 1\], got -0.5"),
        ({"momentum": float("nan")}, ValueError, r"momentum: expected a number in \[0, 1\], got nan"),
        ({"momentum": True}, TypeError, "momentum: expected a float, got bool"),
        ({"momentum": torch.tensor(1)}, ValueError, "momentum: expected a float or a floating tensor .* torch.int64"),
        ({"momentum": torch.zeros(2)}, ValueError, r"momentum: .* of one element, got torch.float32 of shape \(2,\)"),
        ({"momentum": torch.tensor(0.5, device="meta")}, ValueError, "momentum: expected the CPU or the device of tar"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_are_named(backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "targets": [torch.zeros(3), torch.zeros(2)],
        "sources": [torch.ones(3), torch.ones(2)],
        "momentum": 0.5,
    } | change
    with ssl_kernels.use_backend(backend), pytest.raises(error, match=message):
        K.ema_update_(**arguments)
    for target in arguments["targets"]:
        assert not isinstance(target, Tensor) or target.is_meta or not target.any()


def test_the_kernel_checks_its_own_arguments() -> None:
    op = torch.ops.ssl_kernels.ema_update_
    a, b = torch.zeros(3, 2), torch.ones(3, 2)
    for arguments, message in (
        (([a], [], [], 0.5), "sources: expected 1 tensors, got 0"),
        (([a], [b], [a.clone(), b.clone()], 0.5), "copies: expected at most 1 tensors, got 2"),
        (([a], [b], [], 1.5), "momentum: expected a number in"),
        (([a], [b[:2]], [], 0.5), r"sources\[0\]: expected the shape of targets\[0\]"),
        (([a], [b.view(2, 3)], [], 0.5), r"sources\[0\]: expected the shape of targets\[0\]"),
        (([a.t()], [b], [], 0.5), r"targets\[0\]: expected a contiguous tensor"),
        (([a], [b], [a.double()], 0.5), r"copies: expected dtype Float, BFloat16 or Half, got Double"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
