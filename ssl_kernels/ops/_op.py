"""A differentiable op of torch: one argument list, one forward pass, and the shortest way to it in eager code.

``torch.library.custom_op`` is what graphs, fakes and ``opcheck`` see. A call of it that needs a gradient costs up to 45
microseconds, which at a batch of 32 is more than the work; plain tensors outside of any graph reach the same functions
through a ``torch.autograd.Function`` in a third of that.
"""

from __future__ import annotations

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
    Sequence[bool]: "bool[]",
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
        setup_context, backward: as of :func:`torch.library.register_autograd`; but the first gets arguments.
    """

    def __init__(
        self,
        name: str,
        arguments: type[Arguments],
        returns: str,
        *,
        forward: Callable[[Arguments], Any],
        fake: Callable[[Arguments], Any],
        backward: Callable[..., Any],
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
        definition.register_autograd(backward, setup_context=prepare)
        self.in_graphs = getattr(torch.ops.ssl_kernels, name).default
        self._forward = forward

        def run_and_prepare(ctx: Any, *values: Any) -> Any:  # apart, they would cost a look at the signature each time
            packed = arguments(*values)
            result = forward(packed)
            setup_context(ctx, packed, result)
            return result

        methods = {"forward": staticmethod(run_and_prepare), "backward": staticmethod(backward)}
        self._in_eager: Any = type(name, (torch.autograd.Function,), methods)

    def __call__(self, arguments: Arguments) -> Any:
        if not is_plain(arguments):
            return self.in_graphs(*arguments)
        return self._in_eager.apply(*arguments) if torch.is_grad_enabled() else self._forward(arguments)


def is_plain(values: Sequence[Any]) -> bool:
    """Whether a call may skip the dispatcher: plain tensors, no graph that is traced, no mode and no transform."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or _len_torch_dispatch_stack_pre_dispatch()
    ):
        return False
    return not any(isinstance(value, Tensor) and _is_special(value) for value in values if value is not None)


def _is_special(tensor: Tensor) -> bool:
    if type(tensor) not in _PLAIN or tensor.is_meta:
        return True
    return is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor)  # the latter of batched gradients
