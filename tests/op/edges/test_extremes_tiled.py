"""Extreme data with several features or channels: each row as accurate as its own data allows.

Errors are held against the sums of absolute terms of results in longer precision; one outlier, one huge w or one far
query sets no scale for the others.
"""

import math

import pytest
import torch
from oracle import ROUNDING
from precise import NAMES, precise

import nwfast

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
FORMS = pytest.mark.parametrize(("features", "channels"), [(1, 2), (2, 1), (3, 9), (17, 2)])
M, N = 8, 40


def random_data(features, channels, dtype):
    generator = torch.Generator().manual_seed(10 * features + channels)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        rand(M, features),
        rand(N, features),
        rand(N, channels) - 0.5,
        rand(M, channels) - 0.5,
        rand(M) - 0.5,
    )


def assert_precise(query, key, value, w, grad, grad_lse=None, key_weight=None, roundings=64):
    """Results and all gradients, relative to the sums of absolute terms; overflowing ones overflow."""
    dtype = query.dtype
    w = torch.as_tensor(w, dtype=dtype)
    exact = precise(query, key, value, w, grad, grad_lse, key_weight)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value, w)]
    if key_weight is not None:
        leaves.append(key_weight.clone().requires_grad_())
    out, lse = nwfast.nadaraya_watson(
        *leaves[:4],
        key_weight=None if key_weight is None else leaves[4],
        backend="native",
        method="dense",
        return_lse=True,
    )
    outputs, cotangents = ([out], [grad]) if grad_lse is None else ([out, lse], [grad, grad_lse])
    found = dict(zip(NAMES, torch.autograd.grad(outputs, leaves, cotangents), strict=False))
    checks = [("out", out, exact.out, exact.out_scale), ("lse", lse, exact.lse, 1 + exact.lse.abs())]
    for name, gradient in found.items():
        right, scale = exact.gradients[name], exact.scales[name]
        if right.shape != gradient.shape:
            right, scale = right.sum(), scale.sum()
        checks.append((name, gradient, right, scale))
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    for name, actual, right, scale in checks:
        actual, right = actual.detach().double(), right.clamp(-most, most)
        assert not actual.isnan().any(), name
        error = float((actual.clamp(-most, most) - right).abs().max())
        allowed = (
            roundings * ROUNDING[dtype] * max(float(scale.clamp(max=most).max()), least / ROUNDING[dtype])
        )
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@DTYPES
@FORMS
@pytest.mark.parametrize("place", [1e15, -1e20, 1e30, "largest"])
def test_one_outlying_key(native, features, channels, place, dtype):
    query, key, value, grad, grad_lse = random_data(features, channels, dtype)
    key[7] = torch.finfo(dtype).max / 4 if place == "largest" else place
    key[8, 0] = key[7, 0]
    for w in (2.0, 1e-3, torch.linspace(1.0, 2.0, features)):
        assert_precise(query, key, value, w, grad, grad_lse)


@DTYPES
@FORMS
@pytest.mark.parametrize("far", [40.0, 500.0, 3e4, 1e8, 1e15, 1e30])
def test_far_queries_beside_near_ones(native, features, channels, far, dtype):
    query, key, value, grad, grad_lse = random_data(features, channels, dtype)
    key = (key * 64).round() / 64
    query[0] += far
    query[1, 0] -= far
    query[2, -1] += far
    assert_precise(query, key, value, 1.0, grad, grad_lse, roundings=256)
    assert_precise(query, key, value, torch.linspace(0.5, 1.0, features), grad, roundings=256)


