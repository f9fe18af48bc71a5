"""The sigmoid contrastive loss against its definition in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from contrastive import FUSED, HALF_EPS, distance, dtypes, features, lay_out, layouts
from covering import covering
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from memory import linux_only, peak_mb, saved_bytes
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.distributed import ALONE
from ssl_kernels.ops import sigmoid
from ssl_kernels.ops.contrastive import NO_DIAGONAL, finish_gradients


class Result(NamedTuple):
    loss: Tensor
    dx: Tensor
    dy: Tensor
    dscale: Tensor
    dbias: Tensor


def run(
    backend: str, x: Tensor, y: Tensor, scale: float, bias: float, weight: Tensor | None = None, **options: Any
) -> Result:
    """Loss and gradients; ``weight`` is the upstream gradient."""
    leaves = [x.detach().requires_grad_(), y.detach().requires_grad_()]
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves += [torch.tensor(v, dtype=kind, requires_grad=True) for v in (scale, bias)]
    with ssl_kernels.use_backend(backend):
        loss = K.sigmoid_contrastive_loss(*leaves, **options)
        loss.backward(torch.ones_like(loss) if weight is None else weight.to(loss.dtype))
    gradients = [leaf.grad for leaf in leaves]
    assert all(g is not None for g in gradients)
    return Result(loss.detach(), *gradients)  # type: ignore[arg-type]


def oracle(x: Tensor, y: Tensor, scale: float, bias: float, weight: Tensor | None = None, **options: Any) -> Result:
    weight = None if weight is None else weight.double()
    return run("reference", x.double(), y.double(), scale, bias, weight, **options)


def assert_close(ours: Result, eager: Result, exact: Result, dtype: torch.dtype) -> None:
    """err(ours) <= 2 err(plain PyTorch in fp32) + rounding, for the loss and every gradient."""
    rows = ours.dx.shape[0]
    # dscale and dbias are sums of rows x cols terms that may cancel; rounding is relative to the terms.
    spread = max(1.0, exact.dx.norm().item(), exact.dbias.abs().item()) * max(1, rows) ** 0.5
    for name in Result._fields:
        a, e, o = getattr(ours, name), getattr(eager, name), getattr(exact, name)
        assert a.shape == o.shape
        size = spread if name in ("dscale", "dbias") else o.double().norm().item()
        eps = HALF_EPS.get(dtype, 2e-6) if name in ("dx", "dy") else 2e-6
        subnormal = 2**-25 * a.numel() ** 0.5 if a.dtype == torch.float16 else 1e-30
        assert distance(a, o) <= 2 * distance(e, o) + eps * size + subnormal, name


# ---- values and gradients


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    size = st.integers(1, 70)
    return {
        "rows": draw(size),
        "cols": draw(size),
        "width": draw(st.integers(1, 40)),
        "dtype": draw(dtypes),
        "layout": draw(layouts),
        "ids": draw(st.sampled_from([None, 1, 3, 40])),
        "same_id": draw(st.sampled_from(["positive", "ignore"])),
        "offset": draw(st.integers(-75, 75)),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "scale": draw(st.sampled_from([0.0, 0.3, 10.0, 117.0, -2.0])),
        "bias": draw(st.sampled_from([-10.0, 0.0, 4.0])),
        "workspace_mb": draw(st.sampled_from([64, 0.02, 0.0005])),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(problem=problems())
def test_matches_the_float64_reference(backend: str, problem: dict[str, Any]) -> None:
    p = problem
    torch.manual_seed(p["seed"])
    x, y = features(p["rows"], p["cols"], p["width"], p["dtype"])
    x, y = lay_out(x, p["layout"]), lay_out(y, p["layout"])
    options: dict[str, Any] = {"offset": p["offset"], "reduction": p["reduction"], "same_id": p["same_id"]}
    if p["ids"] is not None:
        options["x_ids"] = torch.randint(p["ids"], (p["rows"],))
        options["y_ids"] = torch.randint(p["ids"], (2 * p["cols"],))[::2]
    weight = torch.randn(p["rows"]) if p["reduction"] == "none" else torch.tensor(-1.7)
    arguments = (x, y, p["scale"], p["bias"], weight)
    with ssl_kernels.use_workspace(p["workspace_mb"]):
        ours = run(backend, *arguments, **options)
    exact = oracle(*arguments, **options)
    eager = run("reference", x.float(), y.float(), *arguments[2:], **options)
    assert_close(ours, eager, exact, p["dtype"])


@pytest.mark.parametrize("width", [128, 512, 1152])
def test_a_training_sized_batch_is_as_exact_as_plain_pytorch(width: int) -> None:
    x, y = features(1024, 1024, width)
    y = F.normalize(y + x, dim=-1)  # aligned pairs, as in training
    ours, eager, exact = run("cpu", x, y, 10.0, -10.0), run("reference", x, y, 10.0, -10.0), oracle(x, y, 10.0, -10.0)
    assert distance(ours.loss, exact.loss) <= 1e-6 * exact.loss
    for name in ("dx", "dy", "dscale", "dbias"):
        a, e, o = (getattr(r, name) for r in (ours, eager, exact))
        assert distance(a, o) <= 2 * distance(e, o) + 1e-7 * o.norm(), name


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("same_id", ["positive", "ignore"])
def test_gradcheck(backend: str, reduction: str, same_id: str) -> None:
    x, y = (t.double().requires_grad_() for t in features(5, 7, 3))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -1.0))
    ids = {"x_ids": torch.tensor([0, 1, 1, 2, 3]), "y_ids": torch.tensor([1, 1, 0, 5, 3, 4, 2])}

    def loss(*leaves: Tensor) -> Tensor:
        return K.sigmoid_contrastive_loss(*leaves, **ids, same_id=same_id, offset=1, reduction=reduction)

    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.0005):
        assert torch.autograd.gradcheck(loss, (x, y, scale, bias))


def test_reference_supports_double_backward() -> None:
    x, y = (t.double().requires_grad_() for t in features(4, 3, 2))
    with ssl_kernels.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x, y: K.sigmoid_contrastive_loss(x, y, 3.0, -1.0), (x, y))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(backend: str, reduction: str) -> None:
    x, y = features(4, 4, 2)
    x.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    with ssl_kernels.use_backend(backend):
        loss = K.sigmoid_contrastive_loss(x, y, scale, 0.0, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
            gradient.sum().backward()


@pytest.mark.parametrize("cols", [2**20 + 3, 70_000])
@pytest.mark.parametrize("rows", [1, 4])
def test_few_rows_against_very_many_columns(rows: int, cols: int) -> None:
    """Long rows of equal terms: every rounding has the same sign, and fp32 sums alone would drift."""
    x, y = torch.ones(rows, 1), torch.full((cols, 1), 0.3)
    ours, exact = run("cpu", x, y, 10.0, -10.0, offset=cols), oracle(x, y, 10.0, -10.0, offset=cols)
    for name in ("loss", "dscale", "dbias"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name), rtol=1e-6, atol=0)


def test_forward_mode_and_functional_transforms_are_refused() -> None:
    x, y = features(4, 4, 2)

    def loss(x: Tensor) -> Tensor:
        return K.sigmoid_contrastive_loss(x, y, 2.0, -1.0)

    for transform in (lambda: torch.func.jvp(loss, (x,), (x,)), lambda: torch.func.grad(loss)(x)):
        with pytest.raises(NotImplementedError, match="use_backend\\('reference'\\)"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode AD"):
        loss(torch.autograd.forward_ad.make_dual(x, x))
    with ssl_kernels.use_backend("reference"):
        torch.testing.assert_close(torch.func.grad(loss)(x), run("cpu", x, y, 2.0, -1.0).dx)


# ---- properties


@hypothesis_settings(max_examples=30)
@given(rows=st.integers(1, 60), seed=st.integers(0, 1000))
def test_permuting_pairs_permutes_rows(rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = features(rows, rows, 8)
    order = torch.randperm(rows)
    whole = run("cpu", x, y, 10.0, -5.0, torch.ones(rows), reduction="none")
    moved = run("cpu", x[order], y[order], 10.0, -5.0, torch.ones(rows), reduction="none")
    for name in ("loss", "dx", "dy"):
        torch.testing.assert_close(getattr(moved, name), getattr(whole, name)[order], rtol=1e-5, atol=1e-5)


def test_blocks_with_offsets_add_up_to_the_whole() -> None:
    x, y = features(50, 64, 8)
    whole = run("cpu", x, y, 10.0, -5.0, reduction="sum", offset=3)
    parts = [
        run("cpu", x[i : i + 25], y[j : j + 32], 10.0, -5.0, reduction="sum", offset=3 + i - j)
        for i, j in itertools.product((0, 25), (0, 32))
    ]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(torch.cat([parts[0].dx + parts[1].dx, parts[2].dx + parts[3].dx]), whole.dx)
    torch.testing.assert_close(torch.cat([parts[0].dy + parts[2].dy, parts[1].dy + parts[3].dy]), whole.dy)


def test_ids_that_name_the_diagonal_change_nothing() -> None:
    x, y = features(67, 67, 16)
    ids = torch.randperm(67)
    plain = run("cpu", x, y, 10.0, -10.0)
    for same_id in ("positive", "ignore"):
        named = run("cpu", x, y, 10.0, -10.0, x_ids=ids, y_ids=ids, same_id=same_id)
        for a, b in zip(named, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_shifting_the_logits_through_the_bias_or_a_feature_is_the_same() -> None:
    x, y = features(40, 33, 8)
    shift = 0.7
    wide_x = torch.cat([x, torch.full((40, 1), shift)], 1)
    wide_y = torch.cat([y, torch.ones(33, 1)], 1)
    by_bias = K.sigmoid_contrastive_loss(x, y, 10.0, -10.0 + 10.0 * shift)
    by_feature = K.sigmoid_contrastive_loss(wide_x, wide_y, 10.0, -10.0)
    torch.testing.assert_close(by_feature, by_bias)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_result_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    """In one thread or many the kernel adds up in the same order; the products are exact in small integers."""
    x = torch.randint(-2, 3, (300, 16)).float()
    y = torch.randint(-2, 3, (200, 16)).float()
    expected = run("cpu", x, y, 0.3, -1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for a, b in zip(run("cpu", x, y, 0.3, -1.0), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert torch.equal(run("cpu", x, y, 0.3, -1.0).loss, expected.loss)
    finally:
        torch.set_num_threads(before)


def test_repeats_bit_for_bit() -> None:
    x, y = features(1500, 1100, 48)
    for a, b in zip(run("cpu", x, y, 10.0, -10.0), run("cpu", x, y, 10.0, -10.0), strict=True):
        assert torch.equal(a, b)


# ---- numerics


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("logit", [-80.0, -30.0, -12.0, -1e-3, 0.0, 3.0, 12.0, 30.0, 80.0])
def test_each_pair_keeps_its_relative_precision(backend: str, logit: float) -> None:
    """Tiny log1p(e) and confident positives lose nothing to 1 + e or to a difference of large numbers."""
    x = torch.tensor([[1.0], [1.0]])
    y = torch.tensor([[logit]])
    expected = [math.log1p(math.exp(-logit)) if logit > -700 else -logit, math.log1p(math.exp(logit))]
    ours = run(backend, x, y, 1.0, 0.0, torch.ones(2), reduction="none")
    torch.testing.assert_close(ours.loss.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    sigma = 1 / (1 + math.exp(-logit))
    expected_grad = torch.tensor([-1 / (1 + math.exp(logit)), sigma], dtype=torch.float64)[:, None] * logit
    torch.testing.assert_close(ours.dx.double(), expected_grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_fp32_and_gradients_have_the_dtype_of_the_features(dtype: torch.dtype) -> None:
    result = run("cpu", *features(9, 9, 4, dtype), 10.0, -10.0)
    assert result.loss.dtype == torch.float32
    assert result.dx.dtype == result.dy.dtype == dtype
    assert result.dscale.dtype == result.dbias.dtype == torch.float32


def test_bf16_logits_are_not_rounded_to_bf16() -> None:
    x, y = features(64, 64, 64, torch.bfloat16)
    y = F.normalize(y.float() + x.float(), dim=-1).bfloat16()
    exact = oracle(x, y, 100.0, -50.0)
    rounded = ((x @ y.t()) * 100.0 - 50.0).double()
    sign = 2 * torch.eye(64, dtype=torch.float64) - 1
    peer = F.softplus(-sign * rounded).sum() / 64
    ours = run("cpu", x, y, 100.0, -50.0)
    assert 100 * distance(ours.loss, exact.loss) < distance(peer, exact.loss)


def test_fp16_gradients_survive_a_batch_of_65536() -> None:
    """Under a loss scale of 2^16, as mixed precision uses; the factor t / M is applied in fp32."""
    rows = 65_536
    x = F.normalize(torch.randn(rows, 8), dim=-1).half()
    y = F.normalize(torch.randn(64, 8), dim=-1).half()
    scaled = torch.tensor(65_536.0)
    exact, ours = oracle(x, y, 10.0, -10.0, scaled), run("cpu", x, y, 10.0, -10.0, scaled)
    assert distance(ours.dx, exact.dx) <= 2**-10 * exact.dx.norm()
    assert (ours.dx != 0).float().mean() > 0.99


def test_small_row_weights_survive_in_half_precision() -> None:
    x, y = features(32, 32, 16, torch.float16)
    weight = torch.full((32,), 1e-7)
    weight[0] = 1e-5
    leaf = y.detach().requires_grad_()
    K.sigmoid_contrastive_loss(x, leaf, 10.0, 0.0, reduction="none").backward(weight)
    exact = oracle(x, y, 10.0, 0.0, weight, reduction="none")
    assert leaf.grad is not None
    assert distance(leaf.grad, exact.dy) <= 2**-10 * exact.dy.norm() + 2**-25 * leaf.numel() ** 0.5


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_products_are_as_exact_as_torch_is_told(precision: str) -> None:
    """A lower precision is the user's choice, never ours."""
    x, y = features(300, 300, 256)
    exact = oracle(x, y, 100.0, 0.0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours, eager = run("cpu", x, y, 100.0, 0.0), run("reference", x, y, 100.0, 0.0)
    finally:
        torch.set_float32_matmul_precision(before)
    allowed = 1e-6 * exact.dx.norm() + (0 if precision == "highest" else 4 * distance(eager.dx, exact.dx))
    assert distance(ours.dx, exact.dx) <= allowed


@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
@pytest.mark.parametrize("argument", ["x", "y", "scale", "bias"])
def test_non_finite_input_shows_in_the_loss(backend: str, argument: str) -> None:
    x, y = features(20, 30, 4)
    values: dict[str, Any] = {"x": x, "y": y, "scale": 10.0, "bias": -10.0}
    for bad in (math.nan, math.inf, -math.inf):
        if argument in "xy":
            values[argument][7, 1] = bad
        else:
            values[argument] = bad
        with ssl_kernels.use_backend(backend):
            assert not K.sigmoid_contrastive_loss(**values).isfinite()


@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
def test_pairs_left_out_contribute_exactly_nothing(backend: str) -> None:
    x, y = features(3, 5, 4)
    ids = {"x_ids": torch.tensor([0, 1, 2]), "y_ids": torch.tensor([0, 1, 2, 0, 1])}
    result = run(backend, x, y, 10.0, 3.0, reduction="sum", same_id="ignore", **ids)
    keep = [(i, j) for i in range(3) for j in range(5) if i == j or j % 3 != i]
    z = 10.0 * x.double() @ y.double().t() + 3.0
    expected = sum(F.softplus(-z[i, j] if i == j else z[i, j]) for i, j in keep)
    torch.testing.assert_close(result.loss.double(), torch.as_tensor(expected), rtol=1e-6, atol=0)


# ---- edges


@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
@pytest.mark.parametrize(("rows", "cols", "width"), [(0, 0, 4), (0, 5, 4), (5, 0, 4), (3, 4, 0), (1, 1, 1)])
def test_empty_and_tiny_inputs(backend: str, rows: int, cols: int, width: int) -> None:
    x, y = torch.ones(rows, width), torch.ones(cols, width)
    result = run(backend, x, y, 2.0, -1.0, reduction="sum")
    exact = oracle(x, y, 2.0, -1.0, reduction="sum")
    for a, o in zip(result, exact, strict=True):
        torch.testing.assert_close(a.double(), o)
    mean = run(backend, x, y, 2.0, -1.0)
    assert mean.loss.isnan() if rows == 0 else mean.loss == result.loss / rows
    assert all(g.isfinite().all() for g in mean[1:])  # an empty shard must not poison the others' parameters
    rows_loss = run(backend, x, y, 2.0, -1.0, reduction="none").loss
    assert rows_loss.shape == (rows,)


def test_every_row_may_be_a_positive_of_every_column() -> None:
    x, y = features(17, 19, 5)
    ids = {"x_ids": torch.zeros(17, dtype=torch.int64), "y_ids": torch.zeros(19, dtype=torch.int64)}
    ours, exact = run("cpu", x, y, 10.0, -10.0, **ids), oracle(x, y, 10.0, -10.0, **ids)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-6, atol=0)
    assert ours.dbias < 0


