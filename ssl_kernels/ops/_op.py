"""A differentiable op of torch: one argument list, one forward pass, and the shortest way to it in eager code.

``torch.library.custom_op`` is what graphs, fakes and ``opcheck`` see. A call of it that needs a gradient costs up to 45
microseconds, which at a batch of 32 is more than the work; plain tensors outside of any graph reach the same functions
through a ``torch.autograd.Function`` in a third of that.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch

Arguments = TypeVar("Arguments", bound=NamedTuple)

_PLAIN = (Tensor, nn.Parameter)
_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    str: "str",
    list[Tensor]: "Tensor[]",
    Sequence[bool]: "bool[]",
    Sequence[int]: "SymInt[]",
    Sequence[float]: "float[]",
    torch.dtype: "ScalarType",
}


class Op(Generic[Arguments]):
    """``ssl_kernels::name`` of the fields of ``arguments``.

    Args:
        name: of the op, without its namespace.
        arguments: a NamedTuple, whose annotations make the schema.
        returns: the schema of the result.
        forward: from arguments to the result.
        fake: the same, for tensors without data.
        setup_context, backward: as of :func:`torch.library.register_autograd`; but the first gets arguments. Without
            the latter no tensor among the arguments may require a gradient. With lists among the arguments
            ``ctx.needs_input_grad`` is not the same in eager code, where each tensor of a list counts.
    """

    def __init__(
        self,
        name: str,
        arguments: type[Arguments],
        returns: str,
        *,
        forward: Callable[[Arguments], Any],
        fake: Callable[[Arguments], Any],
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[[Any, Arguments, Any], None] = lambda ctx, arguments, output: None,
    ) -> None:
        def run(*values: Any) -> Any:
            return forward(arguments(*values))

        def prepare(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, arguments(*inputs), output)

        hints = typing.get_type_hints(arguments)
        schema = ", ".join(f"{_SCHEMA[hints[field]]} {field}" for field in arguments._fields)
        definition = torch.library.custom_op(
            f"ssl_kernels::{name}", run, mutates_args=(), schema=f"({schema}) -> {returns}"
        )
        definition.register_fake(lambda *values: fake(arguments(*values)))
        self.in_graphs = getattr(torch.ops.ssl_kernels, name).default
        self._forward = forward
        self._has_lists = list[Tensor] in hints.values()
        self._in_eager: Any = None
        if backward is None:
            return
        definition.register_autograd(backward, setup_context=prepare)

        def run_and_prepare(ctx: Any, *values: Any) -> Any:  # apart, they would cost a look at the signature each time
            packed = arguments(*values)
            result = forward(packed)
            ctx.owns_outputs = True
            setup_context(ctx, packed, result)
            return result

        def run_flat(ctx: Any, *values: Any) -> Any:
            return run_and_prepare(ctx, *_grouped(*values))

        def flat_backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
            return *_flat(backward(ctx, *upstream)), None

        methods = (run_flat, flat_backward) if self._has_lists else (run_and_prepare, backward)
        named = zip(("forward", "backward"), map(staticmethod, methods), strict=True)
        self._in_eager = type(name, (torch.autograd.Function,), dict(named))

    def __call__(self, arguments: Arguments) -> Any:
        values = _flat(arguments) if self._has_lists else arguments
        needs_grad = None if _is_watched() else _needs_grad(values)
        if needs_grad is None:
            return self.in_graphs(*arguments)
        if self._in_eager is None or not needs_grad:
            return self._forward(arguments)
        if self._has_lists:  # autograd looks into none
            lengths = [len(value) if isinstance(value, list) else None for value in arguments]
            return self._in_eager.apply(*values, lengths)
        return self._in_eager.apply(*values)


def _flat(values: Sequence[Any]) -> list[Any]:
    """What lists among them hold in their places."""
    return [v for value in values for v in (value if isinstance(value, list) else (value,))]


def _grouped(*values: Any) -> list[Any]:
    """Lists in the places of what they held: the last value has their lengths, and None for what was no list."""
    *flat, lengths = values
    rest = iter(flat)
    return [next(rest) if length is None else list(itertools.islice(rest, length)) for length in lengths]


def _is_watched() -> bool:
    """Whether a graph is traced, or a mode or a transform is active: then a call must go through the dispatcher."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or _len_torch_dispatch_stack_pre_dispatch()
    )


def _needs_grad(values: Sequence[Any]) -> bool | None:
    """Of tensors among these; None if one of them is not plain, which must go through the dispatcher, too."""
    needs_grad = False
    for value in values:
        if isinstance(value, Tensor):
            if _is_special(value):
                return None
            needs_grad = needs_grad or value.requires_grad
    return needs_grad and torch.is_grad_enabled()


def may_overwrite(saved: Tensor, upstream: Tensor | None) -> bool:
    """Whether a backward pass may write to a tensor that it has saved, since nobody can ask for it again: not with
    retain_graph, not while being traced, and not where one pass makes the gradients of many."""
    if type(saved) is not Tensor or torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    return upstream is None or not _is_special(upstream)


def owns_outputs(ctx: Any) -> bool:
    """Whether nobody but this library has the outputs of an op. In graphs, and of ``torch.ops``, others have."""
    return bool(getattr(ctx, "owns_outputs", False))


def _is_special(tensor: Tensor) -> bool:
    if type(tensor) not in _PLAIN or tensor.is_meta:
        return True
    return is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor)  # the latter of batched gradients
