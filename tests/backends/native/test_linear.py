"""The fast Gauss transform of the native backend: the forward pass, against extended precision and against itself."""

import math

import numpy as np
import pytest
import torch
from conftest import every_other
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import BANDWIDTHS, KINDS, exact, keys_of, problems, queries_of, some_rows

import nwfast

pytestmark = pytest.mark.usefixtures("native")


def linear(*args, **options):
    return nwfast.nadaraya_watson(*args, method="fgt", backend="native", **options)


def kernel(query, key, value, w, key_weight=None, exclude_self=False, tangents=True):
    """The operator itself: out, lse, state, tangent_w, tangent_q."""
    w = torch.tensor(w, dtype=query.dtype)
    return torch.ops.nwfast.native_fgt_forward(
        query, key, value, w, key_weight, exclude_self, tangents, tangents
    )


def assert_forward(query, key, value, w, key_weight=None, exclude_self=False, bound=None) -> None:
    """out, lse and tangents of one channel within the bounds of the dtype.

    out relative to the largest value; lse relative to itself or 1; tangents relative to what one pair can add.
    """
    if bound is None:
        bound = {torch.float64: 1e-12, torch.float32: 2.0**-22}[query.dtype]
    out, lse, state, tangent_w, tangent_q = kernel(query, key, value, w, key_weight, exclude_self)
    w = float(torch.tensor(w, dtype=query.dtype))
    rows = some_rows(len(query))
    expected = exact(query, key, value, w, key_weight, exclude_self, rows)
    largest = float(value.abs().max())
    spread = largest if largest > 0 else 1.0

    def error(actual, wanted, scale):
        return float(np.max(np.abs(actual[rows].numpy().astype(np.longdouble) - wanted) / scale))

    assert error(out, expected.out[:, 0], spread) <= bound
    assert error(lse, expected.lse, np.maximum(1, np.abs(expected.lse))) <= bound
    total = torch.log(state[:, 1]) - math.log(2) * state[:, 0]
    assert error(total, expected.lse, np.maximum(1, np.abs(expected.lse))) <= bound
    if w > 0:
        by_w, by_q = expected.tangent_w[:, 0], expected.tangent_q[:, 0]
        # Far rows: weights are rounded, and a pair adds its weight times a distance or its square, in bandwidths.
        kept = key if key_weight is None else key[key_weight > 0]
        away = np.abs(np.subtract.outer(query[rows].double().numpy(), kept.double().numpy())).min(1)
        rounded = 4 * torch.finfo(query.dtype).eps / (10 * bound) * w * away
        assert (
            error(tangent_w, by_w, (spread / w + np.abs(by_w).max()) * (1 + rounded * w * away)) <= 10 * bound
        )
        assert error(tangent_q, by_q, (spread * w + np.abs(by_q).max()) * (1 + rounded)) <= 10 * bound


@every_other("kind, w, dtype", KINDS, BANDWIDTHS, (torch.float64, torch.float32))
def test_forward_at_every_bandwidth(kind, w, dtype):
    generator = np.random.default_rng(1)
    keys = keys_of(kind, 1500, generator)
    queries = np.sort(queries_of(keys, 1000, generator))
    key = torch.from_numpy(np.sort(keys)).to(dtype)
    value = torch.sin(key - key[0]) + 0.1 * torch.randn(1500, dtype=dtype)
    assert_forward(torch.from_numpy(queries).to(dtype), key, value, w)


@given(problems())
def test_forward_of_few_points(problem):
    assert_forward(*problem)


@given(problems(), st.integers(0, 2**32 - 1), st.sampled_from((1, 30)))
def test_key_weights_of_any_span(problem, seed, decades):
    query, key, value, w = problem
    generator = np.random.default_rng(seed)
    weight = torch.from_numpy(10.0 ** generator.uniform(-decades, 0, len(key)))
    weight[generator.random(len(key)) < 0.2] = 0
    if weight.any():
        assert_forward(query, key, value, w, weight)
    else:
        assert linear(query, key, value, w, key_weight=weight).isnan().all()


@pytest.mark.parametrize("w", [0.0, 3.0, 200.0, 1e4])
def test_key_weights_of_thirty_decades_in_crowded_boxes(w):
    generator = np.random.default_rng(2)
    key = torch.from_numpy(np.sort(generator.uniform(0, 5, 2000)))
    query = torch.from_numpy(np.sort(generator.uniform(-1, 6, 1000)))
    weight = torch.from_numpy(10.0 ** generator.uniform(-30, 0, 2000))
    assert_forward(query, key, torch.cos(key), w, weight)
    assert_forward(
        query, key, torch.cos(key), w, 10.0 ** (-6 * key)
    )  # falls by a factor of 1e30 along the axis


