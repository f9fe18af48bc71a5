"""What a call costs beside its matrix products, counted in operations: at small batches it is the whole cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import ssl_kernels as S

# Views, and what only allocates or reads.
FREE = {
    "_local_scalar_dense", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "expand_as", "item",
    "lift_fresh", "new_empty", "new_empty_strided", "promote_types", "reshape", "result_type", "select", "slice", "t",
    "transpose", "unbind", "unfold", "unsqueeze", "view", "resize_", "resolve_conj", "is_nonzero", "to", "contiguous",
}  # fmt: skip


def operations(call: Callable[[], object]) -> list[str]:
    """Names of what works, each the innermost of torch's own and this library's operations."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()

    def name(event: torch.autograd.profiler_util.FunctionEvent) -> str | None:
        space, _, op = event.name.partition("::")
        return op if space in ("aten", "mkldnn", "ssl_kernels") and op not in FREE else None

    return [op for event in profile.events() if (op := name(event)) and not any(map(name, event.cpu_children))]


@pytest.mark.parametrize(
    ("loss", "arguments", "most"),
    [
        ("ClipLoss", "x y scale", 5),
        ("SigLipLoss", "x y scale bias", 6),
        ("NTXentLoss", "x y", 8),
        ("InfoNCELoss", "x y keys", 11),
        ("KoLeoLoss", "x", 9),
        ("VICRegLoss", "x y", 15),
        ("BarlowTwinsLoss", "x y", 13),
    ],
)
@pytest.mark.parametrize("rows", [32, 8])  # at 8, the squares of 16 features are summed through the rows
def test_a_step_of_one_panel_takes_few_operations(loss: str, arguments: str, most: int, rows: int) -> None:
    x, y, keys = (F.normalize(torch.randn(rows, 16), dim=1) for _ in range(3))
    leaves = {"x": x, "y": y, "scale": torch.tensor(10.0), "bias": torch.tensor(-10.0)}
    inputs = {name: t.requires_grad_() for name, t in leaves.items()} | {"keys": keys}
    given = [inputs[name] for name in arguments.split()]
    wanted = [t for t in given if t.requires_grad]
    criterion = getattr(S, loss)()
    found = operations(lambda: torch.autograd.grad(criterion(*given), wanted))
    assert len(found) <= most, found
