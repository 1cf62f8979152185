"""The Numba backend at the edges: keys left out, outliers, far queries, extreme numbers, many features, no disk."""

import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nwfast
from nwfast import backends

numba = pytest.importorskip("numba")
dense, linear = backends.load("numba"), backends.load("numba_fgt")
base, boxes = backends.load("numba.base"), backends.load("numba.linear.boxes")

METHODS = {"dense": dense, "fgt": linear}
NAMES = ("query", "key", "value", "w", "key_weight")
DTYPES = [torch.float32, torch.float64]
ALL = 31


def run(module, query, key, value, w, key_weight=None, exclude_self=False, grad_out=None, grad_lse=None):
    """Out, lse and all gradients by name; tensors in canonical form without a batch."""
    results = module.forward(query, key, value, w, key_weight, exclude_self, False, False)
    out, lse, *computed = results
    grad_out = torch.ones_like(out) if grad_out is None else grad_out
    inputs = query, key, value, w, key_weight
    needs = ALL if key_weight is not None else 15
    found = module.backward(grad_out, grad_lse, *inputs, out, *computed, exclude_self, needs)
    return {"out": out, "lse": lse} | {name: x for name, x in zip(NAMES, found, strict=True) if x.numel()}


def column(numbers, dtype=torch.float32):
    return torch.tensor(numbers, dtype=dtype)[:, None]


def exact(query, key, value, w, key_weight=None, grad_out=None, exclude_self=False):
    """The textbook in longdouble relative to the nearest key: results and, for each, its sum of absolute terms."""
    q, k, v, given = (x.double().numpy().astype(np.longdouble) for x in (query, key, value, w))
    w = np.broadcast_to(given, q.shape[1:])
    a = np.ones(len(k)) if key_weight is None else key_weight.double().numpy().astype(np.longdouble)
    g = np.ones((len(q), v.shape[1])) if grad_out is None else grad_out.double().numpy()
    names = {"query": q, "key": k, "value": v, "w": w, "key_weight": a}
    found = {name: (np.zeros(x.shape, q.dtype), np.zeros(x.shape, q.dtype)) for name, x in names.items()}
    out, size, lse = np.zeros(g.shape, q.dtype), np.zeros(g.shape, q.dtype), np.zeros(len(q), q.dtype)
    for i, x in enumerate(q):
        counts = a > 0
        if exclude_self:
            counts[i] = False
        squares = np.where(counts, (((x - k) * w) ** 2).sum(1), np.inf)
        for _ in range(2):
            star = k[squares.argmin()]
            z = ((star - k) * w * (((x - k) + (x - star)) * w)).sum(1)
            squares = np.where(counts, z, np.inf)
        total = (a * np.exp(-squares / 2)).sum()
        with np.errstate(over="ignore"):
            per_weight = np.exp(-z / 2) / total
        per_weight[~counts & (a > 0)] = 0
        p = np.where(a > 0, per_weight, 0) * a
        out[i], size[i] = p @ v, p @ np.abs(v)
        lse[i] = np.log(total) - (((x - star) * w) ** 2).sum() / 2
        pull, most = (v - out[i]) @ g[i], (np.abs(v) + np.abs(out[i])) @ np.abs(g[i])
        d = x - k
        for sign, (force, d_i) in enumerate(((pull, d), (most, np.abs(d)))):
            by = (p * force)[:, None] * d_i
            found["query"][sign][i] = (1 if sign else -1) * (by * w * w).sum(0)
            found["key"][sign][:] += by * w * w
            found["w"][sign][:] += (1 if sign else -1) * (by * d_i * np.abs(w)).sum(0)
            found["value"][sign][:] += p[:, None] * (np.abs(g[i]) if sign else g[i])
            found["key_weight"][sign][:] += per_weight * force
    if len(given) < len(w):
        found["w"] = tuple(part.sum(keepdims=True) for part in found["w"])
    return found | {"out": (out, size), "lse": (lse, np.maximum(1, np.abs(lse)))}


def assert_exact(results, expected, tolerance, names=None):
    """Within the tolerance of the sums of absolute terms."""
    for name in names or results:
        wanted, scale = expected[name]
        actual = results[name].double().numpy().reshape(wanted.shape)
        error = np.abs(actual - wanted)
        limit = tolerance * scale + 1e-6 * tolerance * scale.max(initial=0) + 1e-37
        assert (error <= limit).all(), f"{name}: {float((error / limit).max()):.2g} times too much"


TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-11}


# Keys that are left out.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_keys_left_out_may_hold_anything(bad, dtype, method):
    for features in (1,) if method == "fgt" else (1, 3):
        key, value = torch.rand(300, features, dtype=dtype), torch.rand(300, 2, dtype=dtype)
        query, w = torch.rand(40, features, dtype=dtype), torch.tensor([7.0], dtype=dtype)
        weight = torch.rand(300, dtype=dtype) + 0.1
        weight[::7], weight[1] = 0, -0.0
        spoilt_key, spoilt_value = key.clone(), value.clone()
        spoilt_key[::14], spoilt_value[::7, 1], spoilt_value[1] = bad, bad, bad
        wanted = run(METHODS[method], query, key, value, w, weight)
        found = run(METHODS[method], query, spoilt_key, spoilt_value, w, weight)
        for name in ("out", "lse", "query", "key", "value", "w"):
            assert torch.equal(found[name], wanted[name]), name
        left_out = weight == 0
        assert not found["key"][left_out].any() and not found["value"][left_out].any()
        torch.testing.assert_close(found["key_weight"][~left_out], wanted["key_weight"][~left_out])
        if not math.isfinite(bad):
            assert not found["key_weight"][left_out].any()
        assert found["key_weight"].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_left_out_nearer_than_all_others(dtype, method):
    """Their weights' gradients overflow to the largest number; nothing else notices them."""
    for gap in (13.0, 30.0, 200.0):
        query, key = column([0.0, 0.5], dtype), column([0.0, gap, gap + 0.1], dtype)
        value, w = column([3.0, 1.0, 2.0], dtype), torch.ones(1, dtype=dtype)
        weight = torch.tensor([0.0, 1.0, 1.0], dtype=dtype)
        found = run(METHODS[method], query, key, value, w, weight)
        kept = run(METHODS[method], query, key[1:], value[1:], w, weight[1:])
        for name in ("out", "lse", "query", "w"):
            torch.testing.assert_close(found[name], kept[name])
        by_weight = exact(query, key, value, w, weight)["key_weight"][0]
        largest = torch.finfo(dtype).max
        wanted = torch.from_numpy(np.clip(by_weight, -largest, largest).astype(np.float64)).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(found["key_weight"], wanted, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_keys_left_out_anywhere(method):
    """Outside the boxes of those kept, in gaps, many bandwidths away, and at their own row's place."""
    generator = torch.Generator().manual_seed(1)
    key = torch.rand(320, 1, generator=generator, dtype=torch.float64)
    key[:20, 0] = torch.linspace(-60, 40, 20, dtype=torch.float64)
    key[0], key[1] = -2.0, 1e9
    weight = torch.ones(320, dtype=torch.float64)
    weight[:40] = 0
    query = torch.rand(50, 1, generator=generator, dtype=torch.float64)
    for w in (1.0, 30.0):
        inputs = query, key, key.sin(), torch.tensor([w], dtype=torch.float64), weight
        assert_exact(run(METHODS[method], *inputs), exact(*inputs), 1e-11)
        inputs = key, key, key.sin(), torch.tensor([w], dtype=torch.float64), weight
        assert_exact(
            run(METHODS[method], *inputs, True),
            exact(*inputs, exclude_self=True),
            1e-11,
            ("out", "key_weight"),
        )
    found = run(METHODS[method], query.float(), key.float(), key.sin().float(), torch.ones(1), weight.float())
    wanted = exact(query.float(), key.float(), key.sin().float(), torch.ones(1), weight.float())
    assert_exact(found, wanted, 3e-6, ("key_weight",))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["key", "value"])
def test_own_key_that_is_not_a_number(place, method):
    x = torch.rand(30, 1, dtype=torch.float64)
    query, key, value, w = x.clone(), x.clone(), x.sin(), torch.tensor([3.0], dtype=torch.float64)
    wanted = run(METHODS[method], query, key, value, w, exclude_self=True)
    (key if place == "key" else value)[4] = math.nan
    found = run(METHODS[method], query, key, value, w, exclude_self=True)
    torch.testing.assert_close(found["out"][4], wanted["out"][4])
    assert found["out"].isnan().sum() == 29
    torch.testing.assert_close(found["query"][4], wanted["query"][4])


