"""The Triton kernels of the search for nearest neighbours in the strict interpreter, against float64.

A neighbour is right if its similarity is the largest but for rounding; where products are exact it must be the one.
"""

from __future__ import annotations

import pytest
import torch
from covering import covering
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from panels import cut_to_tf32, features, rows_far_apart, shipped
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.kernels import koleo
from ssl_kernels.kernels.koleo import CONFIGS, Config, koleo_panel
from ssl_kernels.kernels.tiles import operands

pytestmark = pytest.mark.usefixtures("strict")


def search(u: Tensor, cuts: list[int], config: Config | None = None) -> tuple[Tensor, Tensor]:
    """All panels on and above the diagonal, in the order of the driver, for panels that start at ``cuts``."""
    best, neighbor = torch.full((len(u),), -torch.inf), torch.full((len(u),), -1)
    panels = [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(u)], strict=True)]
    for a, rows in enumerate(panels):
        for cols in panels[a:]:
            koleo_panel(u[rows], u[cols], best, neighbor, rows.start, cols.start, config=config)
    return best, neighbor


def check(u: Tensor, cuts: list[int], *, is_tf32: bool = False, config: Config | None = None) -> None:
    best, neighbor = search(u, cuts, config)
    read = (cut_to_tf32(u) if is_tf32 else u).double()
    similarity = (read @ read.t()).fill_diagonal_(-torch.inf)
    largest = similarity.amax(1)
    error = 3e-7 * read.norm(dim=1) * read.norm(dim=1).max()
    assert ((best - largest).abs() <= error).all()
    assert (similarity.gather(1, neighbor[:, None])[:, 0] >= largest - 2 * error).all()


def check_exactly(u: Tensor, cuts: list[int], config: Config | None = None) -> None:
    """Small integers have exact products and many equal ones: the first is taken."""
    best, neighbor = search(u, cuts, config)
    similarity = (u @ u.t()).fill_diagonal_(-torch.inf)
    assert torch.equal(best, similarity.amax(1))
    assert torch.equal(neighbor, similarity.argmax(1))


@pytest.mark.parametrize("config", shipped(CONFIGS, "ieee"), ids=str)
def test_every_config_in_ieee_fp32(config):
    rows = config.block_m + config.block_n + 7
    check(features(rows, config.block_d + 9, torch.float32), [0, config.block_m + 3], config=config)
    check_exactly(torch.randint(-2, 3, (rows, 5)).float(), [0, config.block_m + 3], config)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("config", shipped(CONFIGS, "tf32"), ids=str)
def test_every_config_in_tf32(config):
    rows = config.block_m + config.block_n + 7
    check(features(rows, config.block_d + 9, torch.float32), [0, config.block_m + 3], is_tf32=True, config=config)
    check_exactly(torch.randint(-2, 3, (rows, 5)).float(), [0, config.block_m + 3], config)


@pytest.mark.usefixtures("tf32")
def test_descriptors(monkeypatch):
    used = []
    monkeypatch.setattr(koleo, "operands", lambda *args: used.append(operands(*args)) or used[-1])
    for config in dict.fromkeys(c for c in shipped(CONFIGS, "tf32") if c.descriptors):
        rows, width = config.block_m + config.block_n + 7, config.block_d + 16
        check(features(rows, width, torch.float32), [0, config.block_m + 3], is_tf32=True, config=config)
    assert used
    assert all(isinstance(x, TensorDescriptor) for operand in used for x in operand[:2])


@covering(1, size=[(2, 1), (3, 17), (17, 3), (150, 64), (70, 33)], pieces=[1, 2, 3])
def test_sizes(size, pieces):
    rows, width = size
    cuts = sorted({rows * k // pieces for k in range(pieces)})
    check(features(rows, width, torch.float32), cuts)
    check_exactly(torch.randint(-1, 2, (rows, width)).float(), cuts)


def test_of_equal_rows_the_first_is_taken():
    u = torch.ones(150, 3)
    for cuts in ([0], [0, 70], [0, 1, 140]):
        _, neighbor = search(u, cuts)
        assert neighbor.tolist() == [1] + [0] * 149


def test_similarities_below_zero():
    """Zeros that only fill the last block would be the largest."""
    u = torch.tensor([[1.0], [-1.0]])
    best, neighbor = search(u, [0, 1])
    assert best.tolist() == [-1, -1]
    assert neighbor.tolist() == [1, 0]


def test_strides():
    check(features(24, 90, torch.float32).t(), [0, 40])
    check(features(180, 48, torch.float32)[::2, 1::2], [0, 40])
    check_exactly(torch.ones(1, 5).expand(70, 5), [0, 33])


def test_offsets_beyond_32_bits():
    check(rows_far_apart(4, 5).copy_(features(4, 5, torch.bfloat16)), [0, 2])


def test_what_was_found_before_stays_unless_there_is_a_larger():
    u = torch.randint(-2, 3, (40, 4)).float()
    best, neighbor = search(u, [0])
    again, same = best.clone(), neighbor.clone()
    koleo_panel(u, u, again, same, 0, 0)
    assert torch.equal(again, best)
    assert torch.equal(same, neighbor)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(2, 150),
    width=st.integers(1, 40),
    cut=st.integers(0, 149),
    exact=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_panel(rows, width, cut, exact, seed):
    torch.manual_seed(seed)
    cuts = [0] if cut in (0, *range(rows, 150)) else [0, cut]
    if exact:
        check_exactly(torch.randint(-1, 2, (rows, width)).float(), cuts)
    else:
        check(features(rows, width, torch.float32), cuts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_through_the_driver(dtype):
    x = torch.randn(70, 12).to(dtype)
    results = []
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.002):
            loss = K.koleo_loss(leaf)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
