"""Thousands of random calls of every public op against formulas of their own, in float64.

A failure says how to make the same call again. ``make test-all`` runs all of it, ``make test`` a short version.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from fuzz.draws import DRAWS, Call, draw, tensors_of
from fuzz.formulas import FORMULAS
from fuzz.harness import allowed, check, compare, complaint, ours, same_bits, theirs
from torch import Tensor

import ssl_kernels.functional as K

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = sorted(DRAWS)


def test_every_public_op_has_draws_and_a_formula() -> None:
    assert sorted(K.__all__) == OPS == sorted(FORMULAS)


@pytest.mark.parametrize("op", OPS)
def test_a_few_calls(op: str) -> None:
    for number in range(9):
        check(draw(op, 5, number))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("op", OPS)
def test_many_calls(op: str, seed: int) -> None:
    for number in range(40):
        check(draw(op, seed, number))


def check_again(call: Call) -> None:
    """The same bits when called again; the same results in other panels; samples in another order change nothing."""
    by_rows = call.arguments.get("reduction") == "none" or call.op in (
        "key_softmax",
        "row_lse",
        "centered_softmax",
        "sinkhorn_knopp",
    )
    call = replace(call, upstream="one") if by_rows else call
    first, exact = ours(call), theirs(call)
    assert same_bits(first, ours(call)), complaint(call, ["results differ when called again"])
    bounds = allowed(call, exact)
    other = replace(call, workspace_mb=64 if call.workspace_mb < 1 else 0.01, budget_mb=0 if call.budget_mb else 64)
    assert not (wrong := compare(other, ours(other), exact, bounds)), complaint(other, wrong)
    rows = {name: dim for name, dim in call.rows.items() if isinstance(call.arguments[name], Tensor)}
    if not rows or (call.op == "nt_xent_loss" and by_rows):
        return
    name, dim = next(iter(rows.items()))
    order = torch.randperm(call.arguments[name].shape[dim], generator=torch.Generator().manual_seed(call.number))
    moved = {name: call.arguments[name].index_select(dim, order) for name, dim in rows.items()}
    found = ours(replace(call, arguments={**call.arguments, **moved}))
    dims = {f"gradient of {name}": dim for name, dim in rows.items()}
    dims |= {"value 0": 0, "value 1": 0} if call.op == "key_softmax" else {"value 0": 0} if by_rows else {}
    for result in found.keys() & dims.keys():
        found[result] = found[result].index_select(dims[result], order.argsort())
    assert not (wrong := compare(call, found, exact, bounds)), complaint(call, ["rows in another order", *wrong])


@pytest.mark.parametrize("op", OPS)
def test_a_call_again(op: str) -> None:
    check_again(draw(op, 100, 0))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_many_calls_again(op: str) -> None:
    for number in range(1, 40):
        check_again(draw(op, 100, number))


@pytest.mark.parametrize("op", OPS)
def test_an_error_of_one_in_ten_thousand_is_found(op: str) -> None:
    """In each value and gradient of a call in float32 of ordinary size, one at a time."""
    call = draw(op, 200, 0, calm=True)
    found, exact = ours(call), theirs(call)
    bounds = allowed(call, exact)
    assert call.wanted == call.differentiable
    assert not (wrong := compare(call, found, exact, bounds)), complaint(call, wrong)
    for name, t in found.items():
        if t.is_floating_point():
            wrong = compare(call, {**found, name: t * (1 + 1e-4)}, exact, bounds)
            assert len(wrong) == 1, complaint(call, [f"{name} is not checked"])


def check_not_finite(op: str, number: int) -> None:
    """NaN and infinity among the inputs show in the values that they are in, and NaN nowhere else."""
    call = draw(op, 300, number, calm=True)
    choose = random.Random(f"{op} {number}")
    name = choose.choice([n for n, t in tensors_of(call.arguments).items() if t.is_floating_point() and t.dim()])
    poison = choose.choice([math.nan, math.inf, -math.inf])
    t = call.arguments[name.partition("[")[0]]
    t = t[int(name.partition("[")[2][:-1])] if isinstance(t, list) else t
    t[tuple(choose.randrange(n) for n in t.shape)] = poison
    found, exact = ours(call), theirs(call)
    for result in (r for r in exact if not r.startswith("gradient")):
        a, e = found[result].double(), exact[result].double()
        same = (a.isfinite() == e.isfinite()) | (a.isnan() & (not math.isnan(poison)))  # NaN of infinity is no fault
        same &= ~(a.isfinite() & e.isfinite()) | torch.isclose(a, e, rtol=1e-3, atol=1e-4)
        assert same.all(), complaint(call, [f"{poison} in {name}: {result} is {found[result]}, not {exact[result]}"])


@pytest.mark.parametrize("op", OPS)
def test_what_is_not_finite(op: str) -> None:
    for number in range(3):
        check_not_finite(op, number)
