"""The linear method of the Numba backend: against extended precision, the reference and the dense kernels.

One file, since all its tests are a few lines over the same two comparisons, `assert_forward` and `assert_gradients`:
at every bandwidth, kind of data and form of the arguments. The pieces of its kernels are in test_far_rows.py.
"""

import math

import numpy as np
import pytest
import torch
from conftest import every_other
from exact import exp
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import BANDWIDTHS, KINDS, exact, keys_of, problems, queries_of, some_rows

from nwfast import backends
from nwfast.backends import reference

pytest.importorskip("numba")
linear = backends.load("numba_fgt")
dense = backends.load("numba")

BOUND = {torch.float64: 1e-12, torch.float32: 2.0**-22}
NAMES = ("query", "key", "value", "w", "key_weight")
ALL = sum(
    (
        backends.NEEDS_QUERY,
        backends.NEEDS_KEY,
        backends.NEEDS_VALUE,
        backends.NEEDS_W,
        backends.NEEDS_KEY_WEIGHT,
    )
)


def canonical(query, key, value, w, key_weight=None):
    value = value[:, None] if value.ndim == 1 else value
    w = torch.tensor([float(w)], dtype=query.dtype)
    return query[:, None], key[:, None], value, w, key_weight


def backward(module, grad_out, grad_lse, inputs, results, exclude_self=False, needs=ALL):
    if inputs[4] is None:
        needs &= ~backends.NEEDS_KEY_WEIGHT
    out, _, *computed = results
    return module.backward(grad_out, grad_lse, *inputs, out, *computed, exclude_self, needs)


def assert_forward(query, key, value, w, key_weight=None, exclude_self=False) -> None:
    """out relative to the largest value; lse to itself or 1; tangents to what one pair can add."""
    inputs = canonical(query, key, value, w, key_weight)
    out, lse, state, tangent_w, tangent_q = linear.forward(*inputs, exclude_self, True, True)
    w, bound = float(inputs[3]), BOUND[query.dtype]
    rows = some_rows(len(query))
    expected = exact(query, key, value, w, key_weight, exclude_self, rows)
    spread = float(value.abs().max()) or 1.0

    def error(actual, wanted, scale):
        return float(np.max(np.abs(actual[rows].numpy().astype(np.longdouble) - wanted) / scale))

    at_least_1 = np.maximum(1, np.abs(expected.lse))
    assert error(out, expected.out, spread) <= bound
    assert error(lse, expected.lse, at_least_1) <= bound
    total = torch.log(state[:, 1]) - math.log(2) * state[:, 0]
    assert error(total, expected.lse, at_least_1) <= bound
    if w > 0:
        by_w, by_q = expected.tangent_w, expected.tangent_q
        assert error(tangent_w, by_w, spread / w + np.abs(by_w).max()) <= 10 * bound
        # Far from the keys the rounding of out counts as many times as they are bandwidths away.
        rounding = 1e-15 * float(np.sqrt(2 * np.abs(expected.lse[np.isfinite(expected.lse)])).max(initial=0))
        assert error(tangent_q, by_q, spread * w + np.abs(by_q).max()) <= 10 * bound + rounding


def exact_gradients(inputs, grad_out, grad_lse, exclude_self):
    """All gradients of one batch element in longdouble, from scores relative to the nearest key."""
    q, k, v, w, g = (x.double().numpy().astype(np.longdouble) for x in (*inputs[:4], grad_out))
    a = np.ones(len(k)) if inputs[4] is None else inputs[4].numpy().astype(np.longdouble)
    d = q - k.T
    left_out = np.eye(len(k), dtype=bool) if exclude_self else np.zeros(d.shape, dtype=bool)
    nearest = k[np.where(left_out | (a == 0), np.inf, np.abs(d)).argmin(1)]
    term = exp(np.where(left_out, -np.inf, -(nearest - k.T) * (2 * q - k.T - nearest) * w**2 / 2))
    term /= (term @ a)[:, None]  # p_j / a_j
    out = (term * a) @ v
    pull = term * (
        g @ v.T - (g * out).sum(1, keepdims=True) + (0 if grad_lse is None else grad_lse.numpy()[:, None])
    )
    by_d = pull * a * d
    return (
        -(w**2) * by_d.sum(1),
        w**2 * by_d.sum(0),
        a[:, None] * (term.T @ g),
        -w * (by_d * d).sum(),
        pull.sum(0),
    )