# Far rows.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("features", [2, 3, 20])
def test_scores_that_cancel_between_features(features, weighted, dtype):
    """Keys about as far away as each other: in float64 also where a difference of two of them is not a float32."""
    generator = torch.Generator().manual_seed(2)
    sideways = 10 ** (4 * torch.rand(60, generator=generator, dtype=torch.float64) - 3.5)
    key = 0.01 * torch.rand(60, features, generator=generator, dtype=torch.float64)
    key[:, 0] += sideways
    key[:, 1] -= sideways
    query = torch.tensor([[1e5], [-1e6], [1e6]], dtype=torch.float64).expand(-1, features)
    value, weight = sideways.sin()[:, None], torch.rand(60, generator=generator) + 0.5
    w = torch.ones(features, dtype=dtype)
    inputs = query.to(dtype), key.to(dtype), value.to(dtype), w, weight.to(dtype) if weighted else None
    found, right = run(dense, *inputs), exact(*inputs)
    if not weighted:
        del right["key_weight"]
    # Products of 1e6 and 1 in features that cancel are known to their rounding in float64.
    assert_exact(found, right, 3e-6 if dtype == torch.float32 else 1e-8)


def test_kernels_do_not_widen_by_float():
    """What Numba compiles of float(x) leaves a float32 as it is; numba.base.double does not."""
    for path in Path(dense.__file__).parents[1].rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            if not any(word in ast.unparse(d) for d in function.decorator_list for word in ("njit", "entry")):
                continue
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            assert all(ast.unparse(call.func) != "float" for call in calls), (path.name, function.name)


def test_sums_that_are_finite_after_the_last_factor():
    """w w d p g is multiplied with the second w when it has been summed: no part overflows whose sum does not."""
    query, key = column([0.0, 1.0, 0.0], torch.float64), column([1.3e-322, 1e-321], torch.float64)
    value, w = column([1.0, 1e13], torch.float64), column([torch.finfo(torch.float64).max], torch.float64)[0]
    grad_out = column([30.0, 1.0, -20.0], torch.float64)
    one = run(dense, query, key, value, w, grad_out=column([10.0, 0.0, 0.0], torch.float64))["key"][0]
    torch.testing.assert_close(run(dense, query, key, value, w, grad_out=grad_out)["key"][0], one)
    assert one.isfinite().all()


