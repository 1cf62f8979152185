"""One feature, dense: rows far from their nearest key, near ties across wide gaps, extremes that some keys or queries
set, and numbers that are not finite; results and all gradients against a sum in long double."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import every_other
from oracle import ROUNDING

import nwfast

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
HELD = ("native", "numba", "reference")
NAMES = ("query", "key", "value", "w", "key_weight")
LONG = np.longdouble


@pytest.fixture(autouse=True)
def held(backend):
    if backend not in HELD:
        pytest.skip(f"dense kernels of {', '.join(HELD)} are held to this, not {backend}")


def nearest_keys(query, key, kept):
    """The place of each row's nearest kept key, by exact arithmetic."""
    order, places = np.argsort(key), np.zeros(len(query), int)
    for i, x in enumerate(query):
        candidates = order[kept[i][order]]
        middle = np.searchsorted(key[candidates], x)
        around = candidates[max(middle - 1, 0) : middle + 1]
        if len(around):
            places[i] = min(around, key=lambda j, x=x: abs(Fraction(float(x)) - Fraction(float(key[j]))))
    return places


def exact(query, key, value, w, key_weight, exclude_self, grad, grad_lse):
    """{name: (result, sum of absolute terms)} of the outputs and gradients, relative to each row's nearest key."""
    kept = np.broadcast_to(key_weight.numpy() > 0, (len(query), len(key))).copy()
    if exclude_self:
        np.fill_diagonal(kept, False)
    near = nearest_keys(query.numpy(), key.numpy(), kept)
    x, k, v, a, g, g_lse = (t.numpy().astype(LONG) for t in (query, key, value, key_weight, grad, grad_lse))
    w = w.numpy().astype(LONG)
    best, d = k[near], x[:, None] - k
    # 2 x - k* in two parts: it cancels against k where that lies as far on the other side.
    high = 2 * x - best
    low = (2 * x - (high - (high - 2 * x))) - (best + (high - 2 * x))
    score = -((best[:, None] - k) * w) * (((high[:, None] - k) + low[:, None]) * w) / 2
    with np.errstate(over="ignore"):
        e = np.exp(score)  # above 1 for a key without weight that lies nearer than those with one
    total = np.where(kept, a * e, 0).sum(1, keepdims=True)
    p, e = np.where(kept, a * e / total, 0), e / total
    out = (p * v).sum(1, keepdims=True)
    u = g[:, None] * (v - out) + g_lse[:, None]
    values = (p * np.abs(v)).sum(1, keepdims=True)  # what out is rounded to, however small its sum is
    size = np.abs(g)[:, None] * (np.abs(v) + values) + np.abs(g_lse)[:, None]
    lse = -((w * (x - best)) ** 2) / 2 + np.log(total[:, 0])
    return {
        "out": (out[:, 0], (p * np.abs(v)).sum(1)),
        "lse": (lse, 1 + np.abs(lse)),
        "query": (-w * w * (p * u * d).sum(1), w * w * (p * size * np.abs(d)).sum(1)),
        "key": (w * w * (p * u * d).sum(0), w * w * (p * size * np.abs(d)).sum(0)),
        "value": ((p * g[:, None]).sum(0), (p * np.abs(g)[:, None]).sum(0)),
        "w": (-w * (p * u * d * d).sum(), abs(w) * (p * size * d * d).sum()),
        "key_weight": ((e * u).sum(0), (e * size).sum(0)),
    }


def evaluate(backend, query, key, value, w, key_weight=None, exclude_self=False, grad=None, grad_lse=None):
    """{name: result} of out, lse and all gradients."""
    leaves = [
        t.clone().requires_grad_()
        for t in (query, key, value, w) + (() if key_weight is None else (key_weight,))
    ]
    weight = None if key_weight is None else leaves[4]
    out, lse = nwfast.nadaraya_watson(
        *leaves[:4],
        key_weight=weight,
        exclude_self=exclude_self,
        method="dense",
        backend=backend,
        return_lse=True,
    )
    grad = torch.ones_like(out) if grad is None else grad
    outputs, cotangents = ((out,), (grad,)) if grad_lse is None else ((out, lse), (grad, grad_lse))
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(NAMES, gradients, strict=False))}


