"""The momentum teacher: an exponential moving average of a model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.ops._checks import check_fraction


class ModelEma(nn.Module):
    r"""A copy of a model whose parameters follow it as :math:`\theta_t \leftarrow m\,\theta_t + (1 - m)\,\theta_s`.

    Calling it calls the copy, :attr:`module`, which is never trained; checkpoints hold it under ``module.``. Copy and
    model are paired by name at every update, so a model that is moved or cast afterwards is followed too; a tied
    parameter is averaged once. Update it once per optimizer step, not per micro-batch, or m means something else.

    Shard it as the model: make it first, then ``fully_shard`` both ``model`` and ``ema.module``, and each process
    averages its own part.

    Args:
        model: what to follow; the copy starts as its equal, in the same mode. Put it into ``eval()`` where needed.
        momentum: m in [0, 1], unless :meth:`update` is given another.
        buffers: "average" treats floating buffers that ``state_dict`` holds (statistics of BatchNorm) as parameters,
            "copy" copies them. Integers and buffers outside of ``state_dict`` are copied either way.
        dtype: in which the copy is kept, such as float32 for a bfloat16 model: in 16 bits an average stands still once
            a step is less than its rounding. None keeps the model's.

    Raises:
        ValueError: if a momentum is outside of [0, 1], or if the model no longer has the copy's names and shapes.

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
        self.momentum, self.buffers_are = _checked(momentum), buffers
        self.module = copy.deepcopy(model).to(dtype=dtype).requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(
        self, model: nn.Module, momentum: float | Tensor | None = None, *, copies_to: nn.Module | None = None
    ) -> None:
        """Move towards ``model``.

        Args:
            model: as at the start, but for its values, dtypes and devices.
            momentum: instead of the usual one; a tensor of one element is not read by the host, if it is on a GPU.
            copies_to: another copy of the model, in bfloat16 for fast inference, say, that becomes the average's equal
                in the same pass over memory.
        """
        m = self.momentum if momentum is None else _checked(momentum)
        for module in (self.module, model, *([] if copies_to is None else [copies_to])):
            _reshard(module)
        averaged: dict[torch.device, tuple[list[Tensor], list[Tensor], list[Tensor | None]]] = {}
        for kind, target, source, beside in _matched(self.module, model, copies_to):
            if kind == "parameter" or (kind == "statistic" and self.buffers_are == "average"):
                targets, sources, copies = averaged.setdefault(target.device, ([], [], []))
                targets.append(target)
                sources.append(source.to(target.device))
                copies.append(beside)
            else:
                target.copy_(source)
                if beside is not None:
                    beside.copy_(source)
        for device, (targets, sources, copies) in averaged.items():
            self._average(targets, sources, m.to(device) if isinstance(m, Tensor) else m, copies)

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

    Unlike ``torch.optim.swa_utils.get_ema_multi_avg_fn`` it averages a bfloat16 model into a float32 one, and copies
    integers, of which there is no average, instead of rounding them.

    Args:
        momentum: m in [0, 1], a float or a floating tensor of one element, which is read at every update.

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


def _matched(
    average: nn.Module, model: nn.Module, copies_to: nn.Module | None
) -> list[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Kind, and the tensors of one name in each."""
    ours, theirs = list(_named(average)), _paired(average, "model", model)
    copies = [None] * len(ours) if copies_to is None else _paired(average, "copies_to", copies_to)
    return [
        (kind, target, source, beside) for (_, kind, target), source, beside in zip(ours, theirs, copies, strict=True)
    ]


def _paired(average: nn.Module, argument: str, module: nn.Module) -> list[Tensor]:
    """Tensors of the module, in the order of the average's."""
    nothing = ("nothing", "", torch.empty(0))
    tensors = []
    for (name, _, target), (other, _, tensor) in itertools.zip_longest(
        _named(average), _named(module), fillvalue=nothing
    ):
        if name != other or target.shape != tensor.shape:
            raise ValueError(
                f"{argument}: expected {name} {list(target.shape)} as the average has, got {other} "
                f"{list(tensor.shape)}; update() takes the model itself, not what wraps it"
            )
        tensors.append(tensor)
    return tensors


def _named(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Name, kind and tensor of every parameter and buffer, tied ones once."""
    for name, parameter in module.named_parameters():
        averages = parameter.is_floating_point() or parameter.is_complex()  # the latter to be refused, not copied
        yield name, "parameter" if averages else "constant", parameter
    # Masks and the like are not averaged: between two infinities there is no middle.
    constants = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    for name, buffer in module.named_buffers():
        averages = buffer.is_floating_point() and name not in constants
        yield name, "statistic" if averages else "constant", buffer


def _reshard(module: nn.Module) -> None:
    """Parameters that FSDP2 gathered for a forward pass are copies, and writing to these would be lost."""
    for part in module.modules():
        reshard = getattr(part, "reshard", None)
        if callable(reshard):
            reshard()


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