def test_ids_use_all_64_bits() -> None:
    x, y = features(4, 4, 4)
    ids = torch.tensor([2**40, 0, 2**40 + 2**33, -1])
    other = torch.tensor([0, 2**40 + 2**33, -1, 7])
    ours = run("cpu", x, y, 10.0, 0.0, x_ids=ids, y_ids=other, offset=100)
    exact = oracle(x, y, 10.0, 0.0, x_ids=ids, y_ids=other, offset=100)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", FUSED)
def test_only_the_gradients_that_are_needed(backend: str, reduction: str, needed: tuple[bool, ...]) -> None:
    x, y = features(30, 20, 6)
    exact = oracle(x, y, 10.0, -10.0, torch.ones(30) if reduction == "none" else None, reduction=reduction)
    leaves = [x, y, torch.tensor(10.0), torch.tensor(-10.0)]
    for leaf, need in zip(leaves, needed, strict=True):
        leaf.requires_grad_(need)
    with ssl_kernels.use_backend(backend):
        loss = K.sigmoid_contrastive_loss(*leaves, reduction=reduction)
        assert loss.requires_grad == any(needed)
        if any(needed):
            loss.sum().backward()
    for leaf, need, expected in zip(leaves, needed, exact[1:], strict=True):
        if need:
            torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert leaf.grad is None


