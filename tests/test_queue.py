"""The queue of keys: ring positions, casts, normalisation, autograd, checkpoints, several processes."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive import lay_out, layouts
from hypothesis import given
from hypothesis import strategies as st
from memory import linux_only, peak_mb
from processes import run_processes

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import KeyQueue
from ssl_kernels.integrations.moco import MoCoQueue
from ssl_kernels.ops.queue import _enqueue

BACKENDS = ("reference", "eager", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- what is written where


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    size=st.integers(1, 12),
    width=st.integers(1, 40),
    batches=st.lists(st.integers(0, 30), max_size=6),
    start=st.integers(-3, 30),
    queue_dtype=st.sampled_from(DTYPES),
    key_dtype=st.sampled_from(DTYPES),
    layout=layouts,
    gap=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_is_a_list_in_a_ring(
    backend: str, size: int, width: int, batches: list[int], start: int, queue_dtype: torch.dtype,
    key_dtype: torch.dtype, layout: str, gap: int, seed: int,
) -> None:  # fmt: skip
    """As if each key were written on its own, whatever the batch; rows and memory beside them stay as they were."""
    torch.manual_seed(seed)
    storage = torch.randn(size, width + gap).to(queue_dtype)
    queue, beside = storage[:, :width], storage[:, width:].clone()
    expected, pointer = [row.clone() for row in queue], torch.tensor(start)
    at = start % size
    for batch in batches:
        keys = lay_out(torch.randn(batch, width).to(key_dtype), layout)
        with ssl_kernels.use_backend(backend):
            K.enqueue_(queue, pointer, keys)
        for key in keys:
            expected[at] = key.to(queue_dtype)
            at = (at + 1) % size
        if batch:
            assert pointer.item() == at
    assert torch.equal(queue, torch.stack(expected))
    assert torch.equal(storage[:, width:], beside)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    width=st.integers(1, 70),
    queue_dtype=st.sampled_from(DTYPES),
    key_dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-15, 1e-6, 1.0, 200.0]),
    seed=st.integers(0, 2**16),
)
def test_normalises_in_fp32_before_the_cast(
    backend: str, width: int, queue_dtype: torch.dtype, key_dtype: torch.dtype, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    keys = (size * torch.randn(9, width)).to(key_dtype)
    keys[3] = 0
    queue = torch.full((20, width), 7.0, dtype=queue_dtype)
    with ssl_kernels.use_backend(backend):
        K.enqueue_(queue, torch.tensor(15), keys, normalize=True)
    expected = F.normalize(keys.double(), dim=1, eps=1e-12)
    written = torch.cat([queue[15:], queue[:4]]).double()
    eps = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-10}[queue_dtype]
    torch.testing.assert_close(written, expected, rtol=eps, atol=2**-24 if queue_dtype == torch.float16 else 1e-30)
    assert (queue[4:15] == 7).all()


@pytest.mark.parametrize("key_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference", "eager"])
def test_float64(backend: str, key_dtype: torch.dtype) -> None:
    queue, keys = torch.zeros(5, 3, dtype=torch.float64), torch.randn(7, 3).to(key_dtype)
    with ssl_kernels.use_backend(backend):
        K.enqueue_(queue, torch.tensor(4), keys, normalize=True)
    wide = keys if key_dtype == torch.float64 else keys.float()
    order = [6, 2, 3, 4, 5]  # rows of the queue, by the keys that they hold
    torch.testing.assert_close(queue, F.normalize(wide, dim=1).double()[order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_are_kept(backend: str) -> None:
    keys = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [3.0, 4.0]])
    queue = torch.zeros(4, 2)
    with ssl_kernels.use_backend(backend):
        K.enqueue_(queue, torch.tensor(0), keys, normalize=True)
    assert queue[0].isnan().all()
    assert queue[1, 0].isnan()
    torch.testing.assert_close(queue[2], torch.tensor([0.6, 0.8]))
    with ssl_kernels.use_backend(backend):
        K.enqueue_(queue, torch.tensor(0), keys)
    torch.testing.assert_close(queue[:3], keys, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_that_is_split_over_threads(threads: int) -> None:
    queue, keys = torch.zeros(5000, 64), torch.randn(9000, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        K.enqueue_(queue, torch.tensor(4321), keys)
    finally:
        torch.set_num_threads(before)
    expected = torch.zeros(5000, 64)
    expected[(4321 + torch.arange(4000, 9000)) % 5000] = keys[4000:]
    assert torch.equal(queue, expected)


# ---- autograd and torch's machinery


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_are_constants_to_autograd(backend: str) -> None:
    queue, keys = torch.zeros(4, 2), torch.randn(3, 2, requires_grad=True)
    with ssl_kernels.use_backend(backend):
        K.enqueue_(queue, torch.tensor(0), 2 * keys, normalize=True)
    assert not queue.requires_grad
    assert queue.grad_fn is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_that_the_queue_has_changed(backend: str) -> None:
    """A loss that keeps the queue for its backward pass fails loudly instead of using the new keys."""
    query, queue = torch.randn(3, 4, requires_grad=True), torch.randn(8, 4)
    loss = (query @ queue.t()).logsumexp(1).sum()
    with ssl_kernels.use_backend(backend):
        K.enqueue_(queue, torch.tensor(0), torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_opcheck(backend: str) -> None:
    for normalize, dtype, batch in itertools.product((True, False), DTYPES, (0, 3, 9)):
        arguments = (torch.randn(5, 4).to(dtype), torch.tensor([3]), torch.randn(batch, 4), normalize, backend)
        torch.library.opcheck(_enqueue, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, p, k: K.enqueue_(q, p, 2 * k, normalize=True), fullgraph=True, backend=compiler, dynamic=True
    )
    queues, pointers = [torch.zeros(10, 4) for _ in range(2)], [torch.tensor(0) for _ in range(2)]
    for batch in (3, 5, 12, 4):
        keys = torch.randn(batch, 4)
        compiled(queues[0], pointers[0], keys)
        K.enqueue_(queues[1], pointers[1], 2 * keys, normalize=True)
    torch.testing.assert_close(*queues)
    assert torch.equal(*pointers)


def test_inference_mode_and_autocast() -> None:
    queue, pointer, keys = torch.zeros(4, 2), torch.tensor(0), torch.randn(3, 2)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        K.enqueue_(queue, pointer, keys)
    assert torch.equal(queue[:3], keys)
    assert pointer == 3


def test_other_devices_go_through_the_fake_op() -> None:
    queue, pointer = torch.empty(4, 2, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    version = queue._version
    K.enqueue_(queue, pointer, torch.empty(3, 2, device="meta"))
    assert queue._version > version


@linux_only
def test_nothing_of_the_size_of_the_queue_is_allocated() -> None:
    queue, pointer, keys = torch.zeros(2**17, 128), torch.tensor(2**17 - 100), torch.randn(256, 128)
    K.enqueue_(queue, pointer, keys)
    pointer.fill_(2**17 - 100)
    assert peak_mb(lambda: K.enqueue_(queue, pointer, keys, normalize=True), calls=3) < 2


# ---- KeyQueue


def test_starts_from_random_unit_vectors_of_the_generator() -> None:
    a, b = (KeyQueue(100, 16, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.keys, b.keys)
    torch.testing.assert_close(a.keys.norm(dim=1), torch.ones(100))
    assert (a.keys @ a.keys.t()).fill_diagonal_(0).abs().max() < 0.95
    assert a.pointer == 0


@pytest.mark.parametrize("kind", [KeyQueue, lambda size, dim: MoCoQueue(dim, size, gather=False)])
def test_resumes_exactly_from_a_checkpoint(kind: Any) -> None:
    queue, other = kind(50, 8), kind(50, 8)
    queue.enqueue(torch.randn(37, 8))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    keys = torch.randn(20, 8)
    for q in (queue, other, copy.deepcopy(other)):
        q.enqueue(keys)
    assert torch.equal(queue.keys, other.keys)
    assert torch.equal(other.keys[37:], keys[:13])
    assert torch.equal(other.keys[:7], keys[13:])
    assert [int(v) for v in other.state_dict().values() if v.dtype == torch.int64] == [7]


def test_buffers_move_and_cast_with_the_module() -> None:
    queue = KeyQueue(20, 4, dtype=torch.bfloat16, normalize=True)
    assert queue.keys.dtype == torch.bfloat16
    queue.enqueue(torch.tensor([[3.0, 4.0, 0.0, 0.0]]))
    torch.testing.assert_close(queue.keys[0].float(), torch.tensor([0.6, 0.8, 0, 0]), rtol=2**-8, atol=0)
    queue.to("meta").enqueue(torch.empty(3, 4, device="meta"))
    assert queue.to(torch.float64).pointer.dtype == torch.int64
    assert "size=20, dim=4, dtype=torch.float64, normalize=True, gather=False" in repr(queue)


def test_a_checkpoint_of_moco_loads() -> None:
    """Its model holds queue [dim, K] and queue_ptr [1], under the prefix of DistributedDataParallel."""
    saved = {"module.queue": F.normalize(torch.randn(16, 40), dim=0), "module.queue_ptr": torch.tensor([32])}
    model = MoCoQueue(dim=16, K=40)
    model.load_state_dict({name.removeprefix("module."): value for name, value in saved.items()})
    assert torch.equal(model.queue, saved["module.queue"])
    assert model.keys.is_contiguous()
    keys = torch.randn(12, 16)
    model.enqueue(keys)
    assert torch.equal(model.queue[:, 32:], keys[:8].t())
    assert torch.equal(model.queue[:, :4], keys[8:].t())
    assert torch.equal(model.queue_ptr, torch.tensor([4]))
    state = model.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {"queue": (16, 40), "queue_ptr": (1,)}


WORKER = """
from ssl_kernels import KeyQueue, MoCoV3Loss