def compare(backend, query, key, value, w, key_weight=None, exclude_self=False, tolerance=64):
    """All results within `tolerance` roundings of the sums of absolute terms."""
    generator = torch.Generator().manual_seed(5)
    grad, grad_lse = (torch.randn(len(query), generator=generator).to(query.dtype) for _ in range(2))
    w = torch.as_tensor(w, dtype=query.dtype)
    weight = torch.ones_like(key) if key_weight is None else key_weight
    for with_lse in (False, True):
        g_lse = grad_lse if with_lse else torch.zeros_like(grad)
        found = evaluate(
            backend, query, key, value, w, key_weight, exclude_self, grad, grad_lse if with_lse else None
        )
        for name, (right, size) in exact(query, key, value, w, weight, exclude_self, grad, g_lse).items():
            if name not in found:
                continue
            error = np.abs(found[name].numpy().astype(LONG) - right)
            # A window leaves out what is below the rounding error of the largest.
            allowed = tolerance * ROUNDING[query.dtype] * np.maximum(size, 1e-3 * np.max(size))
            allowed += torch.finfo(query.dtype).tiny
            # Not where the terms themselves overflow.
            fits = size < torch.finfo(query.dtype).max
            assert (error <= allowed)[fits].all(), (
                f"{name}: error {error}, allowed {allowed}, found {found[name]}, right {right}"
            )


def in_order(order, key, value):
    if order == "sorted":
        key, places = key.sort()
        return key, value[places]
    places = torch.randperm(len(key))
    return key[places], value[places]


@every_other("queries, order, dtype", [1, 4, 16, 130], ["sorted", "unsorted"], [torch.float32, torch.float64])
def test_distances_that_round_to_ties(backend, queries, order, dtype):
    """Beyond all keys, where w^2 |q| ulp(q) is large: rounded distances cannot tell which key is the nearest."""
    key, value = in_order(order, torch.linspace(0, 5, 301, dtype=dtype), torch.randn(301, dtype=dtype))
    for far in (1e4, -1e4, 1e8) if dtype == torch.float32 else (1e4, -1e12, 1e16):
        query = far * (1 + torch.rand(queries, dtype=dtype))
        for w in (0.01, 1.0, 40.0):
            compare(backend, query, key, value, w)


@DTYPES
@pytest.mark.parametrize("queries", [1, 9, 130])
@pytest.mark.parametrize("w", [1.0, 1e3, 1e6])
def test_the_middle_of_a_gap(backend, queries, w, dtype):
    """Keys on both sides, nearly as far: what counts is by how much, which is small beside the distances."""
    spacing = 2.0**-20
    left = torch.randint(-64, 1, (40,), dtype=torch.float64) * spacing
    right = 1 + torch.randint(0, 65, (40,), dtype=torch.float64) * spacing
    key, value = torch.cat([left, right]).to(dtype), torch.randn(80, dtype=dtype)
    query = (0.5 + torch.randint(-64, 65, (queries,), dtype=torch.float64) * spacing).to(dtype)
    for order in ("sorted", "unsorted"):
        compare(backend, query, *in_order(order, key, value), w)
        compare(backend, query + 8, *in_order(order, key + 8, value), w)


@DTYPES
@pytest.mark.parametrize("queries", [1, 9, 130])
def test_an_outlier_sets_no_scale(backend, queries, dtype):
    """One key or query far away, as sentinels are, and bandwidths that are tiny beside the extent of the data."""
    key, value = torch.randn(30, dtype=dtype), torch.randn(30, dtype=dtype)
    query = torch.randn(queries, dtype=dtype)
    for outlier in (1e16, -1e20, 3e38) if dtype == torch.float32 else (1e16, -1e200, 1e308):
        far_key, far_query = key.clone(), query.clone()
        far_key[7] = outlier
        far_query[0] = outlier
        compare(backend, query, far_key, value, 1.0)
        compare(backend, far_query, key, value, 1.0)
        compare(backend, far_query, far_key, value, 1.0)
    small = 1e-17 if dtype == torch.float32 else 1e-250
    mixed = torch.cat([key * small, key[:3]])
    compare(backend, torch.cat([query * small, query[:1]]), mixed, torch.cat([value, value[:3]]), 1 / small)


@DTYPES
@pytest.mark.parametrize("size", ["smallest", "small", "large"])
def test_tiny_and_huge_coordinates(backend, size, dtype):
    info = torch.finfo(dtype)
    scale = {"smallest": info.smallest_normal * info.eps * 8, "small": info.tiny * 4, "large": info.max / 8}[
        size
    ]
    key, query = torch.rand(50, dtype=torch.float64) * scale, torch.rand(20, dtype=torch.float64) * scale
    value = torch.randn(50, dtype=dtype)
    for w in (1.0, 1 / scale, info.max / 4, info.tiny):
        if w < info.max:
            compare(backend, query.to(dtype), key.to(dtype), value, w)