# Rows that nothing depends on, and bandwidths that are not finite.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_without_a_gradient_add_nothing(bad, method):
    query, key, w = torch.rand(30, 1), torch.rand(50, 1), torch.tensor([3.0])
    padded = query.clone()
    padded[5] = bad
    grad_out, grad_lse = torch.rand(30, 1), torch.rand(30)
    grad_out[5], grad_lse[5] = 0, 0
    weight = torch.rand(50)
    for through_lse in (None, grad_lse):
        found, wanted = (
            run(METHODS[method], x, key, key.sin(), w, weight, False, grad_out, through_lse)
            for x in (padded, query)
        )
        assert found["out"][5].isnan() and (found["lse"][5].isnan() or found["lse"][5] == -math.inf)
        for name in NAMES:
            torch.testing.assert_close(found[name], wanted[name], msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bandwidths_that_are_not_finite(bad, method):
    x = torch.rand(40, 1)
    found = run(METHODS[method], x, x, x.sin(), torch.tensor([bad]))
    assert found["out"].isnan().all() and found["lse"].isnan().all()
    assert all(found[name].isnan().all() for name in ("query", "key", "value", "w"))


# Outliers, far queries, coincident and extreme numbers.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("outlier", [1e9, 1e16, 1e20, -3e38])
def test_an_outlying_key_leaves_the_others_alone(outlier, method):
    for dtype in DTYPES:
        for features in (1,) if method == "fgt" else (1, 2):
            query = torch.rand(20, features, dtype=dtype)
            key = torch.rand(60, features, dtype=dtype)
            key[7] = outlier
            inputs = query, key, torch.rand(60, 1, dtype=dtype), torch.tensor([2.0], dtype=dtype)
            assert_exact(run(METHODS[method], *inputs), exact(*inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_far_queries_and_gaps(dtype, method):
    key = torch.linspace(0, 5, 1001, dtype=dtype)[:, None]
    key = torch.cat([key, key + 1e4, torch.tensor([[1e7]], dtype=dtype)])
    query = column([1e4 / 2, 1e4 / 2 + 1, 1e6, -1e4, 1e8, 3e12, 5e6 + 5000], dtype)
    inputs = query, key, key.sin(), torch.tensor([40.0], dtype=dtype)
    assert_exact(run(METHODS[method], *inputs), exact(*inputs), 5 * TOLERANCE[dtype])


@pytest.mark.parametrize("method", METHODS)
def test_coincident_keys_at_huge_coordinates(method):
    value = torch.rand(3000, 1, dtype=torch.float64)
    for dtype, at, below in ((torch.float64, 1.7e18, 1e12), (torch.float32, 1.7e9, 3.3e8)):
        key = torch.full((3000, 1), at, dtype=dtype)
        found = run(METHODS[method], key[:5] - below, key, value.to(dtype), torch.tensor([1e-6], dtype=dtype))
        torch.testing.assert_close(found["out"], value.to(dtype).mean().expand(5, 1), rtol=1e-6, atol=0)
        torch.testing.assert_close(found["value"], torch.full((3000, 1), 5 / 3000, dtype=dtype))


@pytest.mark.parametrize("method", METHODS)
def test_every_row_reaches_its_key_at_a_huge_bandwidth(method):
    x = torch.arange(3000.0)[:, None]
    found = run(METHODS[method], x, x, x.cos(), torch.tensor([1e15]))
    assert torch.equal(found["value"], torch.ones(3000, 1)) and torch.equal(found["out"], x.cos())
    found = run(METHODS[method], x, x, x.cos(), torch.tensor([1e15]), exclude_self=True)
    wanted = torch.ones(3000, 1)
    wanted[0], wanted[1], wanted[-2], wanted[-1] = 0.5, 1.5, 1.5, 0.5
    torch.testing.assert_close(found["value"], wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-322, 1e-310, 1e-200, 1e200, 1e306])
def test_tiny_and_huge_coordinates(scale, method):
    base = torch.arange(1.0, 17.0, dtype=torch.float64)[:, None]
    key, query = base * scale, (base + 0.25) * scale
    w = torch.tensor([min(1 / scale, 1e308) if scale > 1e-309 else 1.0], dtype=torch.float64)
    inputs = query, key, base.sin(), w
    assert_exact(run(METHODS[method], *inputs), exact(*inputs), 1e-11)


def test_values_of_another_cluster_drown_none():
    """Values of size 1e15 in one cluster; those of size 1 in another keep their digits, at any share of the keys."""
    for share in (20, 600, 1180):
        key = torch.rand(1200, 1, dtype=torch.float64) * 5
        key[:share] += 60
        value = 0.055 + 0.01 * key.sin()
        value[share:] = -1e15
        query = torch.rand(60, 1, dtype=torch.float64) * 5 + 60
        inputs = query, key, value, torch.tensor([3.0], dtype=torch.float64)
        for dtype in DTYPES:
            inputs = tuple(x.to(dtype) for x in inputs)
            for module in METHODS.values():
                assert_exact(run(module, *inputs), exact(*inputs), 10 * TOLERANCE[dtype], ("out", "query"))


def test_products_that_overflow_beside_a_term_of_zero():
    """Gradients and values whose product is beyond float32, and keys too far to count."""
    query, key = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [1.0, 0.5], [100.0, 3.0]])
    inputs = query, key, torch.tensor([[1.0], [2e17], [-3e17]]), torch.ones(1)
    grad_out = torch.tensor([[1e15], [3e17]])
    found = run(dense, *inputs, None, False, grad_out)
    assert_exact(found, exact(*inputs, grad_out=grad_out), 1e-5)


# Arithmetic.


def test_equal_scores_weigh_exactly_one():
    for dtype in DTYPES:
        one = torch.ones(1, 1, dtype=dtype)
        for module in METHODS.values():
            assert module.forward(one, one, one, one[0], None, False, False, False)[1].item() == 0