@given(problems(), st.booleans())
def test_leave_one_out(problem, apart):
    """Against (n, n - 1) keys, with queries that are the keys, and queries that are not."""
    query, key, value, w = problem
    n = len(key)
    if n == 1:
        assert linear(key, key, value, w, exclude_self=True).isnan().all()
        return
    query = query[torch.arange(n) % len(query)] if apart else key
    assert_forward(query, key, value, w, exclude_self=True)
    if apart:  # far from the keys the textbook's lines lose digits themselves
        return
    others = torch.arange(n).repeat(n, 1)[(1 - torch.eye(n)).bool()].reshape(n, n - 1)
    built = nwfast.nadaraya_watson(query, key[others], value[others], w, backend="reference")
    torch.testing.assert_close(
        linear(query, key, value, w, exclude_self=True), built, rtol=0, atol=1e-9 * float(value.abs().max())
    )


@every_other("kind, w", KINDS, (3.0, 100.0, 1e4))
def test_leave_one_out_in_crowded_boxes(kind, w):
    key = torch.from_numpy(keys_of(kind, 1200, np.random.default_rng(3)))
    assert_forward(key, key, torch.sin(key - key[0]), w, exclude_self=True)
    assert_forward(key + 0.3, key, torch.sin(key - key[0]), w, exclude_self=True)
    weight = 10.0 ** (
        -20 * torch.rand(1200, dtype=torch.float64)
    )  # some rows are dominated by what they leave out
    assert_forward(key, key, torch.sin(key - key[0]), w, weight, exclude_self=True)


def test_queries_at_a_thousand_million_bandwidths():
    key = torch.from_numpy(np.sort(np.random.default_rng(4).normal(size=3000)))
    query = torch.tensor([-1e9, -3e4, 3e4, 1e9], dtype=torch.float64)
    assert_forward(query, key, torch.sin(key), 1.0)
    out = linear(query, key, torch.sin(key), 1.0)
    assert out[0] == torch.sin(key[0]) and out[-1] == torch.sin(key[-1])
    tight = key * 1e-9  # all of them count, whatever the distance
    assert_forward(query, tight, torch.sin(key), 1.0)


def test_a_distant_crowd_does_not_drown_the_nearest_key():
    """A key two bandwidths away, and 200 000 of them that weigh as much at five or six."""
    generator = np.random.default_rng(5)
    key = torch.from_numpy(np.r_[generator.uniform(5.0, 6.5, 200_000), 0.0, -1.9])
    query = torch.linspace(-2.5, 1.5, 15, dtype=torch.float64)
    value = torch.cos(key)
    assert_forward(query, key, value, 1.0)
    assert_forward(query.float(), key.float(), value.float(), 1.0)


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_channels(channels):
    generator = np.random.default_rng(6)
    key = torch.from_numpy(generator.uniform(0, 5, 700))
    query = torch.from_numpy(generator.uniform(-1, 6, 400))
    value = torch.from_numpy(generator.normal(size=(700, channels)))
    for layout in (value, value.t().contiguous().t(), value[:, :1].expand(700, channels)):
        for w in (1.0, 60.0, 1e4):
            wanted = exact(query, key, layout, w, tangents=False).out.astype(np.float64)
            torch.testing.assert_close(linear(query, key, layout, w).numpy(), wanted, rtol=0, atol=1e-12)


