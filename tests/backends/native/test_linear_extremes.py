"""The fast Gauss transform where numbers are extreme: bounds that round onto what they start from, distances that tie
when they are rounded, outliers, keys that are left out, queries that are no numbers.
"""

import math

import numpy as np
import pytest
import torch
from linear_cases import exact

import nwfast

pytestmark = pytest.mark.usefixtures("native")


def linear(*args, **options):
    return nwfast.nadaraya_watson(*args, method="fgt", backend="native", **options)


def leaves_of(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize(
    ("dtype", "place", "distance", "w"),
    [
        (torch.float64, 1.7e18, 1e12, 1e-6),
        (torch.float64, -1.7e18, 1e9, 1e-3),
        (torch.float32, 1.7e9, 3.3e8, 1e-3),
        (torch.float32, 3e4, 2e4, 1.0),
    ],
)
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("stacks", [1, 2])
def test_coincident_keys_count_alike(dtype, place, distance, w, side, stacks):
    """A depth behind the edge that is below half an ulp of it: with two stacks, the nearer one alone counts."""
    n = 3000
    key = torch.full((n,), place, dtype=dtype)
    if stacks == 2:
        key[::2] -= side * distance
    counts = key == place
    query = key[counts][:300] + side * distance * torch.linspace(1, 1.01, 300, dtype=dtype)
    value = torch.rand(n, dtype=dtype).requires_grad_()
    out = linear(query, key, value, w)
    mean = value.detach()[counts].double().mean()
    torch.testing.assert_close(
        out.double(), mean.expand(300), rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0
    )
    out.sum().backward()
    share = 300 / counts.sum()
    torch.testing.assert_close(
        value.grad[counts], share.to(dtype).expand(int(counts.sum())), rtol=1e-5, atol=0
    )
    assert not value.grad[~counts].any()
    index = nwfast.KeyIndex(key, value.detach())
    torch.testing.assert_close(index(query, w), out.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "w"), [(torch.float64, 1e15), (torch.float64, 1e30), (torch.float32, 1e15)]
)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_key_side_where_windows_are_below_an_ulp(dtype, w, exclude_self):
    x = torch.arange(1000, dtype=dtype)
    query, key, value = leaves_of(x, x, torch.cos(x))
    out = linear(query, key, value, w, exclude_self=exclude_self)
    out.sum().backward()
    wanted = torch.ones(1000, dtype=dtype)
    if exclude_self:  # halves from both neighbours, all from a key at an end
        wanted[[0, -1]], wanted[[1, -2]] = 0.5, 1.5
        both = (value.detach()[:-2] + value.detach()[2:]) / 2
        torch.testing.assert_close(out.detach()[1:-1], both)
    else:
        assert torch.equal(out, value)
        assert not query.grad.any() and not key.grad.any()
    torch.testing.assert_close(value.grad, wanted)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float64, 5e-322),
        (torch.float64, 1e-310),
        (torch.float64, 1e-200),
        (torch.float32, 1e-44),
        (torch.float32, 1e-38),
    ],
)
@pytest.mark.parametrize("w", [0.0, 1.0, 1e30])
def test_coordinates_next_to_zero(dtype, scale, w):
    """All scores are 0, and nothing hangs."""
    generator = np.random.default_rng(1)
    query = torch.from_numpy(generator.uniform(-2, 2, 257) * scale).to(dtype)
    key = torch.from_numpy(generator.uniform(-2, 2, 16) * scale).to(dtype)
    query, key, value, w = leaves_of(query, key, torch.rand(16, dtype=dtype), torch.tensor(w, dtype=dtype))
    out, lse = linear(query, key, value, w, return_lse=True)
    if scale < 1e-300:  # the dense method's to answer, backwards as well
        torch.autograd.grad(out.sum(), (query, key, value, w))
        return
    torch.testing.assert_close(out, value.mean().expand(257))
    torch.testing.assert_close(lse, torch.full((257,), math.log(16), dtype=dtype))
    for grad in torch.autograd.grad(out.sum() + lse.sum(), (query, key, value, w)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("outliers", [[1e16], [-1e20, 1e20], [3e38], [-3e38, 1e15, 3e38]])
@pytest.mark.parametrize("w", [2.0, 50.0, 1e4])
def test_outlying_keys_and_queries_change_no_other_row(dtype, outliers, w):
    generator = np.random.default_rng(2)
    key = torch.from_numpy(np.r_[outliers, generator.uniform(0, 5, 1500)]).to(dtype)
    query = torch.from_numpy(np.r_[outliers, generator.uniform(-1, 6, 700)]).to(dtype)
    value = torch.sin(key.clamp(0, 5))
    count = len(outliers)
    results = []
    for first in (0, count):
        tensors = leaves_of(query[first:], key[first:], value[first:], torch.tensor(w, dtype=dtype))
        out, lse = linear(*tensors, return_lse=True)
        rows = out[count - first :], lse[count - first :]
        grads = torch.autograd.grad((rows[0] * torch.cos(query[count:])).sum() + rows[1].sum(), tensors)
        results.append((*rows, *(grad[count - first :] for grad in grads[:3]), grads[3]))
        if first == 0:
            assert torch.equal(out[:count], value[:count])
            assert not any(grad[:count].any() for grad in grads[:3])
    for actual, wanted in zip(*results, strict=True):
        bound = (1e-12 if dtype == torch.float64 else 4e-6) * float(wanted.detach().abs().max())
        torch.testing.assert_close(actual, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("keys", [(-1e16, 1e16), (-1e16, 1e16, 2e16), (-1e30, 1e30)])
@pytest.mark.parametrize("many", [1, 700])
def test_the_nearest_key_of_a_rounded_tie(keys, many):
    """Distances round onto each other, and the keys are further apart than any weight reaches."""
    key = torch.tensor(keys, dtype=torch.float64).repeat_interleave(many)
    value = torch.arange(float(len(key)), dtype=torch.float64).requires_grad_()
    query = torch.tensor([-0.9, -1e-3, 1e-3, 0.3, 0.9], dtype=torch.float64)
    out, lse = linear(query, key, value, 1.0, return_lse=True)
    below, above = value.detach()[:many].mean(), value.detach()[many : 2 * many].mean()
    torch.testing.assert_close(out.detach(), torch.where(query < 0, below, above), rtol=1e-14, atol=0)
    torch.testing.assert_close(lse.detach(), -(key[:1] ** 2 / 2).expand(5), rtol=1e-14, atol=0)
    out.sum().backward()
    shares = torch.tensor([2.0, 3.0, 0.0][: len(keys)], dtype=torch.float64).repeat_interleave(many) / many
    torch.testing.assert_close(value.grad, shares, rtol=1e-13, atol=0)


def weight_gradient(query, key, value, weight, w, grad):
    """Gradients of key weights of 0 in extended precision, (N,); kept keys have the weight 1."""
    expected = exact(query, key, value, w, weight)
    q, k, v, g = (tensor.double().numpy().astype(np.longdouble) for tensor in (query, key, value, grad))
    score = -(((q[:, None] - k) * np.longdouble(w)) ** 2) / 2 - expected.lse[:, None]
    return (np.exp(score) * g[:, None] * (v - expected.out)).sum(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("gap", [3.0, 13.0, 25.0, 60.0, 120.0])
@pytest.mark.parametrize("kept", [2, 900])
def test_masked_keys_nearer_than_all_others(dtype, exclude_self, gap, kept):
    """The gradient of such a weight is huge, or the largest finite number; others do not notice."""
    generator = np.random.default_rng(3)
    key = torch.from_numpy(np.r_[generator.uniform(0, 1, 20), gap + generator.uniform(1, 2, kept)]).to(dtype)
    query = key + (0 if exclude_self else 1e-3)
    weight = (torch.arange(len(key)) >= 20).to(dtype)
    value = torch.sin(3 * key)
    tensors = leaves_of(query, key, value, torch.tensor(1.0, dtype=dtype), weight)
    out, lse = linear(*tensors[:4], key_weight=tensors[4], exclude_self=exclude_self, return_lse=True)
    grad = torch.randn(len(key), dtype=dtype)
    grads = torch.autograd.grad((out * grad).sum(), tensors)
    assert all(part.isfinite().all() for part in (out, lse, *grads))
    assert not grads[1][:20].any() and not grads[2][:20].any()
    if exclude_self:
        return
    largest = float(torch.finfo(dtype).max)
    wanted = np.clip(weight_gradient(query, key, value, weight, 1.0, grad), -largest, largest)[:20]
    # Exponents are rounded relative to their size, outputs to that of the values.
    bound = (1e-3 if dtype == torch.float32 else 1e-11) * np.abs(wanted).max()
    if gap == 120.0:
        assert (np.abs(grads[4][:20].numpy()) == largest).all()
        assert (np.sign(grads[4][:20].numpy()) == np.sign(wanted)).all()
    else:
        assert np.abs(grads[4][:20].numpy() - wanted).max() <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_of_a_masked_weight_away_from_the_kept_keys(dtype):
    key = torch.cat([torch.linspace(0, 1, 300), torch.tensor([-2.0, 5.0])]).to(dtype)
    query = torch.linspace(0, 1, 400, dtype=dtype)
    weight = torch.ones(302, dtype=dtype)
    weight[300:] = 0
    tensors = leaves_of(torch.cos(key), weight)
    linear(query, key, tensors[0], 1.0, key_weight=tensors[1]).sum().backward()
    wanted = weight_gradient(query, key, torch.cos(key), weight, 1.0, torch.ones(400, dtype=dtype))
    np.testing.assert_allclose(
        tensors[1].grad[300:].numpy(),
        wanted[300:].astype(float),
        rtol=1e-5 if dtype == torch.float32 else 1e-11,
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("w", [5.0, 3e3])
def test_queries_that_are_no_numbers(bad, channels, w):
    """NaN rows are NaN, infinite ones are as rows without a key; without a gradient of theirs nothing shows them."""
    generator = np.random.default_rng(4)
    key = torch.from_numpy(generator.uniform(0, 5, 600))
    query = torch.from_numpy(generator.uniform(0, 5, 400))
    odd = torch.zeros(400, dtype=torch.bool)
    odd[[0, 7, 250]] = True
    value = torch.randn(600, *(() if channels is None else (channels,)), dtype=torch.float64)
    weight = torch.rand(600, dtype=torch.float64)
    grad = torch.randn(400, *value.shape[1:], dtype=torch.float64)
    grad[odd] = 0
    grad_lse = torch.randn(400, dtype=torch.float64).masked_fill(odd, 0)
    results = []
    for replacement in (bad, 1.0):
        tensors = leaves_of(
            query.masked_fill(odd, replacement), key, value, torch.tensor(w, dtype=torch.float64), weight
        )
        out, lse = linear(*tensors[:4], key_weight=tensors[4], return_lse=True)
        results.append((out, lse, torch.autograd.grad((out, lse), tensors, (grad, grad_lse))))
    (out, lse, grads), (clean_out, clean_lse, clean_grads) = results
    # Other rows may share vectors with rows than they did, which order their sums.
    assert out[odd].isnan().all()
    torch.testing.assert_close(out[~odd], clean_out[~odd], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(lse[~odd], clean_lse[~odd], rtol=1e-13, atol=1e-14)
    assert lse[odd].isnan().all() if math.isnan(bad) else (lse[odd] == -math.inf).all()
    for actual, wanted in zip(grads, clean_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13 * float(wanted.abs().max()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_prepared_keys_and_queries_that_are_no_numbers(bad):
    key = torch.rand(500)
    index = nwfast.KeyIndex(key, torch.cos(key), method="fgt", backend="native")
    out, lse = index(torch.tensor([0.5, bad, 0.7]), 20.0, return_lse=True)
    assert out.isnan().tolist() == [False, True, False]
    assert lse[1].isnan() if math.isnan(bad) else lse[1] == -math.inf


@pytest.mark.parametrize(("place", "spread"), [(1e6, 1e-7), (1.0, 1e-12), (0.0, 1e-9)])
def test_tangents_of_data_that_fill_little_of_a_bandwidth(place, spread):
    """They are sums of tiny differences, and relative to those."""
    generator = np.random.default_rng(5)
    query, key = (torch.from_numpy(place + spread * generator.uniform(0, 1, n)) for n in (300, 500))
    value = torch.from_numpy(generator.normal(size=500))
    _, _, _, tangent_w, tangent_q = torch.ops.nwfast.native_fgt_forward(
        query, key, value, torch.tensor(1.0, dtype=torch.float64), None, False, True, True
    )
    expected = exact(query, key, value, 1.0)
    for actual, wanted, size in (
        (tangent_w, expected.tangent_w, spread**2),
        (tangent_q, expected.tangent_q, spread),
    ):
        assert np.abs(actual.numpy() - wanted[:, 0]).max() <= 1e-12 * size


def test_masked_values_set_no_scale():
    """A value of 1e30 that is left out, beside kept ones around 1000."""
    key = torch.linspace(0, 5, 1000)
    value = 1000 + 1e-2 * torch.sin(3 * key)
    weight = torch.ones(1000)
    weight[::10] = 0
    kept = weight > 0
    spoilt = torch.where(kept, value, 1e30)
    tensors = leaves_of(key, spoilt, weight)
    out = linear(key, tensors[0], tensors[1], 20.0, key_weight=tensors[2])
    torch.testing.assert_close(out, linear(key, key[kept], value[kept], 20.0), rtol=1e-7, atol=0)
    by_key, by_value, _ = torch.autograd.grad(out.sum(), tensors)
    clean = leaves_of(key[kept], value[kept])
    wanted = torch.autograd.grad(linear(key, *clean, 20.0).sum(), clean)
    torch.testing.assert_close(by_key[kept], wanted[0], rtol=1e-4, atol=1e-4 * float(wanted[0].abs().max()))
    torch.testing.assert_close(by_value[kept], wanted[1], rtol=1e-5, atol=0)
    assert not by_key[~kept].any() and not by_value[~kept].any()


@pytest.mark.parametrize("channels", [None, 3])
def test_the_own_key_has_a_value_of_any_size(channels):
    """It is taken out of sums in which it is most of what counts."""
    key = torch.rand(600, dtype=torch.float64)
    value = torch.randn(600, *(() if channels is None else (channels,)), dtype=torch.float64)
    w = torch.tensor(3.0, dtype=torch.float64)
    for query, weight in ((key, None), (key + 1e-3, torch.rand(600, dtype=torch.float64))):
        right = linear(query, key, value, w, key_weight=weight, exclude_self=True)[77]
        large = value.clone()
        large[77] = 1e12
        found = linear(query, key, large, w, key_weight=weight, exclude_self=True)[77]
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)
