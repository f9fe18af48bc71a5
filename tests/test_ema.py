"""The momentum teacher against its recurrence in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from memory import linux_only, peak_mb
from processes import run_processes
from torch import Tensor, nn

from ssl_kernels.ema import ModelEma, ema_multi_avg_fn


class Net(nn.Module):
    """Every kind of state: weights, a tied weight, statistics, a counter, and a mask that no checkpoint holds."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5)
        self.out.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)


def perturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor))
            else:
                tensor.add_(seed + 1)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("student_dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
@given(momenta=st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_updates_follow_the_recurrence(student_dtype: torch.dtype, tolerance: float, momenta: list[float]) -> None:
    student = Net().to(student_dtype)
    teacher = ModelEma(student, dtype=torch.float32)
    expected = {name: value.double() for name, value in teacher.module.state_dict().items()}
    for step, m in enumerate(momenta):
        perturb(student, step)
        teacher.update(student, m)
        for name, value in student.state_dict().items():
            kept = expected[name]
            expected[name] = m * kept + (1 - m) * value.double() if value.is_floating_point() else value.double()
    for name, value in teacher.module.state_dict().items():
        scale = 1 + expected[name].abs().max()
        assert (value.double() - expected[name]).abs().max() <= tolerance * len(momenta) * scale, name
        assert value.dtype == (torch.float32 if value.is_floating_point() else torch.int64)


@pytest.mark.parametrize("m", [0.0, 1.0])
def test_momentum_one_keeps_every_bit_and_zero_takes_every_bit(m: float) -> None:
    student = Net()
    teacher = ModelEma(student, m)
    before = state(teacher.module)
    perturb(student, 3)
    teacher.update(student)
    for name, value in teacher.module.state_dict().items():
        wanted = student.state_dict()[name] if m == 0 or not value.is_floating_point() else before[name]
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_what_happens_to_buffers(buffers: str) -> None:
    student = Net()
    teacher = ModelEma(student, 0.75, buffers=buffers)  # type: ignore[arg-type]
    with torch.no_grad():
        student.norm.running_mean.fill_(4.0)  # type: ignore[union-attr]
        student.norm.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    teacher.update(student)
    averaged = teacher.module.norm
    assert averaged.running_mean.tolist() == [1.0 if buffers == "average" else 4.0] * 3
    assert averaged.num_batches_tracked.item() == 7
    assert teacher.module.mask.tolist() == [0.0, -torch.inf]


def test_a_tied_parameter_is_averaged_once_and_stays_tied() -> None:
    student = Net()
    teacher = ModelEma(student, 0.5)
    with torch.no_grad():
        teacher.module.embed.weight.zero_()
        student.embed.weight.fill_(8.0)
    teacher.update(student)
    assert teacher.module.embed.weight.unique().tolist() == [4.0]
    assert teacher.module.out.weight is teacher.module.embed.weight


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_of_a_schedule_does_as_a_number(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    student = Net()
    by_number = ModelEma(student)
    by_tensor = copy.deepcopy(by_number)
    perturb(student, 1)
    by_number.update(student, 0.625)
    by_tensor.update(student, torch.full(shape, 0.625, dtype=dtype))
    for name, value in by_number.module.state_dict().items():
        assert torch.allclose(by_tensor.module.state_dict()[name], value, rtol=1e-6, atol=1e-7), name


def test_the_copy_is_apart_from_the_model_and_never_trained() -> None:
    student = Net().train()
    student.out.bias.requires_grad_(True)
    teacher = ModelEma(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    before = state(teacher)
    perturb(student, 0)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert teacher.module.training


def test_checkpoints_hold_it() -> None:
    student = Net()
    teacher = ModelEma(student, 0.9)
    perturb(student, 2)
    teacher.update(student)
    saved = state(teacher)
    assert saved.keys() == {f"module.{name}" for name in student.state_dict()}
    restored = ModelEma(Net(), 0.9)
    restored.load_state_dict(saved)
    for model in (teacher, restored):
        model.update(student)
    assert all(torch.equal(restored.state_dict()[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 4), r"model: expected weight \[2, 3\] as the average has, got weight \[4, 3\]"),
        (nn.Linear(3, 2, bias=False), r"model: expected bias \[2\] as the average has, got nothing"),
        (nn.Sequential(nn.Linear(3, 2)), r"expected weight \[2, 3\] as the average has, got 0.weight"),
        (nn.BatchNorm1d(2), r"expected weight \[2, 3\] as the average has, got weight \[2\]"),
    ],
)
def test_another_structure_is_refused_and_nothing_moves(other: nn.Module, message: str) -> None:
    teacher = ModelEma(nn.Linear(3, 2), 0.5)
    before = state(teacher)
    with pytest.raises(ValueError, match=message):
        teacher.update(other)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("m", [-0.1, 1.1, float("nan"), torch.tensor([0.5, 0.5]), torch.tensor(1)])
def test_a_bad_momentum_is_refused(m: float | Tensor) -> None:
    student = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"momentum: expected a .*got "):
        ModelEma(student).update(student, m)


def test_in_16_bits_an_average_stands_still_and_in_32_it_moves() -> None:
    student = nn.Linear(4, 4).bfloat16()
    kept, stuck = ModelEma(student, 0.999, dtype=torch.float32), ModelEma(student, 0.999)
    start = student.weight.detach().clone()
    with torch.no_grad():
        student.weight.mul_(1.25)
    for _ in range(300):
        kept.update(student)
        stuck.update(student)
    travelled = (kept.module.weight - start) / (student.weight.float() - start.float())
    torch.testing.assert_close(travelled, torch.full((4, 4), 1 - 0.999**300), rtol=1e-3, atol=0)
    assert torch.equal(stuck.module.weight, start)


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_a_second_copy_receives_the_average_in_its_own_dtype(buffers: str) -> None:
    student = Net()
    teacher = ModelEma(student, 0.9, buffers=buffers)  # type: ignore[arg-type]
    half = copy.deepcopy(student).bfloat16()
    for step in range(3):
        perturb(student, step)
        teacher.update(student, copies_to=half)
    for name, value in half.state_dict().items():
        assert torch.equal(value, teacher.module.state_dict()[name].to(value.dtype)), name
    with pytest.raises(ValueError, match=r"copies_to: expected embed.weight \[5, 3\] as the average has, got weight"):
        teacher.update(student, copies_to=student.norm)


@linux_only
def test_no_cast_copy_of_the_model_is_made() -> None:
    student = nn.Sequential(*[nn.Linear(1024, 2048) for _ in range(4)]).bfloat16()
    teacher, half = ModelEma(student, dtype=torch.float32), copy.deepcopy(student)
    teacher.update(student, copies_to=half)
    assert peak_mb(lambda: teacher.update(student, copies_to=half), calls=3) < 2


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compile_parts(model: nn.Module) -> nn.Module:
    model = copy.copy(model)
    model._modules = {name: torch.compile(part) for name, part in model.named_children()}
    return model


DDP = nn.parallel.DistributedDataParallel


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        DDP,
        lambda model: torch.compile(DDP(model)),
        lambda model: DDP(torch.compile(model)),
        lambda model: DDP(compile_parts(model)),
    ],
    ids=["compile", "DataParallel", "DDP", "compile DDP", "DDP compile", "DDP compiled parts"],
)
def test_what_wraps_a_model_makes_no_difference(wrap: Callable[[nn.Module], nn.Module]) -> None:
    student, copies = Net(), Net()
    bare, one, other = ModelEma(student, 0.75), ModelEma(student, 0.75), ModelEma(wrap(student), 0.75)
    perturb(student, 0)
    bare.update(student)
    one.update(wrap(student), copies_to=wrap(copies))
    other.update(student)
    expected = state(bare)
    for average in (one, other, ModelEma(copies)):
        found = {name.replace("_orig_mod.", ""): value for name, value in state(average).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert type(other.module) is Net
    fresh = ModelEma(Net())  # loads what an average that does not unwrap would save
    saved = {f"module.{name}": value + 1 for name, value in wrap(bare.module.requires_grad_()).state_dict().items()}
    fresh.load_state_dict(saved)
    assert all(torch.equal(value, expected[name] + 1) for name, value in fresh.state_dict().items())
    other.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*module\.module\.out\.bias"):
        fresh.load_state_dict({**state(fresh), "module.module.out.bias": torch.zeros(5)})


class Grows(nn.Module):
    cache: Tensor
    late: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("late", None, persistent=False)


def test_a_cache_that_grows_is_left_to_each_model() -> None:
    student, copies = Grows(), Grows()
    teacher = ModelEma(student, 0.5)
    before = teacher.module.layer.weight.clone()
    for cache in (torch.ones(2), torch.ones(5)):
        student.cache, student.late = cache, cache
        student.layer.weight.data = before + 2
        teacher.update(student, copies_to=copies)
    assert teacher.module.cache.tolist() == copies.cache.tolist() == [1.0, 1.0]
    assert teacher.module.late is None
    torch.testing.assert_close(teacher.module.layer.weight, before + 1.5)
    student.register_buffer("statistic", torch.ones(5))
    with pytest.raises(ValueError, match=r"model: expected nothing \[0\] as the average has, got statistic \[5\]"):
        teacher.update(student)


def test_averages_a_model_that_torch_compile_wraps() -> None:
    """In place, so that the compiled teacher uses the new values."""
    student = nn.Linear(3, 2)
    teacher = ModelEma(student, 0.5)
    compiled = torch.compile(teacher, backend="eager", fullgraph=True)
    x = torch.randn(4, 3)
    compiled(x)
    perturb(student, 0)
    teacher.update(student)
    torch.testing.assert_close(compiled(x), nn.functional.linear(x, teacher.module.weight, teacher.module.bias))


FSDP = """
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
import ssl_kernels.functional as K
from ssl_kernels import ModelEma

mesh = init_device_mesh("cpu", (world,))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))
alone = ModelEma(model, 0.75)
teacher = ModelEma(model, 0.75)
fully_shard(model[0], mesh=mesh)
fully_shard(model, mesh=mesh)
fully_shard(teacher.eval().module, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    x = torch.randn(8, 3)
    teacher(x)  # leaves whole parameters behind, of which the shards know nothing
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    teacher.update(model)
    whole = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))
    whole.load_state_dict({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()})
    # Statistics of BatchNorm are each process's own.
    alone.update(whole)
assert all(isinstance(p, DTensor) for p in teacher.parameters())
for name, value in teacher.module.state_dict().items():
    value = value.full_tensor() if isinstance(value, DTensor) else value
    torch.testing.assert_close(value, alone.module.state_dict()[name])

values = torch.arange(12.0).reshape(3, 4)
sharded, columns, replica = (distribute_tensor(values.clone(), mesh, [p]) for p in (Shard(0), Shard(1), Replicate()))
copies = distribute_tensor(values.bfloat16(), mesh, [Shard(0)])
K.ema_update_([sharded], [distribute_tensor(values + 4, mesh, [Shard(0)])], 0.75, [copies])
assert torch.equal(sharded.full_tensor(), values + 1)
assert torch.equal(copies.full_tensor(), (values + 1).bfloat16())
kind = "a DTensor of (Shard(dim=0),)"
for target, source, wanted in (
    (sharded, columns, kind), (sharded, replica, kind), (sharded, values, kind), (values, sharded, "a plain tensor"),
):
    try:
        K.ema_update_([target], [source], 0.75)
    except ValueError as error:
        assert str(error).startswith(f"sources[0]: expected {wanted}"), error
    else:
        raise AssertionError("a pair of different shards was averaged")
"""


def test_each_process_averages_its_own_shard(tmp_path: Path) -> None:
    """Of FSDP2, of 7 and 5 rows, with a forward pass of the teacher in between."""
    run_processes(FSDP, tmp_path)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="buffers: expected 'average' or 'copy', got 'keep'"):
        ModelEma(nn.Linear(2, 2), buffers="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype: expected a floating dtype, got torch.int64"):
        ModelEma(nn.Linear(2, 2), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"momentum: expected a number in \[0, 1\], got 2"):
        ModelEma(nn.Linear(2, 2), 2)
    with pytest.raises(TypeError, match="momentum: expected a float, got str"):
        ModelEma(nn.Linear(2, 2), "0.9")  # type: ignore[arg-type]


def test_integer_parameters_are_copied_and_complex_ones_refused() -> None:
    codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    student = nn.ParameterList([torch.zeros(2), codes])
    teacher = ModelEma(student)
    codes.fill_(7)
    teacher.update(student)
    assert teacher.state_dict()["module.1"].tolist() == [7, 7, 7]
    phase = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    student = nn.ParameterList([phase])
    with pytest.raises(TypeError, match=r"targets\[0\]: expected dtype .* got torch.complex64"):
        ModelEma(student).update(student)
    with pytest.raises(TypeError, match=r"targets\[0\]: expected dtype .* got torch.complex64"):
        ema_multi_avg_fn(0.9)([torch.zeros(1, dtype=torch.complex64)], [phase], 1)
