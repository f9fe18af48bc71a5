"""The Triton kernels of the softmax over frozen keys in the strict interpreter, against the dense formula in float64.

The oracle is given the operands that the kernel multiplies. What is left is fp32 arithmetic, and in 16 bits the
rounding of the weights of the mean.
"""

from __future__ import annotations

import math

import pytest
import torch
from covering import covering
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from panels import DTYPES, UNIT, cut_to_tf32, features, rows_far_apart, shipped
from torch import Tensor

from ssl_kernels.kernels import key_softmax as module
from ssl_kernels.kernels.key_softmax import CONFIGS, Config, key_softmax

pytestmark = pytest.mark.usefixtures("strict")
INF = float("inf")


def dense(query: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    z = scale * (query @ keys.t())
    return z.logsumexp(1), z.softmax(1) @ keys


def check(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float = 10.0,
    is_tf32: bool = False,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    lse, mean = key_softmax(query, keys, torch.tensor(scale), True, config=config, splits=splits)
    alone, nothing = key_softmax(query, keys, torch.tensor(scale), False, config=config, splits=splits)
    assert nothing is None
    assert mean is not None
    assert lse.dtype == alone.dtype == mean.dtype == torch.float32

    read = keys.to(query.dtype)
    q, k = (cut_to_tf32(query), cut_to_tf32(read)) if is_tf32 else (query, read)
    want_lse, want = dense(q.double(), k.double(), float(torch.tensor(scale)))
    eager_lse, eager = dense(query.float(), read.float(), scale)
    z_error = 3e-7 * abs(scale) * (q.double() @ k.double().t()).abs().max().item() + 1e-6
    for got in (lse, alone):
        error = (got - want_lse).abs()
        assert (error <= z_error).all(), (error / z_error).max()
        assert (error <= 2 * (eager_lse - want_lse).abs() + z_error).all()
    # Weights sum to 1, and each is off by its relative error.
    unit = 2**-10 if is_tf32 else UNIT[query.dtype]
    spread = (scale * (q.double() @ k.double().t())).softmax(1) @ k.double().abs()
    tolerance = (2 * z_error + unit) * spread + 1e-7 * spread.max(1, keepdim=True).values
    error = (mean - want).abs()
    assert (error <= tolerance).all(), (error / tolerance).max()
    assert (error <= 2 * (eager - want).abs() + tolerance).all()
    return lse, mean


def width_for(config: Config) -> int:
    """A ragged width of two chunks of the mean, or of one tile."""
    return 41 if config.block_d is None else config.block_e + 9


@pytest.mark.parametrize("config", shipped(CONFIGS, "half"), ids=str)
def test_every_config_in_16_bits(config):
    dtype = torch.float16 if config.block_d == 32 else torch.bfloat16
    m, k, d = config.block_m + 3, config.block_n + 5, width_for(config)
    check(features(m, d, dtype), features(k, d, dtype), config=config, splits=2)


@pytest.mark.parametrize("config", shipped(CONFIGS, "ieee"), ids=str)
def test_every_config_in_ieee_fp32(config):
    m, k, d = config.block_m + 3, config.block_n + 5, width_for(config)
    check(features(m, d, torch.float32), features(k, d, torch.float32), config=config, splits=2)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("config", shipped(CONFIGS, "tf32"), ids=str)
def test_every_config_in_tf32(config):
    m, k, d = config.block_m + 3, config.block_n + 5, width_for(config)
    check(features(m, d, torch.float32), features(k, d, torch.float32), config=config, splits=2, is_tf32=True)


@covering(2, d=[16, 37, 144], dtype=DTYPES, key_dtype=DTYPES)
def test_keys_of_another_dtype(d, dtype, key_dtype):
    """Rounded as they are read: to nearest, as a cast does."""
    check(features(9, d, dtype), features(70, d, key_dtype))


def test_keys_that_are_converted_first(monkeypatch):
    seen, choose = [], module.choose_config
    monkeypatch.setattr(module, "converts_keys_first", lambda family, kind: kind == "ieee")
    monkeypatch.setattr(module, "choose_config", lambda *args: seen.append(args[1].dtype) or choose(*args))
    for dtype in (torch.float32, torch.bfloat16):
        check(features(9, 37, dtype), features(70, 37, torch.float16))
    assert seen == [torch.float32] * 2 + [torch.float16] * 2  # with the mean and without


@covering(1, size=[(1, 1, 1), (3, 17, 5), (17, 3, 128), (130, 65, 64)], dtype=DTYPES)
def test_sizes(size, dtype):
    m, k, d = size
    check(features(m, d, dtype), features(k, d, dtype))


@pytest.mark.parametrize("splits", [1, 7, 1000])
def test_any_number_of_splits_gives_the_same(splits):
    """There are no more than blocks of 32 keys, 24 here, and they are merged 16 at a time."""
    query, keys = features(5, 16, torch.float32), features(760, 16, torch.float32)
    keys *= torch.linspace(-4, 4, 760)[:, None]  # maxima that fall and rise from block to block
    config = Config(64, 32, 16, 64, 8, 2)
    lse, mean = check(query, keys, scale=30.0, splits=splits, config=config)
    again = key_softmax(query, keys, torch.tensor(30.0), True, splits=splits, config=config)
    assert torch.equal(lse, again[0])
    assert torch.equal(mean, again[1])


@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("want_mean", [False, True])
def test_nothing_to_sum(m, want_mean):
    lse, mean = key_softmax(features(m, 8, torch.bfloat16), torch.zeros(0, 8), torch.tensor(1.0), want_mean)
    assert torch.equal(lse, torch.full((m,), -INF))
    assert (mean is not None) == want_mean
    assert mean is None or torch.equal(mean, torch.zeros(m, 8))
    assert key_softmax(features(0, 8, torch.float32), torch.ones(4, 8), torch.tensor(1.0), True)[1].shape == (0, 8)


@pytest.mark.parametrize("scale", [0.0, -30.0, 100.0, 5000.0, -5000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales(scale, dtype):
    check(features(20, 32, dtype), features(150, 32, dtype), scale=scale, splits=3)


@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_the_largest_of_huge_similarities_is_alone(scale):
    """A logit of 9e12 is rounded by half a million."""
    query, keys = torch.tensor([[3e5], [-3e5]]), torch.tensor([[3e5], [0.0], [-3e5], [3e5 - 1]])
    lse, mean = key_softmax(query, keys, torch.tensor(scale), True, config=Config(64, 32, 16, 64, 8, 2))
    torch.testing.assert_close(lse, torch.full((2,), 9e12), rtol=1e-6, atol=0)
    assert torch.equal(mean, torch.tensor([[3e5], [-3e5]]) * (1 if scale > 0 else -1))


def test_all_keys_are_far_below_zero():
    """Zeros that only fill the last block would be the largest by far."""
    query, keys = torch.ones(3, 4), -torch.ones(33, 4)
    lse, mean = check(query, keys, scale=100.0)
    torch.testing.assert_close(lse, torch.full((3,), -400 + math.log(33)))
    torch.testing.assert_close(mean, -torch.ones(3, 4))


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 24), (torch.bfloat16, 70)], ids=str)
def test_strides(dtype, d):
    m, k = 37, 71
    columns = features(d, k, dtype).t()  # a queue [D, K], as MoCo keeps it
    check(features(d, m, dtype).t(), columns)
    check(features(2 * m, 2 * d, dtype)[::2, 1::2], torch.randn(3 * k, d).to(dtype)[::3] * 0.1)
    check(features(1, d, dtype).expand(m, d), columns)


def test_offsets_beyond_32_bits():
    k, d = 4, 5
    far = rows_far_apart(k, d).copy_(features(k, d, torch.bfloat16))
    check(features(3, d, torch.bfloat16), far)
    check(far, features(3, d, torch.bfloat16))


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("splits", [1, 4])
def test_nan_comes_out_and_only_where_it_belongs(splits):
    query, keys = features(5, 12, torch.float32), features(200, 12, torch.float32)
    scale = torch.tensor(10.0)
    query[3, 2] = float("nan")
    lse, mean = key_softmax(query, keys, scale, True, splits=splits)
    assert lse.isnan().tolist() == mean.isnan().all(1).tolist() == mean.isnan().any(1).tolist()
    assert lse.isnan().tolist() == [False, False, False, True, False]
    keys[150, 7] = float("nan")
    lse, mean = key_softmax(query, keys, scale, True, splits=splits)
    assert lse.isnan().all()
    assert mean.isnan().all()
    assert key_softmax(query[:3], keys[:150], torch.tensor(float("nan")), False, splits=splits)[0].isnan().all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's word for the infinities meant here
@pytest.mark.parametrize("splits", [1, 3])
def test_infinite_logits(splits):
    query, keys = torch.ones(1, 1), torch.ones(100, 1)
    keys[40] = -INF
    lse, _ = key_softmax(query, keys, torch.tensor(1.0), False, splits=splits)
    torch.testing.assert_close(lse.item(), 1 + math.log(99), rtol=1e-6, atol=0)
    lse, _ = key_softmax(query, keys, torch.tensor(-1.0), False, splits=splits)
    assert lse.isnan().all()
    lse, _ = key_softmax(query, torch.full((70, 1), -INF), torch.tensor(1.0), False, splits=splits)
    assert lse.item() == -INF


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 70),
    k=st.integers(1, 150),
    d=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    key_dtype=st.sampled_from(DTYPES),
    splits=st.integers(1, 9),
    scale=st.floats(-300, 300, width=32),
    seed=st.integers(0, 2**31),
)
def test_any_queue(m, k, d, dtype, key_dtype, splits, scale, seed):
    torch.manual_seed(seed)
    check(features(m, d, dtype), features(k, d, key_dtype), scale=scale, splits=splits)