def assert_gradients(inputs, exclude_self=False, with_lse=True, tangents=False, tolerance=1e-11):
    """All gradients within the tolerance of their largest entry, or of what one pair can add."""
    results = linear.forward(*inputs, exclude_self, tangents, tangents)
    grad_out = torch.randn_like(results[0])
    grad_lse = torch.randn_like(results[1]) if with_lse else None
    actual = backward(linear, grad_out, grad_lse, inputs, results, exclude_self)
    expected = exact_gradients(inputs, grad_out, grad_lse, exclude_self)
    w, spread = float(inputs[3].abs().max()), float(inputs[2].abs().max())
    one_pair = spread * w, spread * w, 1.0, spread * len(inputs[0]) ** 0.5 / max(w, 1e-300), spread
    for name, one, wanted, pair in zip(NAMES, actual, expected, one_pair, strict=True):
        if name == "key_weight" and inputs[4] is None:
            continue
        wanted = np.asarray(wanted)
        error = np.abs(one.numpy().reshape(wanted.shape) - wanted).max()
        scale = np.abs(wanted).max() + pair
        assert error <= tolerance * scale, f"{name}: {error / scale:.2e}"


def case(kind, n, m, seed, dtype=torch.float64):
    generator = np.random.default_rng(seed)
    keys = keys_of(kind, n, generator)
    queries = queries_of(keys, m, generator)
    key, query = torch.from_numpy(keys).to(dtype), torch.from_numpy(queries).to(dtype)
    return query, key, torch.sin(key - key[0]) + 0.1 * torch.from_numpy(generator.normal(size=n)).to(dtype)


# Forward.


@every_other("kind, w, dtype", KINDS, BANDWIDTHS, (torch.float64, torch.float32))
def test_forward_at_every_bandwidth(kind, w, dtype):
    assert_forward(*case(kind, 1500, 1000, 1, dtype), w)


@settings(max_examples=50)
@given(problems(), st.integers(0, 2**32 - 1), st.sampled_from((0, 1, 30)), st.booleans())
def test_few_points(problem, seed, decades, exclude_self):
    query, key, value, w = problem
    if exclude_self and len(key) > 1:
        query = key if seed % 2 else query[torch.arange(len(key)) % len(query)]
    else:
        exclude_self = False
    weight = None
    if decades:
        weight = torch.from_numpy(10.0 ** np.random.default_rng(seed).uniform(-decades, 0, len(key)))
        weight[2::5] = 0
    assert_forward(query, key, value, w, weight, exclude_self)


@pytest.mark.parametrize("w", [0.0, 3.0, 200.0, 1e4])
def test_weights_of_thirty_decades(w):
    query, key, value = case("uniform", 2000, 1000, 2)
    assert_forward(query, key, value, w, 10.0 ** (-30 * torch.rand(2000, dtype=torch.float64)))
    assert_forward(query, key, value, w, 10.0 ** (-6 * key))


@every_other("kind, w", KINDS, (3.0, 100.0, 1e4))
def test_leave_one_out(kind, w):
    _, key, value = case(kind, 1200, 10, 3)
    assert_forward(key, key, value, w, exclude_self=True)
    assert_forward(key + 0.3, key, value, w, exclude_self=True)
    assert_forward(
        key, key, value, w, 10.0 ** (-20 * torch.rand(1200, dtype=torch.float64)), exclude_self=True
    )


def test_crowds_seen_from_afar():
    """Queries at up to 1e9 bandwidths, for which all keys count: boxes of every level."""
    key = torch.from_numpy(np.random.default_rng(4).normal(size=2000))
    far = 10.0 ** torch.linspace(0.3, 9, 150, dtype=torch.float64)
    query = torch.cat([-far, far])
    for scale in (1.0, 1e-2, 1e-5, 1e-9):
        assert_forward(query, key * scale, torch.sin(key), 1.0)
        assert_forward(query, key * scale, torch.sin(key), 1.0, torch.rand(2000, dtype=torch.float64))
    edge = torch.cat(
        [torch.zeros(1000, dtype=torch.float64), -key.abs()]
    )  # duplicates stay crowded at every level
    assert_forward(far, edge, torch.cos(torch.arange(3000.0, dtype=torch.float64)), 1.0)
    inputs = canonical(
        edge[:1500] + 5, edge[:1500], torch.sin(edge[:1500]), 1.0
    )  # the own key may be the nearest
    assert_forward(inputs[0][:, 0], inputs[1][:, 0], inputs[2], 1.0, exclude_self=True)


