"""The momentum teacher: an exponential moving average of a model."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.ops._checks import check_fraction
from ssl_kernels.ops.ema import is_sharded, sharding


class ModelEma(nn.Module):
    r"""A copy of a model whose parameters follow it as :math:`\theta_t \leftarrow m\,\theta_t + (1 - m)\,\theta_s`.

    Calling it calls the copy, :attr:`module`, which is never trained. Every update pairs copy and model by name, so the
    model may be moved or cast in between. A tied parameter is averaged once. Update once per optimizer step, not per
    micro-batch, because m is meant per step.

    The model may be wrapped in ``torch.compile``, DataParallel, DistributedDataParallel and Fabric, in any order, here
    and at each update. The copy is of the model inside the wrappers; wrap the copy yourself if you want it compiled. A
    checkpoint has ``module.`` before the inner model's names, whether or not it was wrapped, and checkpoints with the
    wrappers' own ``module.`` and ``_orig_mod.`` in their names load as well. If only a part of the model is compiled,
    that part of the copy is compiled too.

    With FSDP2, make the average first and then call ``fully_shard`` on both ``model`` and ``ema.module``; each process
    averages its own part. One of the two may also be whole, or sharded differently. The update then brings the model's
    tensors to the layout of the average, and all processes must call it. If parameters get their values only after
    sharding, as with the meta device, call an update with a momentum of 0 to copy them.

    Args:
        model: the model to follow. The copy starts equal to it and in the same mode; call ``eval()`` on it where you
            need to.
        momentum: m in [0, 1]; :meth:`update` may be given another.
        buffers: "average" averages floating-point buffers of ``state_dict``, such as BatchNorm's statistics, and "copy"
            copies them. Integer buffers are always copied. So are buffers outside of ``state_dict``, if the copy has
            one of the same shape; a cache that grows with the sequence stays each model's own.
        dtype: the dtype of the copy, such as float32 for a bfloat16 model; in 16 bits an average stops moving once a
            step is smaller than its rounding. None means the model's dtype.

    Raises:
        ValueError: if a momentum is outside of [0, 1], if the model no longer has the copy's names and shapes, or if
            the model that is to be copied is already sharded by ``fully_shard``.

    Source: He et al., Momentum Contrast, 2019, arXiv:1911.05722; Tarvainen & Valpola, Mean teachers, 2017,
    arXiv:1703.01780.

    >>> import torch
    >>> from ssl_kernels.ema import ModelEma
    >>> student = torch.nn.Linear(2, 1, bias=False)
    >>> teacher = ModelEma(student, momentum=0.75)
    >>> with torch.no_grad():
    ...     _ = teacher.module.weight.fill_(0.0), student.weight.fill_(8.0)
    >>> teacher.update(student)
    >>> teacher(torch.eye(2)).flatten().tolist()
    [2.0, 2.0]
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.999,
        *,
        buffers: Literal["average", "copy"] = "average",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if buffers not in ("average", "copy"):
            raise ValueError(f"buffers: expected 'average' or 'copy', got {buffers!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
        if any(_sharded_parts(model)):
            raise ValueError(
                "model: expected one that fully_shard has not sharded yet, got one that it has: make the average "
                "first, then shard model and average.module"
            )
        self.momentum, self.buffers_are = _checked(momentum), buffers
        self.module = copy.deepcopy(_unwrapped(model)).to(dtype=dtype).requires_grad_(False)
        self.register_load_state_dict_pre_hook(_leave_out_wrappers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the average returns for these arguments."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(
        self, model: nn.Module, momentum: float | Tensor | None = None, *, copies_to: nn.Module | None = None
    ) -> None:
        """Move the average towards ``model``.

        Args:
            model: the model that was copied at the start. Its values, dtypes, devices and wrappers may have changed.
            momentum: m for this update instead of the constructor's. A tensor of one element on a GPU is not read by
                the host.
            copies_to: another copy of the model, such as one in bfloat16 for fast inference. The same pass over memory
                makes it equal to the average.
        """
        m = self.momentum if momentum is None else _checked(momentum)
        self._follow(model, m, copies_to, self.buffers_are == "average")

    def _follow(
        self, model: nn.Module, momentum: float | Tensor, copies_to: nn.Module | None, average_buffers: bool
    ) -> None:
        for module in (self.module, model, *([] if copies_to is None else [copies_to])):
            for part in _sharded_parts(module):
                part.reshard()  # what was gathered for a forward pass is a copy, and writing to it would be lost
        ours, theirs = _tensors(self.module), _tensors(model)
        others = None if copies_to is None else _tensors(copies_to)
        _check_alike("model", ours, theirs)
        if others is not None:
            _check_alike("copies_to", ours, others)
        averaged: dict[torch.device, tuple[list[Tensor], list[Tensor], list[Tensor | None]]] = {}
        for name, target in ours.saved.items():
            source = laid_out_as(target, theirs.saved[name])
            beside = None if others is None else others.saved[name]
            if name in ours.parameters or (average_buffers and target.is_floating_point()):
                targets, sources, copies = averaged.setdefault(target.device, ([], [], []))
                targets.append(target)
                sources.append(source.to(target.device))
                copies.append(beside)
            else:
                target.copy_(source)
                if beside is not None:
                    beside.copy_(source)
        for device, (targets, sources, copies) in averaged.items():
            self._average(targets, sources, momentum.to(device) if isinstance(momentum, Tensor) else momentum, copies)
        for follower in (ours, *([] if others is None else [others])):
            for name, target in follower.unsaved.items():
                found = theirs.unsaved.get(name)
                if found is not None and found.shape == target.shape:
                    target.copy_(found)

    def _average(
        self, targets: list[Tensor], sources: list[Tensor], momentum: float | Tensor, copies: list[Tensor | None]
    ) -> None:
        K.ema_update_(targets, sources, momentum, copies)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, buffers={self.buffers_are!r}"


def ema_multi_avg_fn(
    momentum: float | Tensor,
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """The exponential moving average for ``torch.optim.swa_utils.AveragedModel`` and Lightning's ``WeightAveraging``.

    Unlike ``torch.optim.swa_utils.get_ema_multi_avg_fn``, it can average a bfloat16 model into a float32 one, which
    ``AveragedModel`` allows from torch 2.13 on, and it copies integers instead of rounding their average.

    Args:
        momentum: m in [0, 1], a float, or a floating-point tensor of one element, which is read at every update.

    Raises:
        ValueError: if ``momentum`` is outside of [0, 1].

    >>> import torch
    >>> from ssl_kernels.ema import ema_multi_avg_fn
    >>> model = torch.nn.BatchNorm1d(2)
    >>> average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.75), use_buffers=True)
    >>> average.update_parameters(model)
    >>> _ = model.running_mean.fill_(8.0), model.num_batches_tracked.fill_(5)
    >>> average.update_parameters(model)
    >>> average.module.running_mean.tolist(), average.module.num_batches_tracked.item()
    ([2.0, 2.0], 5)
    """
    _checked(momentum)

    @torch.no_grad()
    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        pairs = list(zip(averaged, current, strict=True))
        averages = [target.is_floating_point() or target.is_complex() for target, _ in pairs]
        moving = list(itertools.compress(pairs, averages))
        K.ema_update_((target for target, _ in moving), (source for _, source in moving), momentum)
        for (target, source), moves in zip(pairs, averages, strict=True):
            if not moves:
                target.copy_(source)

    return average


class _Tensors(NamedTuple):
    """Those of a module by name, tied ones once."""

    saved: dict[str, Tensor]  # parameters, then the buffers of state_dict
    parameters: set[str]  # those of them that can be averaged
    unsaved: dict[str, Tensor]  # masks, of which there is no average between two infinities, and caches


def _tensors(module: nn.Module) -> _Tensors:
    parameters, buffers, unsaved = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    seen = set[Tensor]()
    for prefix, part in _parts(module):
        for found, into in ((part._parameters, parameters), (part._buffers, buffers)):
            for name, tensor in found.items():
                if tensor is None or tensor in seen:
                    continue
                seen.add(tensor)
                outside = into is buffers and name in part._non_persistent_buffers_set
                (unsaved if outside else into)[prefix + name] = tensor
    # A complex one is to be refused, not copied.
    averaged = {name for name, tensor in parameters.items() if tensor.is_floating_point() or tensor.is_complex()}
    return _Tensors({**parameters, **buffers}, averaged, unsaved)


def _check_alike(argument: str, ours: _Tensors, theirs: _Tensors) -> None:
    nothing = ("nothing", torch.empty(0))
    for (name, target), (other, tensor) in itertools.zip_longest(
        ours.saved.items(), theirs.saved.items(), fillvalue=nothing
    ):
        if name != other or target.shape != tensor.shape:
            raise ValueError(
                f"{argument}: expected {name} {list(target.shape)} as the average has, got {other} {list(tensor.shape)}"
            )


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below, each once, and what its tensors' names begin with; wrappers and their names are left out."""
    waiting, seen = [("", module)], set[nn.Module]()
    while waiting:
        prefix, module = waiting.pop()
        module = _unwrapped(module)
        if module not in seen:
            seen.add(module)
            yield prefix, module
            children = reversed(module._modules.items())
            waiting += [(f"{prefix}{name}.", child) for name, child in children if child is not None]


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model below ``torch.compile``, Fabric, DataParallel and DistributedDataParallel, in any order."""
    while True:
        inner = module._modules.get("_orig_mod", module._modules.get("_original_module"))
        if inner is None and isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if inner is None:
            return module
        module = inner


def _leave_out_wrappers(average: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Rename what an average of a wrapped model saved to the names that this one has."""
    ours = {name.replace("_orig_mod.", ""): prefix + name for name in average.state_dict()}
    for key in state.keys() - ours.values():
        if key.startswith(prefix):
            name = key[len(prefix) :].replace("_orig_mod.", "")
            while name not in ours and name.startswith("module.module."):
                name = name.removeprefix("module.")
            if name in ours and ours[name] not in state:
                state[ours[name]] = state.pop(key)


def _sharded_parts(module: nn.Module) -> Iterator[Any]:
    """Those that FSDP2 shards."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # whoever uses it has imported it
    for part in module.modules() if fsdp is not None else ():
        if isinstance(part, fsdp.FSDPModule):
            yield part


def laid_out_as(target: Any, source: Any) -> Tensor:
    """The source, spread over processes as the target is: whole, or in the same shards."""
    if sharding(source) == sharding(target):
        laid_out: Tensor = source
    elif not is_sharded(target):
        laid_out = source.full_tensor()
    else:
        from torch.distributed.tensor import distribute_tensor

        whole = source.full_tensor() if is_sharded(source) else source.detach()
        laid_out = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    return laid_out


def _checked(momentum: float | Tensor) -> float | Tensor:
    """A tensor only if the host may not read it."""
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1 or not momentum.is_floating_point():
            got = f"{momentum.dtype} of shape {tuple(momentum.shape)}"
            raise ValueError(f"momentum: expected a float or a floating tensor of one element, got {got}")
        if momentum.device.type != "cpu":
            return momentum.detach().reshape(())
        momentum = momentum.item()
    check_fraction("momentum", momentum)
    return float(momentum)