def test_no_grad_computes_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product per tile, one column of statistics, no gradient buffer."""
    from ssl_kernels.ops import contrastive, panels, sigmoid

    products: list[tuple[int, ...]] = []
    widths: list[int] = []
    kernel = sigmoid._PANELS["cpu"]

    def spy(a: Any, x: Tensor, y: Tensor, stats: Tensor, *rest: Any) -> Tensor | None:
        widths.append(stats.shape[1])
        return kernel(a, x, y, stats, *rest)

    monkeypatch.setattr(contrastive, "_ONE_TILE", 0)
    monkeypatch.setattr(panels, "add_matmul", lambda out, a, b, first: products.append(a.shape))
    monkeypatch.setitem(sigmoid._PANELS, "cpu", spy)
    x, y = features(40, 40, 8)
    with torch.no_grad():
        K.sigmoid_contrastive_loss(x.requires_grad_(), y.requires_grad_(), 10.0, -10.0)
    assert (products, widths) == ([], [1])
    K.sigmoid_contrastive_loss(x, y.detach(), 10.0, -10.0)  # a frozen tower costs no product
    assert (products, widths) == ([(40, 40)], [1, 3])
    K.sigmoid_contrastive_loss(x, y, 10.0, -10.0, reduction="none")  # the weights of rows come with the backward pass
    assert (products, widths) == ([(40, 40)], [1, 3, 1])


def test_upstream_gradients_scale_the_result_and_retain_graph_repeats_it() -> None:
    x, y = features(12, 12, 4)
    x.requires_grad_()
    loss = K.sigmoid_contrastive_loss(x, y, 10.0, -10.0)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (twice,) = torch.autograd.grad(loss * 2, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x)
    assert torch.equal(twice, 2 * once)
    assert torch.equal(again, once)


def test_scale_of_one_element_any_shape_and_dtype_gets_its_gradient() -> None:
    x, y = features(12, 12, 4)
    expected = run("cpu", x, y, 10.0, -10.0)
    for shape, dtype in itertools.product([(), (1,), (1, 1)], [torch.float32, torch.float64]):
        scale = torch.full(shape, 10.0, dtype=dtype, requires_grad=True)
        bias = torch.full(shape, -10.0, dtype=dtype, requires_grad=True)
        K.sigmoid_contrastive_loss(x, y, scale, bias).backward()
        assert scale.grad is not None
        assert bias.grad is not None
        assert (scale.grad.shape, scale.grad.dtype) == (shape, dtype)
        torch.testing.assert_close(scale.grad.reshape(()).float(), expected.dscale)
        torch.testing.assert_close(bias.grad.reshape(()).float(), expected.dbias)


# ---- torch's machinery


@covering(1, backend=FUSED, reduction=["mean", "sum", "none"])
def test_opcheck(backend: str, reduction: str) -> None:
    x, y = (t.requires_grad_() for t in features(9, 6, 4))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    ids = (torch.randint(3, (9,)), torch.randint(3, (6,)))
    for needs in ([True] * 4, [False] * 4, [True, False, False, True]):
        for given_ids, weight in itertools.product((ids, (None, None)), (None, torch.rand(9))):
            leaves = [t.detach().requires_grad_(n) for t, n in zip((x, y, scale, bias), needs, strict=True)]
            torch.library.opcheck(
                sigmoid._op.in_graphs,
                (*leaves, *given_ids, False, 1, NO_DIAGONAL, weight, reduction, needs, 2**26, backend, *ALONE),
            )


def test_opcheck_of_the_last_step() -> None:
    dx, dy_t = torch.randn(3, 4), torch.randn(4, 5)
    for dtype in (torch.float32, torch.bfloat16):
        for upstream in (torch.tensor(0.5), None):
            arguments = (upstream, torch.tensor(10.0), torch.randn(3), dx, dy_t.t(), dtype)
            torch.library.opcheck(finish_gradients.in_graphs, arguments)


@covering(1, compiler=["aot_eager", "inductor"], reduction=["mean", "none"])
def test_compiles_without_a_graph_break(compiler: str, reduction: str) -> None:
    torch._dynamo.reset()
    x, y = features(33, 21, 8)
    ids = {"x_ids": torch.randint(9, (33,)), "y_ids": torch.randint(9, (21,))}

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        return K.sigmoid_contrastive_loss(x, y, scale.exp(), bias, **ids, reduction=reduction).sum()

    def gradients(function: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, y, torch.tensor(2.3), torch.tensor(-10.0))]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    expected = gradients(loss)
    for a, b in zip(gradients(compiled), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if compiler == "aot_eager":  # the others compile another graph for it, which takes seconds
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, y, torch.tensor(2.3), torch.tensor(-10.0)), expected[0])


def test_compiles_with_a_dynamic_batch() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(K.sigmoid_contrastive_loss, fullgraph=True, dynamic=True, backend=counter)
    compiled_frames = set()
    for rows in (9, 19, 33):
        x, y = features(rows, rows, 8)
        x.requires_grad_()
        loss = compiled(x, y, 10.0, -10.0)
        loss.backward()
        torch.testing.assert_close(x.grad, run("cpu", x, y, 10.0, -10.0).dx)
        compiled_frames.add(counter.frame_count)
    assert len(compiled_frames) == 1


def test_autocast_casts_features_and_nothing_else() -> None:
    x, y = features(40, 40, 16)
    scale = torch.tensor(117.3, requires_grad=True)  # 117.5 in bf16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = K.sigmoid_contrastive_loss(x.requires_grad_(), y, scale, -10.0)
    loss.backward()
    exact = oracle(x.detach().bfloat16(), y.bfloat16(), scale.item(), -10.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), exact.loss, rtol=1e-6, atol=0)
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert distance(x.grad, exact.dx) <= 2**-8 * exact.dx.norm()


def test_autocast_leaves_float64_alone_and_unifies_mixed_features() -> None:
    x, y = features(8, 8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert K.sigmoid_contrastive_loss(x.double(), y.double(), 10.0, -10.0).dtype == torch.float64
        K.sigmoid_contrastive_loss(x.bfloat16(), y, 10.0, -10.0)


def test_functional_call() -> None:
    x, y = features(8, 8, 4)
    expected = run("cpu", x, y, 10.0, -10.0).dx
    tower = torch.nn.Linear(4, 4, bias=False)
    weight = {"weight": torch.eye(4, requires_grad=True)}
    features_x = torch.func.functional_call(tower, weight, (x,))
    K.sigmoid_contrastive_loss(features_x, y, 10.0, -10.0).backward()
    torch.testing.assert_close(weight["weight"].grad, expected.t() @ x)


def test_inference_mode() -> None:
    x, y = features(8, 8, 4)
    expected = K.sigmoid_contrastive_loss(x, y, 10.0, -10.0)
    with torch.inference_mode():
        assert torch.equal(K.sigmoid_contrastive_loss(x, y, 10.0, -10.0), expected)


def test_other_devices_go_through_the_fake_op() -> None:
    x, y = torch.empty(6, 4, device="meta", requires_grad=True), torch.empty(5, 4, device="meta")
    loss = K.sigmoid_contrastive_loss(x, y, 10.0, -10.0)
    loss.backward()
    assert loss.shape == ()
    assert x.grad is not None
    assert x.grad.shape == x.shape


# ---- memory


@linux_only
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_and_saved_memory_are_linear_in_the_batch(reduction: str) -> None:
    batch, width = 4096, 64  # the similarity matrix alone would be 64 MB; the features are 1 MB each
    x, y = (t.requires_grad_() for t in features(batch, batch, width))
    K.sigmoid_contrastive_loss(x[:64], y[:64], 10.0, -10.0).backward()  # one-off buffers of the libraries

    def step() -> None:
        with saved_bytes() as sizes:
            loss = K.sigmoid_contrastive_loss(x, y, 10.0, -10.0, reduction=reduction).sum()
        assert sum(sizes) <= 1.1 * 2 * batch * width * 4 + 65_536
        loss.backward()

    assert peak_mb(step, calls=3) < 8 * (2 * batch * width * 4) / 2**20 + 16


@linux_only
def test_no_grad_keeps_nothing() -> None:
    x, y = (t.requires_grad_() for t in features(512, 512, 8))
    with torch.no_grad(), saved_bytes() as sizes:
        K.sigmoid_contrastive_loss(x, y, 10.0, -10.0)
    assert sizes == []


@pytest.mark.slow  # the test above has the same bound for smaller batches
@linux_only
def test_a_batch_of_32768_fits_in_400_mb() -> None:
    x, y = (t.requires_grad_() for t in features(32_768, 32_768, 512))
    K.sigmoid_contrastive_loss(x[:64], y[:64], 10.0, -10.0).backward()
    x.grad = y.grad = None
    assert peak_mb(lambda: K.sigmoid_contrastive_loss(x, y, 10.0, -10.0).backward()) < 400


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3)}, ValueError, r"x: expected 2 dimensions .* got shape \(3,\)"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x: expected dtype float32, .* got torch.int64"),
        ({"y": torch.ones(3, 4).bfloat16()}, TypeError, "y: expected the dtype of x .* got torch.bfloat16"),
        ({"y": torch.ones(3, 5)}, ValueError, "y: expected 4 features as x has, got 5"),
        ({"y": torch.ones(3, 4, device="meta")}, ValueError, "y: expected the device of x .* got meta"),
        ({"scale": torch.ones(2)}, ValueError, r"scale: expected a float or a floating tensor of one element, got .*2"),
        ({"scale": "10"}, TypeError, "scale: expected a float or a tensor of one element, got str"),
        ({"bias": torch.tensor(1)}, ValueError, "bias: expected a float or a floating tensor .* got torch.int64"),
        ({"x_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "y_ids: expected ids for both x and y"),
        (
            {"x_ids": torch.zeros(3), "y_ids": torch.zeros(3)},
            TypeError,
            "x_ids: expected an int64 tensor, got torch.float32",
        ),
        (
            {"x_ids": torch.zeros(3, dtype=torch.int64), "y_ids": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            r"y_ids: expected shape \(3,\), got \(2,\)",
        ),
        ({"same_id": "drop"}, ValueError, "same_id: expected one of 'positive', 'ignore', got 'drop'"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
        ({"offset": 1.5}, TypeError, "offset: expected an int, got float"),
        ({"offset": 2**63}, ValueError, r"offset: expected at most 2\*\*62 in magnitude"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(3, 4), "y": torch.ones(3, 4), "scale": 10.0, "bias": -10.0}
    with pytest.raises(error, match=message):
        K.sigmoid_contrastive_loss(**(arguments | change))


def test_the_kernel_checks_its_own_arguments() -> None:
    op = torch.ops.ssl_kernels.sigmoid_panel_
    tile, stats = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    for bad_tile, bad_stats, ids, message in (
        (tile.double(), stats, None, "tile: expected dtype Float, got Double"),
        (torch.zeros(3, 2).t(), stats, None, "tile: expected unit stride"),
        (torch.zeros(1, 3).expand(2, 3), stats, None, "tile: expected rows that do not overlap"),
        (tile, stats[:1], None, "stats: expected size 2 in dimension 0, got 1"),
        (tile, torch.zeros(2, 1, dtype=torch.float64), None, "stats: expected 3 columns"),
        (tile, stats, torch.zeros(5, dtype=torch.int64), "row_ids: expected size 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(bad_tile, bad_stats, 1.0, 0.0, ids, ids, False, 0, True)
    with pytest.raises(RuntimeError, match="expected both or neither"):
        op(tile, stats, 1.0, 0.0, torch.zeros(2, dtype=torch.int64), None, False, 0, True)