def test_a_distant_crowd_does_not_drown_the_nearest_key():
    generator = np.random.default_rng(5)
    key = torch.from_numpy(np.r_[generator.uniform(5.0, 6.5, 50_000), 0.0, -1.9])
    query = torch.linspace(-2.5, 1.5, 30, dtype=torch.float64)
    assert_forward(query, key, torch.cos(key), 1.0)
    assert_forward(query.float(), key.float(), torch.cos(key).float(), 1.0)


def test_error_in_float32_near_and_far():
    generator = np.random.default_rng(10)
    key = torch.from_numpy(np.sort(generator.uniform(0, 5, 5000)).astype(np.float32))
    value = torch.sin(3 * key) + 0.1 * torch.randn(5000)
    far = np.r_[generator.uniform(-5, 10, 250), 5 + 10 ** generator.uniform(-3, 4, 150)].astype(np.float32)
    query = torch.from_numpy(far)
    for w in (3.0, 100.0, 1e3, 1e4):
        expected = exact(query, key, value, w, tangents=False).out
        out = linear.forward(*canonical(query, key, value, w), False, False, False)[0]
        assert np.abs(out.numpy() - expected).max() <= 2.0**-23 * float(value.abs().max())


def test_most_rows_are_served_by_series(monkeypatch):
    """Dense data is never summed key by key: what the bounds decline is a small part."""
    steps = linear.query_side.__globals__
    far = []
    sum_far_rows = steps["sum_far_rows"]
    monkeypatch.setitem(steps, "sum_far_rows", lambda *args: (far.append(len(args[-1])), sum_far_rows(*args)))
    x = torch.rand(20_000, dtype=torch.float64) * 5
    for dtype in (torch.float64, torch.float32):
        for w in (3.0, 100.0):
            linear.forward(*canonical(x.to(dtype), x.to(dtype), x.to(dtype), w), True, False, False)
    assert sum(far) < 0.01 * 4 * 20_000


@pytest.mark.parametrize("w", [0.0, 1.0, 300.0, 1e5])
def test_outputs_stay_between_the_values(w):
    query, key, _ = case("uniform", 3000, 2000, 9, torch.float32)
    for value in (torch.full((3000,), 0.1), torch.rand(3000) + 5):
        out = linear.forward(*canonical(query, key, value, w), False, False, False)[0]
        assert value.min() <= out.min() and out.max() <= value.max()


def test_an_outlier_does_not_cost_the_others_their_digits():
    key = torch.linspace(0, 1e4, 2000)
    value = torch.sin(key)
    value[-1] = 1e38
    out = linear.forward(*canonical(key[:1500], key, value, 3.0), False, False, False)[0]
    expected = exact(key[:1500], key, value, 3.0, tangents=False).out
    assert np.abs(out.numpy() - expected).max() < 1e-6


# Backward.


@every_other("with_lse, w", (True, False), (0.0, 0.05, 3.0, 100.0, 3e3))
def test_gradients(w, with_lse):
    query, key, value = (
        x.double() for x in (torch.rand(600) * 6 - 0.5, torch.rand(1000) * 5, torch.randn(1000, 1))
    )
    weight = torch.rand(1000, dtype=torch.float64)
    if w < 1e3:  # beyond, the gradients of keys left out overflow
        weight[::9] = 0
    for tangents in (False, True):
        assert_gradients(canonical(query, key, value, w), False, with_lse, tangents and not with_lse)
    assert_gradients(canonical(query, key, value, w, weight), False, with_lse)
    assert_gradients(canonical(key, key, value, w, weight), True, with_lse)
    channels = torch.randn(1000, 3, dtype=torch.float64)
    assert_gradients(canonical(query.sort().values, key.sort().values, channels, w), False, with_lse)