@pytest.mark.parametrize("cluster", [1, 40])
def test_offsets_small_beside_the_extent(backend, cluster):
    """A wide bandwidth and keys 2e-6 from the queries: their gradients are sums of such offsets."""
    key = torch.cat([torch.rand(cluster) * 4e-6, torch.ones(1)])
    value = torch.cat([torch.randn(cluster), torch.zeros(1)])
    query = torch.cat([torch.rand(99) * 4e-6, torch.ones(1)])
    for w in (0.3, 1.0, 3.0):
        compare(backend, query, key, value, w)
        compare(backend, query, key[:cluster], value[:cluster], w)
        compare(backend, query[:40] + 0.5, torch.cat([key, key - 1]), torch.cat([value, value]), w)


@DTYPES
@pytest.mark.parametrize("queries", [1, 9, 130])
def test_keys_without_weight_nearer_than_all_others(backend, queries, dtype):
    """Their weights overflow: never times 0. Their own derivative is right, up to the largest finite number."""
    query = torch.rand(queries, dtype=dtype)
    key = torch.tensor([0.0, 0.5, 13.0, 13.1], dtype=dtype)
    value = torch.tensor([3.0, -1.0, 1.0, 2.0], dtype=dtype)
    weight = torch.tensor([0.0, 0.0, 1.0, 0.5], dtype=dtype)
    for w in (0.5, 1.0, 0.9):
        compare(
            backend, query, key, value, w, weight, tolerance=1024
        )  # scores of up to 100 have their own rounding
    found = evaluate(backend, query, key, value, torch.tensor(1e3, dtype=dtype), weight)
    assert all(result.isfinite().all() for result in found.values())
    for name in ("key", "value"):
        assert not found[name][:2].any()
    # v_j - out is 2 and -2: with the sign of what overflowed.
    most = torch.finfo(dtype).max
    torch.testing.assert_close(found["key_weight"][:2], torch.tensor([most, -most], dtype=dtype))


@DTYPES
@pytest.mark.parametrize("n", [2, 5, 130])
def test_the_own_key_may_hold_anything(backend, n, dtype):
    """exclude_self leaves it out: selected away, not multiplied by 0."""
    x, value = torch.rand(n, dtype=dtype), torch.randn(n, dtype=dtype)
    for scale in (1.0, 100.0):
        for bad in (torch.nan, torch.inf):
            for broken in ("key", "value"):
                data = {"key": x.clone(), "value": value.clone()}
                data[broken][1] = bad
                grad = torch.zeros(n, dtype=dtype)
                grad[1] = 1
                w = torch.tensor(scale, dtype=dtype)
                found = evaluate(backend, x, data["key"], data["value"], w, exclude_self=True, grad=grad)
                data = {"key": x, "value": value}
                right = evaluate(backend, x, data["key"], data["value"], w, exclude_self=True, grad=grad)
                torch.testing.assert_close(found["out"][1], right["out"][1])
                for name in ("query", "key", "value", "w"):
                    torch.testing.assert_close(found[name], right[name])


@DTYPES
@pytest.mark.parametrize("queries", [3, 130])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_query_without_cotangent_adds_nothing(backend, bad, queries, dtype):
    """Padded queries may hold anything: rows whose cotangents are 0 reach no gradient."""
    query, key, value = (torch.randn(n, dtype=dtype) for n in (queries, 60, 60))
    w, weight = torch.tensor(2.0, dtype=dtype), torch.rand(60, dtype=dtype)
    cotangents = torch.randn(2, queries, dtype=dtype)
    cotangents[:, 1] = 0
    padded = query.clone()
    padded[1] = bad
    for grad, grad_lse in (cotangents, (cotangents[0], None)):
        found = evaluate(backend, padded, key, value, w, weight, grad=grad, grad_lse=grad_lse)
        right = evaluate(backend, query, key, value, w, weight, grad=grad, grad_lse=grad_lse)
        assert found["out"][1].isnan()
        assert found["lse"][1].isnan() if bad != bad else found["lse"][1] == -torch.inf
        assert found["query"][1] == 0
        for name in NAMES:
            torch.testing.assert_close(
                found[name], right[name], msg=lambda text, name=name: f"{name}: {text}"
            )