@DTYPES
@FORMS
@pytest.mark.parametrize("width", [100.0, 1000.0, 1e6])
def test_queries_in_a_gap(native, features, channels, width, dtype):
    """Within the box of all keys, and yet far from each."""
    query, key, value, grad, grad_lse = random_data(features, channels, dtype)
    key[: N // 2] += width
    query[: M // 2] += width / 2
    assert_precise(query, key, value, 3.0, grad, grad_lse, roundings=256)


@DTYPES
@FORMS
def test_huge_w(native, features, channels, dtype):
    query, key, value, grad, grad_lse = random_data(features, channels, dtype)
    assert_precise(query * 1e-20, key * 1e-20, value, 2e20, grad, grad_lse)
    assert_precise(query, key, value, [6e29] + [2.0] * (features - 1), grad, grad_lse)
    w = torch.finfo(dtype).max / 2
    out, lse = nwfast.nadaraya_watson(
        key[:M], key, value, w, backend="native", method="dense", return_lse=True
    )
    torch.testing.assert_close(out, value[:M])
    assert not lse.any()
    keys = [[0.0] * features, [1e-17] + [0.0] * (features - 1), [1.0] * features]
    out = nwfast.nadaraya_watson(
        torch.zeros(1, features, dtype=dtype),
        torch.tensor(keys, dtype=dtype),
        value[:3],
        1e20,
        backend="native",
        method="dense",
    )
    torch.testing.assert_close(out[0], value[0])


@DTYPES
@FORMS
def test_tiny_data_and_tiny_w(native, features, channels, dtype):
    query, key, value, grad, grad_lse = random_data(features, channels, dtype)
    least = torch.finfo(dtype).tiny
    for size in (least * 0.01, least * 1e-5, 1e-25):
        for w in (1.0, 1e-3 / least):
            assert_precise(query * size, key * size, value, w, grad, grad_lse)
    for w in (1e-5, 1e-12, 1e-30):
        assert_precise(query, key, value, w, grad, grad_lse)


@DTYPES
@pytest.mark.parametrize("apart", [1e10, 1e20, 1e30, 1e200])
def test_features_of_all_sizes_share_a_scale(native, apart, dtype):
    """The gradient of each feature's w is by squares of its own coordinates, which no other feature's size takes."""
    if apart > torch.finfo(dtype).max:
        return
    query, key = torch.tensor([[1.0, apart]], dtype=dtype), torch.zeros(1, 2, dtype=dtype)
    w = torch.full((2,), 1e-2 / apart, dtype=dtype, requires_grad=True)
    _, lse = nwfast.nadaraya_watson(
        query, key, torch.ones(1, dtype=dtype), w, backend="native", method="dense", return_lse=True
    )
    (found,) = torch.autograd.grad(lse.sum(), w)
    right = -(w.detach() * query[0] * query[0])
    torch.testing.assert_close(found, right, rtol=8 * torch.finfo(dtype).eps, atol=0)


@FORMS
def test_w_times_squares_of_the_least_coordinates(native, features, channels):
    """A gradient that is a number, though squares of coordinates are none."""
    if features == channels == 1:
        return
    largest = torch.finfo(torch.float64).max
    for place in (2e-314, 3e-310, 1e-300, 1e-160):
        query, key = (torch.full((1, features), x, dtype=torch.float64) for x in (place, 0.0))
        value, w = torch.ones(1, channels, dtype=torch.float64), torch.tensor(largest, dtype=torch.float64)
        w = min(w, w * 0 + 1e3 / place).requires_grad_()
        _, lse = nwfast.nadaraya_watson(
            query, key, value, w, backend="native", method="dense", return_lse=True
        )
        (found,) = torch.autograd.grad(lse.sum(), w)
        right = -(w.item() * place) * place * features  # both factors are numbers
        assert abs(found.item() - right) <= 1e-13 * abs(right) + 5e-324 * features


@DTYPES
@FORMS
def test_values_of_all_sizes(native, features, channels, dtype):
    query, key, value, grad, grad_lse = random_data(features, channels, dtype)
    assert_precise(query * 1e12, key * 1e12, value * 1e30, 0.0, grad * 1e-10, grad_lse, roundings=256)
    sizes = 10.0 ** torch.linspace(-20, 20, channels, dtype=dtype)
    assert_precise(query, key, value * sizes, 2.0, grad)
    assert_precise(query, key, value * sizes, 2.0, grad / sizes)
    grad[0] *= 1e20
    assert_precise(query, key, value, 2.0, grad, grad_lse)
    # Each row by itself, not by the largest.
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out = nwfast.nadaraya_watson(*inputs, 2.0, backend="native", method="dense")
    exact = precise(query[1:], key, value, 2.0, grad[1:])
    (found,) = torch.autograd.grad(out, inputs[:1], grad)
    error = (found[1:] - exact.gradients["query"]).abs().max()
    assert error <= 64 * ROUNDING[dtype] * exact.scales["query"].max()


@DTYPES
@pytest.mark.parametrize("channels", [2, 3, 9, 20])
@pytest.mark.parametrize(
    ("method", "features"), [("dense", 1), ("dense", 2), ("dense", 3), ("dense", 20), ("fgt", 2), ("fgt", 3)]
)
def test_the_gradient_of_lse_alone_is_left_of_rows_of_one_key(native, method, features, channels, dtype):
    """Those of out, 20 digits larger, cancel to the bit, with fused multiply-adds and without."""
    m, n, side = 40, 300, math.ceil(300 ** (1 / features))
    key = torch.stack([torch.arange(n) // side**f % side * 64 for f in range(features)], -1) + torch.rand(
        n, features
    )
    key, nearest = key.to(dtype), torch.randint(n, (m,))
    query = key[nearest] + (torch.rand(m, features) - 0.5).to(dtype)
    value, grad = (
        (1e30 * (torch.rand(n, channels) - 0.5)).to(dtype),
        1e-10 * torch.randn(m, channels).to(dtype),
    )
    key, query, w = 1e12 * key, 1e12 * query, torch.tensor(1e-12, dtype=dtype, requires_grad=True)
    out, lse = nwfast.nadaraya_watson(
        query.requires_grad_(), key, value, w, backend="native", method=method, return_lse=True
    )
    grad_lse = torch.randn(m, dtype=dtype)
    grad_query, grad_w = torch.autograd.grad([out, lse], [query, w], [grad, grad_lse])
    apart = 1e-12 * (query - key[nearest]).detach().double()
    terms = grad_lse[:, None] * apart.square()
    budget = 16 * ROUNDING[dtype] * 64 * n  # of a difference between coordinates
    assert (1e12 * grad_query + grad_lse[:, None] * apart).abs().max() <= budget * grad_lse.abs().max()
    assert abs(1e-12 * grad_w + terms.sum()) <= budget * terms.abs().sum()


@pytest.mark.parametrize("features", [2, 20])
@pytest.mark.parametrize("place", [2.0**70, 2.0**100, 2.0**127])
def test_query_in_the_middle_between_a_huge_key_and_others(native, features, place):
    """The huge key is nearer than those beyond 0, and further away than those on its side of it."""
    for dtype in (torch.float32, torch.float64):
        query = torch.zeros(1, features, dtype=dtype)
        query[0, 0] = place / 2
        key = torch.zeros(3, features, dtype=dtype)
        key[:, 0] = torch.tensor([-0.25, -0.5, place])
        value = torch.tensor([1.0, 2.0, 4.0], dtype=dtype)
        out = nwfast.nadaraya_watson(query, key, value, 1.0, backend="native", method="dense")
        assert out == 4
        key[:, 0] = torch.tensor([0.25, 0.5, place])
        out = nwfast.nadaraya_watson(query, key, value, 1.0, backend="native", method="dense")
        assert out == 2


@DTYPES
@FORMS
def test_key_weights_of_all_sizes(native, features, channels, dtype):
    query, key, value, grad, grad_lse = random_data(features, channels, dtype)
    weight = torch.linspace(0.5, 2.0, N, dtype=dtype)
    weight[::3] *= 1e-30
    weight[1] = torch.finfo(dtype).tiny  # a score has its logarithm to base 2 beside it
    roundings = 64 - math.log2(weight[1])
    assert_precise(query, key, value, 3.0, grad, grad_lse, weight, roundings=roundings)


@DTYPES
@FORMS
def test_nearest_of_nearly_equal_keys(native, features, channels, dtype):
    """Two keys whose distances agree to all digits of the dtype: the nearer has all weight where w is large."""
    step = ROUNDING[dtype]
    query = torch.zeros(2, features, dtype=dtype)
    key = torch.ones(3, features, dtype=dtype)
    key[1] *= -1
    key[1, 0] *= 1 - step  # nearer by an ulp in one feature
    key[2] = 2
    value = torch.tensor([1.0, 2.0, 4.0], dtype=dtype)[:, None].expand(-1, channels)
    query[1] = key[2]
    w = 1e12 if dtype == torch.float64 else 1e8
    out, lse = nwfast.nadaraya_watson(query, key, value, w, backend="native", method="dense", return_lse=True)
    right = torch.tensor([2.0, 4.0], dtype=dtype)[:, None].expand(-1, channels)
    torch.testing.assert_close(out, right, rtol=0, atol=0)
    assert lse[0].isfinite() and lse[1] == 0


@DTYPES
@FORMS
def test_keys_and_queries_at_infinity(native, features, channels, dtype):
    """A key there has no effect; a query there is a row without keys, and has none either."""
    query, key, value, grad, grad_lse = random_data(features, channels, dtype)

    def run(query, key, value, grad, grad_lse):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        leaves.append(torch.tensor(2.0, dtype=dtype, requires_grad=True))
        out, lse = nwfast.nadaraya_watson(*leaves, backend="native", method="dense", return_lse=True)
        return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, [grad, grad_lse])]

    for held in (math.inf, -math.inf):
        away = key.clone()
        away[3, -1] = held
        kept = torch.arange(N) != 3
        found = run(query, away, value, grad, grad_lse)
        right = run(query, key[kept], value[kept], grad, grad_lse)
        assert not found[3][3].any() and not found[4][3].any()
        found[3], found[4] = found[3][kept], found[4][kept]
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=64 * ROUNDING[dtype] * float(b.abs().max()))
        lone = torch.full((1, features), 1.0, dtype=dtype)
        lone[0, 0] = held
        some = torch.ones(features, dtype=dtype)
        some[0] = 0
        for w in (torch.zeros(features, dtype=dtype), some):
            out, lse = nwfast.nadaraya_watson(
                lone, key, value, w, backend="native", method="dense", return_lse=True
            )
            assert out.isnan().all() and lse == -math.inf  # a product with a w of 0 is none
        away = query.clone()
        away[2, 0] = held
        found = run(away, key, value, grad, grad_lse)
        others = torch.arange(M) != 2
        right = run(query[others], key, value, grad[others], grad_lse[others])
        assert found[0][2].isnan().all() and found[1][2] == -math.inf and not found[2][2].any()
        found[:3] = [result[others] for result in found[:3]]
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=64 * ROUNDING[dtype] * float(b.abs().max()))