@pytest.mark.parametrize("features", [64, 256, 1000, 4096])
def test_many_features_in_float32(features):
    """Against twice the error of the textbook's two lines in float32, at scores of about 20 to 100."""
    for w in (1.0, 5.0):
        generator = torch.Generator().manual_seed(features)
        draw = {"generator": generator, "dtype": torch.float32}
        query, key = (
            torch.randn(12, features, **draw) / features**0.5,
            torch.randn(90, features, **draw) / features**0.5,
        )
        query = query + 3 * key[:12]
        value = 2 + torch.randn(90, 2, **draw)
        inputs, grad_out = (query, key, value, torch.tensor([w])), torch.randn(12, 2, **draw)
        found = run(dense, *inputs, None, False, grad_out)
        leaves = [x.clone().requires_grad_() for x in inputs]
        textbook = (
            torch.softmax(-(((leaves[0][:, None] - leaves[1]) * leaves[3]) ** 2).sum(-1) / 2, 1) @ leaves[2]
        )
        gradients = torch.autograd.grad(textbook, leaves, grad_out)
        wanted = exact(*inputs, grad_out=grad_out)
        for name, baseline in zip(("out", *NAMES), (textbook.detach(), *gradients), strict=False):
            exactly, scale = (part.reshape(baseline.shape) for part in wanted[name])
            error = np.abs(found[name].numpy() - exactly)
            budget = 2 * np.abs(baseline.numpy() - exactly).max() + 2.0**-21 * scale + 1e-30 * scale.max()
            assert (error <= budget).all(), f"{name}: {float((error / budget).max()):.3g}"


# The cache on disk.


def test_kernels_are_loaded_until_any_source_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def loaded() -> bool:
        kernel = base.entry(boxes.cut_points.py_func)
        assert kernel(np.arange(3.0), 1.0, np.empty(3, np.int64), np.empty(4, np.int64)) == 3
        return bool(kernel.stats.cache_hits)

    assert [loaded(), loaded()] == [False, True]
    monkeypatch.setattr(base, "DIGEST", "of a change in another file")
    assert [loaded(), loaded()] == [False, True]


def test_kernels_run_where_nothing_can_be_cached(monkeypatch):
    """No folder can be written: the kernels compute, and one warning says why each process compiles."""

    def refuse(self):
        raise OSError("read-only file system")

    for locator in numba.core.caching.CacheImpl._locator_classes:
        monkeypatch.setattr(locator, "ensure_cache_path", refuse)
    monkeypatch.setattr(base, "_SAID", [])
    with pytest.warns(UserWarning, match="cannot be cached on disk") as said:
        kernels = [base.entry(boxes.cut_points.py_func) for _ in range(2)]
    assert len(said) == 1
    for kernel in kernels:
        assert kernel(np.arange(3.0), 1.0, np.empty(3, np.int64), np.empty(4, np.int64)) == 3


@pytest.mark.parametrize("features", [1, 2])
def test_gradients_through_lse_far_from_many_keys(features):
    """They are those of the distance, not of so many shares of it."""
    query = torch.full((1, features), 1e3, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.full((1003, features), 0.3, dtype=torch.float64),
        torch.ones(1003, 1, dtype=torch.float64),
    )
    w = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    _, lse = nwfast.nadaraya_watson(query, key, value, w, backend="numba", method="dense", return_lse=True)
    by_query, by_w = torch.autograd.grad(lse.sum(), (query, w))
    distance = (query - key[:1]).detach()
    torch.testing.assert_close(by_query, -(w.detach() ** 2) * distance, rtol=1e-15, atol=0)
    torch.testing.assert_close(by_w, -w.detach() * distance.square().sum(), rtol=1e-15, atol=0)


def test_without_queries_nothing_unwritten_is_read():
    """Gradients of keys are zeros even where fresh memory holds numbers whose squares overflow."""
    code = """
import torch, nwfast
for features, channels in ((1, 1), (3, 4), (1, 2), (2, 1)):
    inputs = [torch.rand(size, dtype=torch.float64).requires_grad_()
              for size in ((2, 0, features), (2, 7, features), (2, 7, channels), (features,), (2, 7))]
    *data, weight = inputs
    out, lse = nwfast.nadaraya_watson(*data, key_weight=weight, backend="numba", return_lse=True)
    for gradient in torch.autograd.grad(out.sum() + lse.sum(), inputs):
        assert not gradient.any(), gradient
"""
    # The C library fills what it hands out with 0x7f.
    environment = os.environ | {"MALLOC_PERTURB_": "128", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
