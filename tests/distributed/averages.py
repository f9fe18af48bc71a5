"""What each of two ranks runs of averages of models that are wrapped, compiled and sharded."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ssl_kernels import ModelEma

Wrap = Callable[[nn.Module], nn.Module]


def net(seed: int) -> nn.Sequential:
    """Of layers whose rows do not split evenly, with a buffer, and a parameter that is no average."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))
    model[0].register_parameter("codes", nn.Parameter(torch.randint(9, (5, 2)), requires_grad=False))
    return model


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model._modules["0"], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_columns(model: nn.Module) -> nn.Module:
    def split(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter.dim() == 2 and parameter.shape[1] % 2 == 0 else 0)

    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=split)


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")
    return wrapped


def compiled_parts(model: nn.Module) -> nn.Module:
    model = copy.copy(model)
    model._modules = {name: compiled(part) for name, part in model.named_children()}
    return model


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


STUDENTS: dict[str, Wrap] = {
    "whole": lambda model: model,
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: compiled(DistributedDataParallel(model)),
    "DDP compiled": lambda model: DistributedDataParallel(compiled(model)),
    "sharded": shard,
    "compiled shards": lambda model: compiled(shard(model)),
    "shards compiled in place": lambda model: in_place(shard(model)),
    "shards of compiled": lambda model: fully_shard(compiled(model), mesh=init_device_mesh("cpu", (2,))),
    "shards of compiled parts": lambda model: fully_shard(compiled_parts(model), mesh=init_device_mesh("cpu", (2,))),
}
TEACHERS: dict[str, Wrap] = {
    "whole": lambda model: model,
    "compiled": compiled,
    "sharded": shard,
    "sharded by columns": shard_columns,
    "compiled shards": lambda model: compiled(shard(model)),
}


def state(model: nn.Module) -> dict[str, Tensor]:
    """By the names of the model below all wrappers, whole."""
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): t.full_tensor() if isinstance(t, DTensor) else t
        for name, t in model.state_dict().items()
    }


def however_models_are_laid_out(rank: int, world: int) -> None:
    for of, on in itertools.product(STUDENTS, TEACHERS):
        if {of, on}.isdisjoint({"whole", "sharded"}):
            continue
        student, teacher, alone = STUDENTS[of](net(0)), ModelEma(net(1), 0.75), ModelEma(net(1), 0.75)
        teacher.module = TEACHERS[on](teacher.module)
        for step in range(2):
            student(torch.randn(8, 4) + step).square().mean().backward()
            teacher.eval()(torch.randn(8, 4))  # leaves whole parameters behind, of which the shards know nothing
            with torch.no_grad():
                for parameter in student.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad)
            whole = net(0)
            whole.load_state_dict(state(student))
            teacher.update(student)
            alone.update(whole)
        found, expected = state(teacher.module), state(alone.module)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (of, on, name)
        sharded = "shard" in on
        assert all(isinstance(p, DTensor) == sharded for p in teacher.parameters()), (of, on)
    for name in ("sharded", "compiled shards", "shards of compiled", "shards of compiled parts"):
        with pytest.raises(ValueError, match="model: expected one that fully_shard has not sharded yet"):
            ModelEma(STUDENTS[name](net(0)))