@every_other("kind, w", ("clusters", "duplicates", "isolated"), (1.0, 30.0, 1e3))
def test_gradients_of_uneven_data(kind, w):
    generator = np.random.default_rng(6)
    key = torch.from_numpy(keys_of(kind, 1500, generator))
    query = torch.from_numpy(generator.uniform(-3, 8, 1100))
    assert_gradients(canonical(query, key, torch.sin(3 * key), w))
    assert_gradients(canonical(key, key, torch.sin(3 * key), w), True)


def test_gradients_of_a_crowd_seen_from_afar():
    generator = np.random.default_rng(7)
    key = torch.from_numpy(0.3 * generator.normal(size=3000))
    query = torch.from_numpy(np.r_[generator.uniform(2, 40, 700), -generator.uniform(2, 40, 700)])
    assert_gradients(canonical(query, key, torch.sin(3 * key), 1.0), tolerance=1e-10)
    queries = torch.from_numpy(0.3 * generator.normal(size=3000) + 3)
    assert_gradients(canonical(queries, key, torch.sin(3 * key), 1.0), True, tolerance=1e-10)


@pytest.mark.parametrize(
    ("m", "w", "beyond"), [(1000, 3.0, 0.0), (1000, 100.0, 0.0), (1, 3.0, 0.0), (3, 3.0, 2.0)]
)
def test_gradients_of_keys_everywhere_in_their_boxes(m, w, beyond):
    """No series is differentiated, whose slope at the end of a box has T^2 times the error of its values."""
    query, key = torch.rand(m, dtype=torch.float64) + beyond, torch.rand(3000, dtype=torch.float64)
    inputs = canonical(query, key, torch.randn(3000, dtype=torch.float64), w)
    results = linear.forward(*inputs, False, False, False)
    grad_out = torch.randn_like(results[0])
    found = backward(linear, grad_out, None, inputs, results, needs=backends.NEEDS_KEY)[1]
    right = exact_gradients(inputs, grad_out, None, False)[1]
    assert np.abs(found.numpy()[:, 0] - right).max() <= 2e-14 * np.abs(right).max()


@pytest.mark.parametrize("others", [1, 3000])
def test_windows_hold_what_counts_to_rounding(others):
    """Keys that weigh exp(-36) as much as the nearest, all together: small to sums, but all there is to gradients."""
    far, score = 1e6, 36 + math.log(others)
    key = torch.cat([torch.zeros(1), torch.full((others,), score / far)]).double()
    value = torch.ones(1 + others, dtype=torch.float64)
    value[1:] = 0
    inputs = canonical(torch.tensor([-far], dtype=torch.float64), key, value, 1.0)
    results = linear.forward(*inputs, False, False, False)
    found = backward(linear, torch.ones_like(results[0]), None, inputs, results, needs=backends.NEEDS_KEY)[1]
    right = exact_gradients(inputs, torch.ones_like(results[0]), None, False)[1]
    np.testing.assert_allclose(found.numpy()[1:, 0], right[1:].astype(float), rtol=1e-8)


def test_gradients_in_float32():
    query, key, value = torch.rand(2000) * 6 - 0.5, torch.rand(3000) * 5, torch.randn(3000, 1)
    inputs = canonical(query, key, value, 20.0)
    results = linear.forward(*inputs, False, True, True)
    grad_out = torch.randn_like(results[0])
    actual = backward(linear, grad_out, None, inputs, results)
    double = [None if x is None else x.double() for x in inputs]
    wanted = backward(dense, grad_out.double(), None, double, dense.forward(*double, False, True, True))
    for name, one, other in zip(NAMES[:4], actual, wanted, strict=False):
        assert one.dtype == torch.float32
        assert float((one - other).abs().max()) <= 3e-6 * float(other.abs().max()), name


def test_adjoint_and_homogeneity():
    """<g, A v> = <A^T g, v>, and w dL/dw = sum q dL/dq + sum k dL/dk, with 200 000 points."""
    n = 200_000
    query, key, value = (x.double() for x in (torch.rand(n) * 7 - 1, torch.rand(n) * 5, torch.randn(n)))
    for w in (2.0, 500.0, 5e4):
        inputs = canonical(query, key, value, w)
        results = linear.forward(*inputs, False, True, True)
        g = torch.randn_like(results[0])
        by_query, by_key, by_value, by_w, _ = backward(linear, g, None, inputs, results)
        there, back = (g * results[0]).sum(), (by_value * inputs[2]).sum()
        assert abs(there - back) <= 1e-12 * n**0.5
        moved = (by_query * inputs[0]).sum() + (by_key * inputs[1]).sum()
        terms = (by_query * inputs[0]).abs().sum() + (by_key * inputs[1]).abs().sum()
        assert abs(w * by_w - moved) <= 4e-12 * float(terms)


