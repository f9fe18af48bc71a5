"""Contrastive batches that are far larger than what the networks can hold at once."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten


def grad_cache(
    towers: Sequence[Callable[..., Any]],
    inputs: Sequence[Any],
    chunk_size: int | Sequence[int],
    *,
    modules: Iterable[nn.Module] | None = None,
) -> tuple[Any, ...]:
    r"""Embed a batch while the towers hold the activations of only ``chunk_size`` rows at a time.

    The embeddings and the gradients are those of ``[tower(input) for tower, input in zip(towers, inputs)]``. Any loss
    can be computed from them, and it sees the whole batch. The rest of a training step stays as it is:

    1. This call embeds one chunk after the other and keeps only the embeddings. 2. ``loss.backward()`` first computes
    :math:`\partial L / \partial x` of all embeddings x, [B, D], and the gradients of the loss's own parameters. 3. Then
    it embeds each chunk c again, with activations, and adds :math:`(\partial L / \partial x_c)^\top\, \partial x_c /
    \partial \theta` to the gradients of the parameters.

    The memory is that of a plain step with ``chunk_size`` rows, plus the embeddings and the loss. The price is one more
    forward pass. The second pass sees the same random numbers of torch's default generators, the same autocast and the
    same buffers as the first, so dropout drops the same elements and running statistics move once per step. BatchNorm
    normalises each chunk by its own statistics. Do not change parameters or modes between this call and ``backward``.

    A tower that needs no gradient, because it is frozen or unused, has no second pass; nor has any tower under
    ``no_grad``. If every batch fits into its ``chunk_size``, this is a plain step.

    DistributedDataParallel and FSDP2 reduce gradients once per step, with the last chunks of all towers. As usual,
    towers must run through the wrapper's ``forward``; call this function outside of that ``forward``, not inside. If
    the loss needs a parameter of a wrapped model, such as its logit scale, the model must return it, as open_clip's
    models do: ``(out,) = grad_cache([ddp], [(images, texts)], 256)``. Otherwise DistributedDataParallel with
    ``find_unused_parameters`` neither notices nor reduces that parameter's gradient. Ranks may have different numbers
    of chunks, except under FSDP2, where all ranks gather the weights together.

    Args:
        towers: any number of callables; some may be the same, or share parts. Each returns a tensor, or tuples, lists
            and dicts of tensors. A tensor is either an embedding [B, ...] of any dtype, or a scalar that does not
            depend on the input, with one element and at most one dimension.
        inputs: for each tower its one argument, or a tuple of arguments, or a dict of named arguments. All tensors in
            it must have B rows, which are split into chunks; B may differ between towers. Tensors without a dimension,
            and anything that is not a tensor, go to every chunk as they are. Bind other tensors to a tower by
            ``functools.partial``.
        chunk_size: how many rows at a time, at least 1; one number, or one for each tower.
        modules: the modules that the towers run through. They are needed only if a tower is neither a module, nor a
            method of one, nor a ``functools.partial`` of these.

    Returns:
        For each tower what it returns, with all rows.

    Raises:
        ValueError: if an argument does not fit; the message names it, what it got and what it expects. An input must
            not require a gradient.
        RuntimeError: in the backward pass, if a wrapped model waits for a gradient that does not go through a tower.

    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021, arXiv:2101.06983.

    >>> import torch
    >>> from ssl_kernels import NTXentLoss, grad_cache
    >>> encoder, (a, b) = torch.nn.Linear(8, 4), torch.randn(2, 100, 8)
    >>> loss = NTXentLoss()(*grad_cache([encoder, encoder], [a, b], chunk_size=16))
    >>> loss.backward()
    >>> cached, encoder.weight.grad = encoder.weight.grad, None
    >>> NTXentLoss()(encoder(a), encoder(b)).backward()
    >>> torch.allclose(cached, encoder.weight.grad, atol=1e-6)
    True
    """
    if not len(towers) == len(inputs) > 0:
        raise ValueError(f"inputs: expected one for each of at least one tower, got {len(inputs)} for {len(towers)}")
    sizes = [chunk_size] * len(towers) if isinstance(chunk_size, int) else list(chunk_size)
    if len(sizes) != len(towers) or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"chunk_size: expected at least 1, for all or each of {len(towers)} towers, got {chunk_size}")
    chunked = [_Tower(i, *each) for i, each in enumerate(zip(towers, inputs, sizes, strict=True))]
    used = [_module_of(i, tower) for i, tower in enumerate(towers)] if modules is None else list(modules)
    if all(len(tower.parts) == 1 for tower in chunked):
        return tuple(tower(0) for tower in chunked)

    anchor = torch.empty(0, requires_grad=torch.is_grad_enabled())
    leaves = iter(_Embeddings.apply(anchor, _Passes(chunked, used)))
    return tuple(tree_unflatten([next(leaves) for _ in tower.wanted], tower.spec) for tower in chunked)


class _Embeddings(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, passes: _Passes) -> tuple[Any, ...]:
        """``anchor`` puts the embeddings into the graph; what they depend on, parameters, are no arguments."""
        found = passes.first(anchor.requires_grad)
        ctx.passes = passes
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(leaf for leaf, wanted in found if isinstance(leaf, Tensor) and not wanted))
        return tuple(leaf for leaf, _ in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        ctx.passes.second(gradients)
        return None, None


class _Tower:
    """A tower with its input, chunk by chunk."""

    spec: Any  # of what it returns
    wanted: list[bool]  # whether each of that has a gradient

    def __init__(self, index: int, tower: Callable[..., Any], given: Any, chunk_size: int) -> None:
        self.name, self.tower = f"towers[{index}]", tower
        named = dict(given) if isinstance(given, Mapping) else {}
        unnamed = given if isinstance(given, tuple) else () if isinstance(given, Mapping) else (given,)
        self.leaves, self._given = tree_flatten((unnamed, named))
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        rows = {len(tensor) for tensor in tensors if tensor.ndim}
        if len(rows) != 1:
            got = " and ".join(map(str, sorted(rows))) or "no tensors"
            raise ValueError(f"inputs[{index}]: expected tensors of one number of rows, got {got}")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise ValueError(f"inputs[{index}]: expected tensors that require no gradient, as parameters alone get one")
        (total,) = rows
        starts = range(0, max(total, 1), chunk_size)
        self.parts = [slice(start, min(start + chunk_size, total)) for start in starts]
        self.rng: list[list[Tensor]] = [[] for _ in self.parts]  # before each call

    def __call__(self, chunk: int) -> Any:
        part = self.parts[chunk]
        leaves = [leaf[part] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in self.leaves]
        unnamed, named = tree_unflatten(leaves, self._given)
        return self.tower(*unnamed, **named)

    def joined(self, found: Sequence[Any]) -> Any:
        """What all chunks gave in one place of what the tower returns."""
        if not isinstance(found[-1], Tensor):
            return found[-1]
        if all(_is_scalar(tensor) for tensor in found):
            values = torch.stack(list(found))
            if not bool(((values == values[0]) | values.isnan()).all()):
                raise ValueError(f"{self.name}: expected a scalar to be the same in each chunk, got {values.tolist()}")
            return found[-1]
        for tensor, part in zip(found, self.parts, strict=True):
            rows, shape = part.stop - part.start, list(tensor.shape)
            if shape[:1] != [rows]:
                raise ValueError(f"{self.name}: expected tensors of {rows} rows, as its input has, got one of {shape}")
        return torch.cat(list(found))


class _Passes:
    """The calls of towers on chunks, once without and once with activations, in one order and like circumstances."""

    def __init__(self, towers: Sequence[_Tower], modules: Iterable[nn.Module]) -> None:
        self.towers = towers
        self.all_but_last = [(tower, chunk) for tower in towers for chunk in range(len(tower.parts) - 1)]
        self.last = [(tower, len(tower.parts) - 1) for tower in towers]

        parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
        self.wrappers = [part for part in parts if isinstance(part, DistributedDataParallel)]
        fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # whoever uses it has imported it
        self.shards = [part for part in parts if fsdp is not None and isinstance(part, fsdp.FSDPModule)]
        self.buffers = list(dict.fromkeys(buffer for part in parts for buffer in part.buffers(recurse=False)))

        tensors = [leaf for tower in towers for leaf in tower.leaves if isinstance(leaf, Tensor)] + self.buffers
        tensors += [parameter for part in parts for parameter in part.parameters(recurse=False)]
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        self.devices = [device for device in devices if device.type not in ("cpu", "meta")]
        self.autocasts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in dict.fromkeys(["cpu", *(device.type for device in self.devices)])
            if torch.amp.is_autocast_available(kind)
        ]

    def first(self, wants_gradients: bool) -> list[tuple[Any, bool]]:
        """All that the towers return, and whether it has a gradient."""
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        found: dict[_Tower, list[list[Any]]] = {tower: [] for tower in self.towers}
        with self._unreduced():
            for tower, chunk in self.all_but_last + self.last:
                tower.rng[chunk] = _rng_state(self.devices)
                with torch.set_grad_enabled(wants_gradients and chunk == 0):  # one shows what has a gradient
                    leaves, tower.spec = tree_flatten(tower(chunk))
                if chunk == 0:
                    tower.wanted = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
                # Not views, which would keep what they are views of.
                found[tower].append([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
                del leaves  # and the graph
        return [
            (tower.joined(leaves), wanted)
            for tower, chunks in found.items()
            for *leaves, wanted in zip(*chunks, tower.wanted, strict=True)
        ]

    def second(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds to the gradients of parameters what those of all that the towers return make of them."""
        flat = iter(gradients)
        given = {tower: [next(flat) for _ in tower.wanted] for tower in self.towers}
        buffers, rng = [buffer.clone() for buffer in self.buffers], _rng_state(self.devices)
        try:
            _restore(self.buffers, self.buffers_before)
            with torch.enable_grad(), contextlib.ExitStack() as stack:
                for arguments in self.autocasts:
                    stack.enter_context(torch.autocast(*arguments))
                with self._unreduced():
                    for tower, chunk in self.all_but_last:  # scalars meet their gradient in the last one
                        rows = [None if g is None or _is_scalar(g) else g for g in given[tower]]
                        _backward(self._embed_again(tower, chunk, rows))
                _backward(
                    [pair for tower, chunk in self.last for pair in self._embed_again(tower, chunk, given[tower])]
                )
            self._check_reduced()
        finally:
            _restore(self.buffers, buffers)
            _set_rng_state(self.devices, rng)

    def _embed_again(
        self, tower: _Tower, chunk: int, gradients: Sequence[Tensor | None]
    ) -> list[tuple[Tensor, Tensor]]:
        """What is to be differentiated, and its gradients."""
        if all(gradient is None for gradient in gradients):
            return []
        _set_rng_state(self.devices, tower.rng[chunk])
        # A weight's cast that an earlier chunk made would be last in this one's backward pass, after FSDP2 has reduced.
        torch.clear_autocast_cache()
        return [
            (leaf, gradient if _is_scalar(gradient) else gradient[tower.parts[chunk]])
            for leaf, gradient in zip(tree_flatten(tower(chunk))[0], gradients, strict=True)
            if gradient is not None
        ]

    @contextlib.contextmanager
    def _unreduced(self) -> Iterator[None]:
        """Inside, gradients stay in this process."""
        with contextlib.ExitStack() as stack:
            for wrapper in self.wrappers:
                stack.enter_context(wrapper.no_sync())
            for shard in self.shards:
                shard.set_requires_gradient_sync(False, recurse=False)
                stack.callback(shard.set_requires_gradient_sync, True, recurse=False)
            yield

    def _check_reduced(self) -> None:
        try:
            for wrapper in self.wrappers:
                wrapper._check_reducer_finalized()
        except RuntimeError as error:
            raise RuntimeError(
                "grad_cache: DistributedDataParallel waits for gradients that no tower has; what the loss takes of a "
                f"wrapped model, such as a logit scale, must be returned by a tower: {error}"
            ) from error


def _module_of(index: int, tower: Any) -> nn.Module:
    while isinstance(tower, functools.partial):
        tower = tower.func
    module = tower if isinstance(tower, nn.Module) else getattr(tower, "__self__", None)
    if not isinstance(module, nn.Module):
        expected = "a module, a method of one, or modules=, those that all towers run through"
        raise ValueError(f"towers[{index}]: expected {expected}, got {getattr(tower, '__qualname__', tower)}")
    return module


def _is_scalar(tensor: Tensor) -> bool:
    return tensor.ndim <= 1 and tensor.numel() == 1


def _backward(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        torch.autograd.backward([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])


def _restore(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)  # unseen by autograd: BatchNorm may be in another graph, which does not need it


def _rng_state(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(*_which(d)) for d in devices)]


def _set_rng_state(devices: Sequence[torch.device], state: Sequence[Tensor]) -> None:
    torch.set_rng_state(state[0])
    for device, value in zip(devices, state[1:], strict=True):
        torch.get_device_module(device).set_rng_state(value, *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # which has one generator for all