@DTYPES
@pytest.mark.parametrize("queries", [3, 40, 130])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bandwidth_that_is_no_number(backend, bad, queries, dtype):
    """w NaN or infinite: all results and gradients are NaN, and none is an answer."""
    query, key, value = (torch.randn(n, dtype=dtype) for n in (queries, 40, 40))
    w = torch.tensor(bad, dtype=dtype)
    for grad_lse in (None, torch.ones(queries, dtype=dtype)):
        found = evaluate(backend, query, key, value, w, grad_lse=grad_lse)
        for name, result in found.items():
            assert result.isnan().all(), name


@DTYPES
@pytest.mark.parametrize("queries", [3, 130])
def test_keys_at_infinity_count_for_nothing(backend, queries, dtype):
    query, key, value = (torch.randn(n, dtype=dtype) for n in (queries, 40, 40))
    w = torch.tensor(2.0, dtype=dtype)
    right = evaluate(backend, query, key, value, w)
    away = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    found = evaluate(backend, query, torch.cat([key, away]), torch.cat([value, away.sign()]), w)
    for name, result in right.items():
        if name in ("key", "value"):
            assert not found[name][40:].any(), name
        torch.testing.assert_close(found[name][: len(result)] if result.dim() else found[name], result)


@pytest.mark.parametrize("needs", [["query"], ["query", "w"], ["query", "key"]], ids=str)
def test_tangents_beyond_float32(backend, needs):
    """Where a slope of out is no float32, its product with a small cotangent may be one."""
    if backend != "native":
        pytest.skip("saves float32 tangents")
    key = torch.tensor([1.25e-43, 1.36e-43, 1.5e-43])
    value, w = torch.tensor([3e6, -2e6, 1e6]), torch.tensor(torch.finfo(torch.float32).max)
    query, grad = torch.zeros(3), torch.tensor([-0.02, 0.0, 1e-3])
    right = exact(query, key, value, w, torch.ones(3), False, grad, torch.zeros(3))
    leaves = {"query": query, "key": key, "value": value, "w": w}
    for name in needs:
        leaves[name] = leaves[name].clone().requires_grad_()
    for method in ("dense", "fgt"):
        out = nwfast.nadaraya_watson(*leaves.values(), method=method, backend=backend)
        found = torch.autograd.grad(out, [leaves[name] for name in needs], grad)
        for name, gradient in zip(needs, found, strict=True):
            size = right[name][1] + torch.finfo(torch.float32).tiny
            assert (np.abs(gradient.numpy().astype(LONG) - right[name][0]) <= 1e-6 * size).all(), name


@DTYPES
def test_tiny_totals_beside_large_values(backend, dtype):
    """A row whose nearest key has a tiny weight divides by that: what is far from it still gets a gradient of 0."""
    info = torch.finfo(dtype)
    small, large = (1e-14, 1e22) if dtype == torch.float32 else (1e-100, 1e200)
    key, query = torch.tensor([-1.0, 0.0, -1.01], dtype=dtype), torch.tensor([-0.97], dtype=dtype)
    value, weight = (
        torch.tensor([-large, 1.0, large], dtype=dtype),
        torch.tensor([small, 1, small], dtype=dtype),
    )
    grad = torch.tensor([-300.0], dtype=dtype)
    w = torch.tensor(1e3, dtype=dtype)
    found = evaluate(backend, query, key, value, w, weight, grad=grad)
    right = exact(query, key, value, w, weight, False, grad, torch.zeros(1, dtype=dtype))
    for name in NAMES[:4]:
        # The scores are some hundred.
        error = np.abs(found[name].numpy().astype(LONG) - right[name][0])
        assert (error <= 4096 * info.eps * right[name][1] + info.tiny).all(), name


def test_slopes_of_lse_beyond_all_numbers(backend):
    """A slope by w that overflows, times a cotangent that makes a number of it."""
    if backend != "native":
        pytest.skip("takes the cotangent first")
    w = torch.tensor(torch.finfo(torch.float64).max, dtype=torch.float64, requires_grad=True)
    query, key, value = (torch.tensor([x], dtype=torch.float64) for x in (2.0, 0.0, 1.0))
    _, lse = nwfast.nadaraya_watson(query, key, value, w, return_lse=True, method="dense", backend=backend)
    (found,) = torch.autograd.grad(lse, w, torch.tensor([0.125], dtype=torch.float64))
    assert found.item() == -w.item() / 2