# What is not a matter of digits.


def test_batches():
    query, key = torch.rand(2, 3, 50, 1).double(), torch.rand(1, 3, 400, 1).double()
    value, weight = torch.randn(2, 3, 400, 2).double(), torch.rand(1, 3, 400).double()
    w = torch.tensor([2.0, 50.0, 1e4], dtype=torch.float64)[:, None]
    inputs = query, key, value, w, weight
    results = linear.forward(*inputs, False, False, False)
    out, lse = reference.forward(*inputs, False)
    torch.testing.assert_close(results[0], out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[1], lse, rtol=1e-12, atol=1e-12)
    grads = [
        backward(module, torch.ones_like(out), lse, inputs, module.forward(*inputs, False, False, False))
        for module in (linear, dense)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_storage(dtype):
    inputs = [x.to(dtype) for x in canonical(torch.rand(300), torch.rand(600), torch.randn(600), 40.0)[:4]]
    widened = [x.float() for x in inputs]
    results, wanted = (linear.forward(*x, None, False, True, True) for x in (inputs, widened))
    assert all(map(torch.equal, results, wanted))
    ones = torch.ones_like(results[0])
    gradients = backward(linear, ones, None, (*inputs, None), results)
    assert gradients[1].dtype == torch.float32 and gradients[3].dtype == dtype


def test_strided_and_expanded_input():
    base = torch.rand(2000, 3, dtype=torch.float64)
    value = torch.randn(1, 2, dtype=torch.float64).expand(2000, 2)
    inputs = base[:, :1], base[:, 1:2], value, torch.ones(1, dtype=torch.float64) * 9, None
    plain = [None if x is None else x.contiguous() for x in inputs]
    for one, other in zip(
        linear.forward(*inputs, False, False, False), linear.forward(*plain, False, False, False), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)  # of two channels, no tangents


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(5))
def test_numbers_that_are_not_finite(place, bad):
    """As in the dense kernels; a bad query spoils its own row alone, and there may be many."""
    inputs = list(canonical(torch.rand(700), torch.rand(700), torch.rand(700), 9.0, torch.rand(700)))
    inputs[place] = inputs[place].clone()
    inputs[place][5 % len(inputs[place])] = bad
    ones = torch.ones(700, 1)
    both = [module.forward(*inputs, False, True, True) for module in (linear, dense)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one[..., :1], other[..., :1], rtol=1e-4, atol=1e-4, equal_nan=True)
    if place == 0:
        assert both[0][0].isnan().sum() == 1
    grads = [
        backward(module, ones, None, inputs, results)
        for module, results in zip((linear, dense), both, strict=True)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_rows_without_keys():
    inputs = canonical(torch.rand(40), torch.rand(50), torch.rand(50), 9.0, torch.zeros(50))
    results = linear.forward(*inputs, False, True, True)
    assert results[0].isnan().all() and (results[1] == -math.inf).all() and not results[2][:, 1].any()
    gradients = backward(linear, torch.ones(40, 1), torch.ones(40), inputs, results)
    assert not any(gradient.any() for gradient in gradients)
    single = canonical(torch.ones(1), torch.ones(1), torch.ones(1), 9.0)
    results = linear.forward(*single, True, False, False)
    assert results[0].isnan().all() and results[1].item() == -math.inf
    assert not any(
        gradient.any() for gradient in backward(linear, torch.ones(1, 1), None, single, results, True)
    )


@pytest.mark.parametrize("w", [3.0, 1000.0])
@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float32, 1e-40), (torch.float64, 100 * 5e-324)])
def test_weights_below_the_normal_numbers(dtype, tiny, w):
    x = torch.linspace(0, 5, 700, dtype=dtype)
    query, value, weight = x + 0.001, x.sin(), torch.full_like(x, tiny)
    out, lse, *_ = linear.output(*canonical(query, x, value, w, weight), False, True, False, False)
    # A factor of all weights shifts lse alone.
    expected, shifted = reference.forward(*canonical(query.double(), x.double(), value.double(), w), False)
    shift = math.log2(float(weight[0].double() * 2.0**1000)) - 1000
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), shifted + shift * math.log(2), rtol=tolerance, atol=0)


