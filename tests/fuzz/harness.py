"""A call of an op and of its formula, and the comparison of values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from fuzz.draws import Call, draw, tensors_of
from fuzz.formulas import FORMULAS
from fuzz.rounding import rounding
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K

# The formula rounds at each step as float32 does, by units in the last place; the op's error may be this many times
# the largest of a few such. A sum in another order, exponentials of 1.5 units and the luck of the draw are in it; in
# float64 the errors of the formula itself, too.
FACTOR = {torch.float32: 8, torch.float64: 16}
NOISY = 3
# And by so many units, for a single number may be near the exact one by luck.
UNITS = 8
# What comes in 16 bits may be rounded twice, in the end and when the upstream gradient is multiplied in.
ROUNDINGS = 2
# What is too small for a dtype may be 0 in it; exponentials below e^-80 may be 0 in arithmetic of float32.
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 1e-28, torch.float32: 1e-28, torch.float64: 1e-290}

IN_PLACE = ("ema_update_", "enqueue_")
AUTOCAST = {
    "sigmoid_contrastive_loss": ("x", "y"),
    "clip_loss": ("x", "y"),
    "sup_con_loss": ("z",),
    "key_softmax": ("query",),
    "info_nce_loss": ("query", "positive"),
    "row_lse": ("query", "candidates"),
    "row_softmax_loss": ("query", "candidates"),
    "albef_contrastive_loss": ("image", "text", "image_momentum", "text_momentum"),
}
Results = dict[str, Tensor]


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def upstream_of(call: Call, loss: Tensor) -> Tensor:
    """The same values for any dtype of loss, in several layouts."""
    generator = torch.Generator().manual_seed(call.number)
    values = torch.randn(loss.shape, generator=generator).to(loss.dtype)
    if call.upstream == "one":
        return torch.ones_like(loss)
    if call.upstream == "expanded":
        return torch.full((), 0.7).to(loss.dtype).expand(loss.shape)
    if call.upstream == "stepped" and loss.dim():
        return values.repeat_interleave(2)[::2]
    if call.upstream == "some zero" and loss.dim():
        return values * (torch.arange(len(values)) % 3 > 0)
    return values


def results_of(function: Callable[..., Any], call: Call, arguments: dict[str, Any]) -> Results:
    """What comes out, "value 0" and so on, and "gradient of x"; of an op in place what it wrote to."""
    tensors = tensors_of(arguments)
    for name in call.wanted:
        tensors[name].requires_grad_()
    out = function(**arguments)
    if call.op in IN_PLACE:
        return {name: t for name, t in tensors.items() if not name.startswith(("sources", "momentum", "keys"))}
    values = out if isinstance(out, tuple) else (out,)
    if values[0].requires_grad:
        values[0].backward(upstream_of(call, values[0]))
    results = {f"value {k}": value.detach() for k, value in enumerate(values)}
    for name in call.wanted:
        gradient = tensors[name].grad
        results[f"gradient of {name}"] = torch.zeros_like(tensors[name]) if gradient is None else gradient
    return {name: t.detach() for name, t in results.items()}


def ours(call: Call) -> Results:
    """By the op, with the settings of the call."""
    arguments = copy.deepcopy(call.arguments)  # with strides, and with memory that is shared
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.enter_context(ssl_kernels.use_backend(call.backend))
        stack.enter_context(ssl_kernels.use_workspace(call.workspace_mb))
        stack.enter_context(ssl_kernels.use_tile_budget(call.budget_mb))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=call.autocast))
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(call.threads)
        results = results_of(getattr(K, call.op), call, arguments)
    if call.op == "key_softmax" and not call.arguments["want_mean"]:
        del results["value 1"]  # not to be relied on
    return results


def theirs(call: Call, noise: int = 0) -> Results:
    """By the formula; with errors of rounding if ``noise`` is not 0."""
    arguments = copy.deepcopy(call.arguments)
    if call.op not in IN_PLACE:
        arguments = {name: _widened(call, name, value) for name, value in arguments.items()}
    features = torch.bfloat16 if call.autocast and call.dtype != torch.float64 else call.features
    with rounding(unit(call.dtype) * (noise > 0), unit(features), noise):
        return results_of(FORMULAS[call.op], call, arguments)


def _widened(call: Call, name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_widened(call, name, t) for t in value]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if call.autocast and name in AUTOCAST.get(call.op, ()) and value.dtype != torch.float64:
        value = value.bfloat16()
    return value.double()


def allowed(call: Call, exact: Results) -> dict[str, float]:
    """How far each result may be off, as the norm of its error, but for its last rounding."""
    bounds = dict.fromkeys(exact, 0.0)
    for noise in range(1, 1 + NOISY):
        for name, t in theirs(call, noise).items():
            error = (t.double() - exact[name].double())[exact[name].isfinite()]
            bounds[name] = max(bounds[name], FACTOR[call.dtype] * error.norm().item())
    return bounds


def compare(call: Call, found: Results, exact: Results, bounds: dict[str, float]) -> list[str]:
    """What is wrong, in words."""
    wrong = [f"results are {list(found)}, expected {list(exact)}"] if list(found) != list(exact) else []
    for name in exact if not wrong else ():
        a, e = found[name], exact[name]
        if a.shape != e.shape:
            wrong.append(f"{name}: shape {tuple(a.shape)}, expected {tuple(e.shape)}")
            continue
        if not a.is_floating_point():
            wrong += [] if torch.equal(a, e) else [f"{name}: {a.tolist()}, expected {e.tolist()}"]
            continue
        returned = torch.float64 if call.features == torch.float64 else torch.float32
        if name == "value 0" and "student" not in call.arguments and a.dtype != returned:
            wrong.append(f"{name}: dtype {a.dtype}, expected {returned}")
        dtype = torch.bfloat16 if call.autocast and call.op in AUTOCAST and name.startswith("gradient") else a.dtype
        a, e = a.double(), e.double()
        if a.numel() and found[name].dtype == torch.float16:
            a, e = a.clamp(-6e4, 6e4), e.clamp(-6e4, 6e4)  # beyond lies infinity
        finite = e.isfinite()
        if not torch.equal(a[~finite].nan_to_num(1.5), e[~finite].nan_to_num(1.5)):
            wrong.append(f"{name}: {a[~finite].tolist()[:4]} where the formula says {e[~finite].tolist()[:4]}")
            continue
        error, size = (a - e)[finite].norm().item(), e[finite].norm().item()
        last = max(ROUNDINGS * unit(dtype), ROUNDINGS * unit(found[name].dtype), UNITS * unit(call.dtype))
        smallest = max(SMALLEST[call.dtype], SMALLEST[found[name].dtype])
        bound = bounds[name] + last * size + smallest * a.numel() ** 0.5
        if not error <= bound:
            wrong.append(f"{name}: off by {error:.3g} > {bound:.3g}, of a norm of {size:.3g}")
    return wrong


def check(call: Call) -> None:
    """The op against its formula."""
    exact = theirs(call)
    wrong = compare(call, ours(call), exact, allowed(call, exact))
    assert not wrong, complaint(call, wrong)


def complaint(call: Call, wrong: list[str]) -> str:
    again = f"check(draw({call.op!r}, {call.seed}, {call.number}, calm={call.calm}))"
    return "\n".join([str(call), *wrong, f"Again: from fuzz.harness import check, draw; {again}"])


def same_bits(a: Results, b: Results) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n].nan_to_num(1.5), b[n].nan_to_num(1.5)) for n in a)


__all__ = ["allowed", "check", "compare", "complaint", "draw", "ours", "same_bits", "theirs"]