def test_batches_with_their_own_keys_and_bandwidths():
    query, key = torch.rand(2, 3, 50, 1, dtype=torch.float64), torch.rand(1, 3, 400, 1, dtype=torch.float64)
    value = torch.randn(2, 3, 400, 2, dtype=torch.float64)
    w = torch.tensor([2.0, 50.0, 1e4], dtype=torch.float64)[:, None]
    weight = torch.rand(1, 3, 400, dtype=torch.float64)
    arguments = query, key, value, w
    result = linear(*arguments, key_weight=weight, return_lse=True)
    dense = nwfast.nadaraya_watson(*arguments, key_weight=weight, return_lse=True, backend="reference")
    for actual, wanted in zip(result, dense, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_one_row_of_keys_a_query():
    query, key = torch.rand(40, dtype=torch.float64), torch.rand(40, 90, dtype=torch.float64)
    value = torch.randn(40, 90, dtype=torch.float64)
    wanted = nwfast.nadaraya_watson(query, key, value, 30.0, backend="reference")
    torch.testing.assert_close(linear(query, key, value, 30.0), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_storage(dtype):
    key, query = torch.rand(600).to(dtype), torch.rand(300).to(dtype)
    value = torch.randn(600).to(dtype)
    wanted = linear(query.float(), key.float(), value.float(), 40.0).to(dtype)
    assert torch.equal(linear(query, key, value, 40.0), wanted)


@pytest.mark.parametrize("w", [0.0, 3.0, 300.0, 3e4])
def test_results_come_in_the_order_of_the_caller(w):
    generator = np.random.default_rng(7)
    key, query = torch.from_numpy(generator.uniform(0, 5, (2, 30_000)).astype(np.float32))
    value = torch.sin(key)
    key_order, row_order = key.argsort(), query.argsort()
    wanted = torch.empty(30_000)
    wanted[row_order] = linear(query[row_order], key[key_order], value[key_order], w)
    torch.testing.assert_close(linear(query, key, value, w), wanted, rtol=0, atol=2e-7)


@pytest.mark.parametrize("w", [0.0, 1.0, 300.0, 1e5])
def test_constant_values_come_back_exactly(w):
    generator = np.random.default_rng(9)
    key = torch.from_numpy(generator.uniform(0, 5, 3000)).float()
    query = torch.from_numpy(generator.uniform(-2, 7, 2000)).float()
    assert (linear(query, key, torch.full_like(key, 0.1), w) == torch.tensor(0.1)).all()
    value = torch.rand(3000) + 5
    out = linear(query, key, value, w)
    assert value.min() <= out.min() and out.max() <= value.max()


def test_no_bandwidth_is_average_pooling():
    key, value = torch.randn(5000, dtype=torch.float64), torch.randn(5000, dtype=torch.float64)
    out, lse = linear(key[:300] * 100, key, value, 0.0, return_lse=True)
    torch.testing.assert_close(out, value.mean().expand(300), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(lse, torch.full((300,), math.log(5000), dtype=torch.float64))


@pytest.mark.parametrize("w", [1e-200, 1e-30, 1e30, 1e200])
def test_bandwidths_beyond_all_scales(w):
    key = torch.sort(torch.rand(500, dtype=torch.float64)).values
    query = torch.rand(200, dtype=torch.float64)
    value = torch.sin(key)
    wanted = nwfast.nadaraya_watson(query, key, value, w, method="dense", backend="native")
    torch.testing.assert_close(linear(query, key, value, w), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["key", "value", "key_weight"])
def test_bad_numbers_are_as_in_the_dense_method(place, bad):
    tensors = {name: torch.rand(300) for name in ("query", "key", "value", "key_weight")}
    tensors[place][5] = bad
    results = []  # queries are in test_linear_extremes.py
    for method in ("fgt", "dense"):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out, lse = nwfast.nadaraya_watson(**leaves, w=9.0, method=method, backend="native", return_lse=True)
        grads = torch.autograd.grad(out.nansum() + lse.nansum(), list(leaves.values()))
        results.append((out, lse, *grads))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_negative_weights_are_as_in_the_dense_method():
    x, weight = torch.rand(300), torch.rand(300)
    weight[7] = -1
    assert linear(x, x, x, 9.0, key_weight=weight).isnan().all()


def test_no_queries():
    x = torch.rand(300, requires_grad=True)
    out = linear(x[:0], x, x, 2.0)
    assert out.shape == (0,)
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(300))


def test_error_in_float32_near_and_far():
    """At most 2e-6 of the largest value at every query, and to float32 rounding."""
    generator = np.random.default_rng(10)
    key = torch.from_numpy(np.sort(generator.uniform(0, 5, 20_000)).astype(np.float32))
    value = torch.sin(3 * key) + 0.1 * torch.randn(20_000)
    query = torch.from_numpy(
        np.sort(np.r_[generator.uniform(-5, 10, 50), 5 + 10 ** generator.uniform(-3, 4, 30)])
    )
    for w in (3.0, 100.0, 1e3, 1e4):
        expected = exact(query.float(), key, value, w, tangents=False).out[:, 0]
        error = np.abs(linear(query.float(), key, value, w).numpy() - expected).max() / float(
            value.abs().max()
        )
        assert error <= 2.0**-23, f"w = {w}: {error}"


@every_other("w, dtype", (300.0, 1e3, 3e3, 1e4, 1e5), (torch.float64, torch.float32))
def test_queries_far_apart_among_many_keys(w, dtype):
    """Each has its own window."""
    generator = np.random.default_rng(12)
    key = torch.from_numpy(np.sort(generator.uniform(-2, 3, 30_000))).to(dtype)
    query = torch.from_numpy(np.sort(generator.uniform(-2.01, 3.01, 40))).to(dtype)
    assert_forward(query, key, torch.sin(3 * key) + 0.1 * torch.randn(30_000, dtype=dtype), w)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, -135), (torch.float64, -1060)])
def test_key_weights_below_the_normal_numbers(dtype, exponent):
    """The factor that brings them to 1 is beyond the dtype; few keys a window or many."""
    key = torch.linspace(0, 5, 1500, dtype=dtype)
    weight = torch.full((1500,), 2.0**exponent, dtype=dtype)
    for w in (3.0, 1000.0):
        torch.testing.assert_close(
            linear(key, key, torch.sin(key), w, key_weight=weight), linear(key, key, torch.sin(key), w)
        )