@pytest.mark.parametrize("w", [3.0, 1000.0])
def test_output_is_the_forward_pass(w):
    x = torch.rand(3000).sort().values
    inputs = canonical(x, x, torch.randn(3000), w)
    out, lse, *_ = linear.forward(*inputs, False, False, False)
    for with_lse in False, True:
        alone, its_lse, *_ = linear.output(*inputs, False, with_lse, False, False)
        assert torch.equal(alone, out) and torch.equal(its_lse, lse if with_lse else lse[:0])


def test_negative_weight_is_nan():
    weight = torch.rand(300)
    weight[7] = -1
    x = torch.rand(300)
    assert linear.forward(*canonical(x, x, x, 9.0, weight), False, False, False)[0].isnan().all()


def test_no_queries():
    inputs = canonical(torch.rand(0), torch.rand(300), torch.rand(300), 2.0, torch.rand(300))
    results = linear.forward(*inputs, False, True, True)
    assert results[0].shape == (0, 1)
    for gradient, x in zip(backward(linear, results[0], results[1], inputs, results), inputs, strict=True):
        assert gradient.shape == x.shape and not gradient.any()


def test_more_than_one_feature_is_refused():
    x = torch.rand(5, 2)
    with pytest.raises(ValueError, match="D = 1 feature, got D = 2"):
        linear.forward(x, x, x, torch.ones(2), None, False, False, False)


def test_method_of_the_public_function():
    import nwfast

    key = torch.rand(900, dtype=torch.float64, requires_grad=True)
    query, value = torch.rand(500, dtype=torch.float64), torch.rand(900, dtype=torch.float64)
    out = nwfast.nadaraya_watson(query, key, value, 20.0, method="fgt", backend="numba")
    wanted = nwfast.nadaraya_watson(query, key, value, 20.0, backend="reference")
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(out.sum(), key)
    (same,) = torch.autograd.grad(wanted.sum(), key)
    torch.testing.assert_close(gradient, same, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="one feature"):
        nwfast.nadaraya_watson(
            torch.rand(5, 2), torch.rand(5, 2), torch.rand(5), method="fgt", backend="numba"
        )


# Prepared keys.


@every_other("kind, dtype", KINDS, (torch.float64, torch.float32))
def test_prediction(kind, dtype):
    query, key, value = case(kind, 1000, 300, 11, dtype)
    key = key.sort().values
    weight = torch.rand(1000, dtype=dtype)
    weight[::4] = 0
    values = torch.stack([value, torch.cos(value)], 1)
    for w in (0.0, 1e-30, 3.0, 100.0, 1e5):
        for column, a in ((value[:, None], None), (values, weight)):
            out, lse = linear.predict(
                linear.compress(key[:, None], column, a, torch.tensor([w])), query[:, None]
            )
            expected = exact(query, key, column, float(torch.tensor(w)), a)
            assert np.abs(out.numpy() - expected.out).max() <= BOUND[dtype] * float(column.abs().max())
            assert (
                np.abs((lse.numpy() - expected.lse) / np.maximum(1, np.abs(expected.lse))).max()
                <= BOUND[dtype]
            )


def test_prediction_of_bad_numbers():
    query, key, value = torch.tensor([0.5, math.nan, math.inf, 1e30, -1e9]), torch.rand(500), torch.rand(500)
    key = key.sort().values
    out, lse = linear.predict(linear.compress(key[:, None], value[:, None], None, 9.0), query[:, None])
    wanted = dense.forward(*canonical(query, key, value, 9.0), False, False, False)
    torch.testing.assert_close(out, wanted[0], equal_nan=True)
    torch.testing.assert_close(lse, wanted[1], equal_nan=True)
    value[3] = math.nan
    assert (
        linear.predict(linear.compress(key[:, None], value[:, None], None, 9.0), query[:, None])[0]
        .isnan()
        .all()
    )
    nothing = linear.compress(key[:, None], key[:, None], torch.zeros(500), 9.0)
    assert linear.predict(nothing, query[:, None])[0].isnan().all()
    assert linear.predict(nothing, query[:0, None])[0].shape == (0, 1)