everyone = torch.arange(60.0).reshape(20, 3)

for shares in ([4, 4], [5, 2], [0, 3], [0, 0]):
    queue = KeyQueue(8, 3, gather=True, generator=torch.Generator().manual_seed(0))
    alone = KeyQueue(8, 3, generator=torch.Generator().manual_seed(0))
    begin = sum(shares[:rank])
    for _ in range(3):
        queue.enqueue(everyone[begin : begin + shares[rank]].requires_grad_())
        alone.enqueue(everyone[: sum(shares)])
    assert torch.equal(queue.keys, alone.keys)
    assert torch.equal(queue.pointer, alone.pointer)

# MoCo v3: the mean over processes is the loss of one process, and each keeps the gradient of its own queries.
torch.manual_seed(0)
q1, q2, k1, k2 = (torch.randn(12, 5) for _ in range(4))
own = slice(12 * rank // world, 12 * (rank + 1) // world)
whole = [t.clone().requires_grad_() for t in (q1, q2)]
MoCoV3Loss(0.2)(*whole, k1, k2).backward()
part = [t[own].clone().requires_grad_() for t in (q1, q2)]
loss = MoCoV3Loss(0.2, gather=True)(*part, k1[own], k2[own])
loss.backward()
for a, b in zip(part, whole):
    torch.testing.assert_close(a.grad / world, b.grad[own])
"""


def test_two_processes_hold_what_one_would(tmp_path: Path) -> None:
    run_processes(WORKER, tmp_path)


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queue": torch.zeros(5)}, ValueError, r"queue: expected 2 dimensions .* got shape \(5,\)"),
        ({"queue": torch.zeros(0, 4)}, ValueError, "queue: expected at least 1 row, got 0"),
        ({"queue": torch.zeros(4, 5).t()}, ValueError, r"queue: expected rows that are contiguous .* strides \(1, 5\)"),
        ({"queue": torch.zeros(5, 4, requires_grad=True)}, ValueError, "queue: expected a buffer without gradient"),
        ({"queue": torch.zeros(5, 4).int()}, TypeError, "queue: expected dtype float32, .* got torch.int32"),
        ({"pointer": 3}, TypeError, "pointer: expected an int64 tensor, got int"),
        ({"pointer": torch.tensor(3.0)}, TypeError, "pointer: expected an int64 tensor, got torch.float32"),
        (
            {"pointer": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            r"pointer: expected one element, got shape \(2,\)",
        ),
        ({"pointer": torch.tensor(3, device="meta")}, ValueError, "pointer: expected the device of queue .*, got meta"),
        ({"keys": torch.zeros(3, 5)}, ValueError, "keys: expected 4 features as queue has, got 5"),
        ({"keys": None}, TypeError, "keys: expected a tensor, got NoneType"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"queue": torch.zeros(5, 4), "pointer": torch.tensor(0), "keys": torch.zeros(3, 4)}
    with pytest.raises(error, match=message):
        K.enqueue_(**(arguments | change))


@pytest.mark.parametrize("name", ["size", "dim"])
def test_an_empty_queue_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        KeyQueue(**{name: 0})


def test_the_kernel_checks_its_own_arguments() -> None:
    op = torch.ops.ssl_kernels.enqueue_rows_
    queue, pointer, keys = torch.zeros(5, 4), torch.tensor(0), torch.zeros(3, 4)
    for arguments, message in (
        ((queue.double(), pointer, keys), "queue: expected dtype Float, BFloat16 or Half, got Double"),
        ((queue, pointer, keys.int()), "keys: expected dtype Float, BFloat16 or Half, got Int"),
        ((torch.zeros(4, 5).t(), pointer, keys), "queue: expected unit stride"),
        ((torch.zeros(1, 4).expand(5, 4), pointer, keys), "queue: expected rows that do not overlap"),
        ((queue, pointer, keys[:, :3]), "keys: expected size 4 in dimension 1, got 3"),
        ((queue, pointer.int(), keys), "pointer: expected one int64 element"),
        ((queue[:0], pointer, keys), "queue: expected at least 1 row"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, False)


def test_every_pair_of_dtypes() -> None:
    for queue_dtype, key_dtype in itertools.product((*DTYPES, torch.float64), repeat=2):
        queue = torch.zeros(3, 2, dtype=queue_dtype)
        K.enqueue_(queue, torch.tensor(0), torch.ones(2, 2, dtype=key_dtype))
        expected = torch.tensor([[1.0, 1], [1, 1], [0, 0]], dtype=queue_dtype)
        assert torch.equal(queue, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pointer", [2, 6])
def test_rows_of_the_queue_itself_are_read_before_they_are_written_over(backend: str, pointer: int) -> None:
    queue = torch.arange(8.0).reshape(8, 1)
    expected = queue.clone()
    expected[(pointer + torch.arange(4)) % 8] = queue[:4].clone()
    with ssl_kernels.use_backend(backend):
        K.enqueue_(queue, torch.tensor(pointer), queue[:4])
    assert torch.equal(queue, expected)


def test_keys_are_kept_as_floating_numbers() -> None:
    with pytest.raises(TypeError, match=r"dtype: expected float32, bfloat16, float16 or float64, got torch\.int64"):
        KeyQueue(size=4, dim=2, dtype=torch.int64)


def test_a_moco_checkpoint_may_be_assigned() -> None:
    """Then ``queue`` is the checkpoint's own tensor, in which a key is a column."""
    checkpoint = {"queue": torch.randn(3, 8), "queue_ptr": torch.tensor([6])}
    assigned, copied = (MoCoQueue(dim=3, K=8) for _ in range(2))
    copied.load_state_dict(checkpoint)
    assigned.load_state_dict(checkpoint, assign=True)
    keys = torch.randn(5, 3)
    for queue in (assigned, copied):
        queue.enqueue(keys)
    assert torch.equal(assigned.queue, copied.queue)
    assert torch.equal(assigned.keys[[6, 7, 0, 1, 2]], keys)
