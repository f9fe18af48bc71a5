"""DINOHead: its equation, its initialisation, checkpoints of its peers, and the frozen prototypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ssl_kernels import DINOHead


def make(**options: Any) -> DINOHead:
    return DINOHead(6, 20, hidden_dim=10, bottleneck_dim=5, **options)


def perturb(head: nn.Module) -> None:
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@given(
    layers=st.integers(1, 4), batch_norm=st.booleans(), norm_last_layer=st.booleans(), rows=st.integers(2, 6),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_the_logits_are_the_equation_s(
    layers: int, batch_norm: bool, norm_last_layer: bool, rows: int, seed: int
) -> None:
    """Against the layers one by one in float64, in evaluation mode and with weights unlike their initialisation."""
    torch.manual_seed(seed)
    head = make(layers=layers, batch_norm=batch_norm, norm_last_layer=norm_last_layer).double().eval()
    perturb(head)
    x = torch.randn(rows, 6, dtype=torch.float64)
    z = x
    parts = list(head.mlp) if isinstance(head.mlp, nn.Sequential) else [head.mlp]
    assert sum(isinstance(part, nn.Linear) for part in parts) == layers
    assert sum(isinstance(part, nn.BatchNorm1d) for part in parts) == (layers - 1) * batch_norm
    for part in parts:
        if isinstance(part, nn.Linear):
            z = z @ part.weight.T + part.bias
        elif isinstance(part, nn.BatchNorm1d):
            z = (z - part.running_mean) / (part.running_var + part.eps).sqrt() * part.weight + part.bias
        else:
            z = 0.5 * z * (1 + torch.erf(z / 2**0.5))
    z = z / z.square().sum(1, keepdim=True).sqrt()
    g, v = head.last_layer.weight_g, head.last_layer.weight_v
    expected = torch.stack([(z * (v[k] / v[k].norm())).sum(1) * g[k] for k in range(20)], 1)
    assert torch.allclose(head(x), expected, rtol=1e-12, atol=1e-14)


def test_it_starts_with_small_weights_and_prototypes_of_length_one() -> None:
    head = DINOHead(64, 500, hidden_dim=300, bottleneck_dim=40)
    for module in head.mlp:
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert module.bias.abs().max() == 0
    assert torch.equal(head.last_layer.weight_g, torch.ones(500, 1))
    assert not head.last_layer.weight_g.requires_grad
    assert make(norm_last_layer=False).last_layer.weight_g.requires_grad
    assert torch.allclose(head(torch.randn(7, 64)).norm(), (7 * 500 / 40) ** 0.5 * torch.ones(()), rtol=0.2)


def peer(batch_norm: bool) -> nn.Module:
    heads = pytest.importorskip("lightly.models.modules.heads")
    module: nn.Module = heads.DINOProjectionHead(6, 10, 5, 20, batch_norm=batch_norm, norm_last_layer=False)
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("prefix", ["", "student.head."])
def test_lightly_s_head_loads_and_agrees(batch_norm: bool, prefix: str) -> None:
    """In values, in the input's gradient and in the weights', with lightly's own state."""
    theirs = peer(batch_norm)
    perturb(theirs)
    ours = make(batch_norm=batch_norm, norm_last_layer=False)
    perturb(ours)  # what is not loaded would show
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    if prefix:
        wrapper = nn.ModuleDict({"student": nn.ModuleDict({"head": ours})})
        wrapper.load_state_dict(state)
    else:
        ours.load_state_dict(state)
    x = torch.randn(8, 6)
    upstream = torch.randn(8, 20)
    results = []
    for head in (ours, theirs):
        leaf = x.clone().requires_grad_()
        (head(leaf) * upstream).sum().backward()
        last = head.last_layer
        results.append([head(x), leaf.grad, last.weight_g.grad, last.weight_v.grad])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 3])
def test_meta_s_names_and_those_of_parametrizations_load(layers: int) -> None:
    """A head as Meta writes it, with torch's weight norm in its old and its new form."""
    if layers == 1:
        mlp: nn.Module = nn.Linear(6, 5)
    else:
        mlp = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 10), nn.GELU(), nn.Linear(10, 5))
    x = torch.randn(4, 6)
    for weight_norm in (torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm):
        last = weight_norm(nn.Linear(5, 20, bias=False))
        head = make(layers=layers, norm_last_layer=False)
        state = {f"mlp.{name}": value for name, value in mlp.state_dict().items()}
        state.update({f"last_layer.{name}": value for name, value in last.state_dict().items()})
        before = dict(state)
        head.load_state_dict(state)
        assert state.keys() == before.keys()
        assert torch.allclose(head(x), last(F.normalize(mlp(x), dim=1)), rtol=1e-5, atol=1e-6)
    if layers == 3:
        assert list(make().state_dict()) == [
            "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight", "mlp.4.bias",
            "last_layer.weight_g", "last_layer.weight_v",
        ]  # fmt: skip


def test_a_checkpoint_that_lacks_a_weight_is_still_refused() -> None:
    state = make().state_dict()
    del state["mlp.2.bias"]
    with pytest.raises(RuntimeError, match=r"mlp\.2\.bias"):
        make().load_state_dict(state)


def test_the_prototypes_stand_still_in_the_first_epochs() -> None:
    head = make(freeze_last_layer=2, norm_last_layer=False)
    begin = copy.deepcopy(head.state_dict())
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.1)
    for epoch in range(3):
        optimizer.zero_grad()
        head(torch.randn(4, 6)).square().sum().backward()
        head.cancel_last_layer_gradients(epoch)
        optimizer.step()
        moved = {name for name, value in head.state_dict().items() if not torch.equal(value, begin[name])}
        assert ("last_layer.weight_v" in moved) == ("last_layer.weight_g" in moved) == (epoch == 2)
        assert "mlp.0.weight" in moved


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_normalised_in_thirty_two(dtype: torch.dtype) -> None:
    """At 20,000 the norm is beyond float16, and at 0 the least norm that is divided by is below it."""
    head = make(layers=1, norm_last_layer=True).to(dtype)
    with torch.no_grad():
        head.mlp.weight.copy_(torch.eye(5, 6))
    for scale in (20_000.0, 1.0, 1e-4, 0.0):
        x = (scale * torch.tensor([[1.0, -2.0, 3.0, 0.5, 1.0, 0.0]])).to(dtype)
        logits = head(x)
        assert logits.dtype == dtype
        expected = copy.deepcopy(head).double()(x.double())
        assert torch.allclose(logits.double(), expected, atol=4 * torch.finfo(dtype).eps)


def test_it_runs_under_autocast_and_compiles() -> None:
    head = make()
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    assert torch.allclose(logits.float(), head(x), atol=0.03)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), head(x), rtol=1e-5, atol=1e-6)


def test_any_leading_shape_and_no_rows() -> None:
    head = make()
    x = torch.randn(2, 3, 6)
    assert torch.allclose(head(x)[1, 2], head(x[1, 2]), atol=1e-6)
    assert head(x[:0]).shape == (0, 3, 20)
    copied: Tensor = copy.deepcopy(head)(x)  # after a forward pass
    assert torch.equal(copied, head(x))


@pytest.mark.parametrize("name", ["in_dim", "out_dim", "hidden_dim", "bottleneck_dim", "layers"])
def test_sizes_are_checked(name: str) -> None:
    sizes = {"in_dim": 6, "out_dim": 20, "hidden_dim": 10, "bottleneck_dim": 5, "layers": 3, name: 0}
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        DINOHead(**sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="freeze_last_layer: expected a number of epochs >= 0, got -1"):
        make(freeze_last_layer=-1)
