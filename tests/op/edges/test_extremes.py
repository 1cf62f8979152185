"""Data that breaks a naive softmax: far queries, overflowing scores, duplicates, gaps, NaN; and memory at large N.

One file, since nearly all its tests are a few lines of unkind data before the same comparisons, on every backend: with
the textbook, or with the exact results and their bounds.
"""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import every_other
from exact import BOXES, assert_accurate, solve
from oracle import ROUNDING, gradients, textbook

import nwfast

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def exact(query, key, value, w):
    """(out, lse, d out / d w, d out / d query) of one-feature data in long double, relative to the nearest key."""
    x, u, v = (tensor.double().cpu().numpy().astype(np.longdouble)[:, None] for tensor in (query, key, value))
    w = np.longdouble(float(torch.as_tensor(w).detach()))
    distance = x - u.T
    score = -((distance * w) ** 2) / 2
    top = score.max(1, keepdims=True)
    p = np.exp(score - top)
    total = p.sum(1, keepdims=True)
    p = p / total
    out = p @ v
    pull = p * (v.T - out)
    nearest = np.take_along_axis(
        distance, score.argmax(1)[:, None], 1
    )  # sum_j pull_ij = 0: any centre will do
    slope_w = -w * (pull * (distance - nearest) * (distance + nearest)).sum(1)
    slope_q = -(w**2) * (pull * (distance - nearest)).sum(1)
    lse = (top + np.log(total))[:, 0]
    results = out[:, 0], lse, slope_w, slope_q
    return [torch.from_numpy(array.astype(np.float64)).to(query.device) for array in results]


def assert_relative(actual, expected, tolerance, scale=None, what=""):
    scale = expected.abs().max() if scale is None else scale
    error = (actual.detach().double() - expected).abs().max()
    assert error <= tolerance * scale, f"{what}: error {error:.3g}, allowed {tolerance * scale:.3g}"


def data(kind, dtype):
    generator = torch.Generator().manual_seed(3)

    def rand(n):
        return torch.rand(n, generator=generator, dtype=torch.float64)

    key = {
        "uniform": lambda: rand(700),
        "clusters and gaps": lambda: torch.cat(
            [rand(300) * 1e-3, 0.4 + rand(300) * 1e-4, 0.9 + rand(100) * 0.1]
        ),
        "duplicates": lambda: (rand(700) * 20).round() / 20,
        "isolated": lambda: torch.cat([rand(600) * 1e-2, torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64)]),
        "all the same": lambda: torch.full((50,), 0.25, dtype=torch.float64),
    }[kind]().to(dtype)
    query = torch.cat([rand(100) * 1.2 - 0.1, key[::9].double(), key[::9].double() + 1e-4]).to(dtype)
    return query, key, torch.randn(len(key), generator=generator, dtype=torch.float64).to(dtype)


@every_other(
    "kind, order, dtype",
    ("uniform", "clusters and gaps", "duplicates", "isolated", "all the same"),
    ("sorted", "unsorted"),
    (torch.float32, torch.float64),
)
def test_any_bandwidth(backend, kind, order, dtype):
    """out, lse and both tangents for w from 0 over uniform weights to one-hot ones."""
    query, key, value = data(kind, dtype)
    if order == "sorted":
        key, places = key.sort()
        query, value = query.sort().values, value[places]
    eps = ROUNDING[dtype]
    for w in (0.0, 1e-30, 1e-3, 1.0, 10.0, 300.0, 1e4, 1e5, 1e6):
        weight = torch.tensor(w, dtype=dtype, requires_grad=True)
        x = query.clone().requires_grad_()
        out = nwfast.nadaraya_watson(x, key, value, weight, backend=backend)
        lse = nwfast.nadaraya_watson(query, key, value, w, backend=backend, return_lse=True)[1]
        slope_w, slope_q = torch.autograd.grad(out.sum(), (weight, x))
        right = exact(query, key, value, weight)
        scale = value.abs().max()
        # A score carries the rounding of (q - k) w, relative to itself: what matters lies within 10 bandwidths of
        # the nearest key, whose own distance adds where it is large.
        nearest = float(w * (query[:, None] - key).abs().amin(1).max())
        loose = eps * (64 + 16 * nearest)
        assert_relative(out, right[0], loose, scale, f"out, w = {w}")
        assert_relative(lse, right[1], 16 * eps, 1 + right[1].abs().max(), f"lse, w = {w}")
        assert_relative(
            slope_q, right[3], loose * 4, scale * w + right[3].abs().max(), f"slope in q, w = {w}"
        )
        if w:
            size = scale * (1 + nearest) / w * len(query)
            assert_relative(
                slope_w, right[2].sum(), loose * 4, size + right[2].abs().sum(), f"slope in w, w = {w}"
            )


@DTYPES
def test_w_of_zero_is_the_mean_exactly(backend, dtype):
    value = torch.randint(-8, 9, (64,)).to(dtype)
    x = torch.rand(64, dtype=dtype)
    for w in (0.0, torch.tensor([0.0], dtype=dtype), torch.tensor(-0.0, dtype=dtype)):
        out, lse = nwfast.nadaraya_watson(x, x, value, w, backend=backend, return_lse=True)
        mean = torch.full_like(out, value.double().mean().item())
        torch.testing.assert_close(out, mean, rtol=0, atol=ROUNDING[dtype] * float(value.abs().max()))
        torch.testing.assert_close(lse, torch.full_like(lse, 64).log())
    w = torch.zeros(1, dtype=dtype, requires_grad=True)
    q, k = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = nwfast.nadaraya_watson(q, k, value, w, backend=backend)
    for gradient in torch.autograd.grad(out.square().sum(), (w, q, k)):
        assert not gradient.any()


@DTYPES
@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("w", [1e8, 1e19, 1e30])
def test_overflowing_scores_give_the_nearest_value(backend, w, features, dtype):
    """Scores beyond float32: one key holds all weight, gradients vanish, nothing is NaN."""
    key = (torch.arange(60.0)[:, None] * torch.tensor([1.0, 0.5])[:features]).to(dtype)
    query = key[torch.randperm(60)[:40]] + torch.tensor([0.25, 0.125], dtype=dtype)[:features]
    value = torch.randn(60, 2, dtype=dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value, torch.tensor(w, dtype=dtype))]
    out, lse = nwfast.nadaraya_watson(*leaves, backend=backend, return_lse=True)
    nearest = torch.cdist(query.double(), key.double()).argmin(1)
    assert not lse.isnan().any()
    # The nearest value, up to the rounding of its product with a weight of 1.
    rounding = {"rtol": 0, "atol": 2 * ROUNDING[dtype] * float(value.abs().max())}
    torch.testing.assert_close(out, value[nearest], **rounding)
    far = torch.cat([query, query + 1e6])
    assert torch.equal(
        nwfast.nadaraya_watson(far, key, value, w, backend=backend)[40:], value[-1:].expand(40, 2)
    )
    out = nwfast.nadaraya_watson(*leaves, backend=backend)
    for gradient, zero in zip(torch.autograd.grad(out.sum(), leaves), (1, 1, 0, 1), strict=True):
        assert gradient.isfinite().all()
        assert not (zero and gradient.any())


@DTYPES
@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("half", [1e20, 1e30, 1e38])
def test_ties_across_a_gap(backend, half, features, dtype):
    """Of two keys side by side one is as far as the key across the gap, and the other nearer or farther.

    Scores relative to the key across tell the two apart, although its distance from them is much longer than theirs.
    """
    query = torch.zeros(1, features, dtype=dtype)
    query[0, 0] = -half
    for beside, right in ((0.6, 0.5), (-0.6, 5.0)):
        key = torch.zeros(3, features, dtype=dtype)
        key[1, 0], key[2, 0] = beside, 2 * query[0, 0]
        value = torch.tensor([[1.0], [5.0], [0.0]], dtype=dtype)
        for method in (
            ("dense", "fgt") if features <= nwfast.backends.FGT_FEATURES.get(backend, 0) else ("dense",)
        ):
            for order in itertools.permutations(range(3)):
                inputs = query, key[[*order]], value[[*order]], 1.0
                out = nwfast.nadaraya_watson(*inputs, backend=backend, method=method)
                assert out == right, (method, order, beside)


@DTYPES
def test_ties_share(backend, dtype):
    key = torch.tensor([-1.0, 1.0, 1.0, 3.0], dtype=dtype)
    value = torch.tensor([1.0, 2.0, 6.0, 9.0], dtype=dtype)
    for w in (100.0, 1e6, 1e30):
        out = nwfast.nadaraya_watson(
            torch.tensor([1.0, 0.0, 2.0], dtype=dtype), key, value, w, backend=backend
        )
        torch.testing.assert_close(out, torch.tensor([4.0, 3.0, 17 / 3], dtype=dtype))


@DTYPES
def test_far_queries(backend, dtype):
    """30 000 bandwidths from the data the weights are still those of the last few keys, and so are the derivatives."""
    spacing = 2.0**-12
    key = torch.arange(400, dtype=torch.float64) * spacing  # coordinates and distances are exact in float32
    query = torch.tensor([-30000.0, 30000.0, -3000.0, 500.0, 40.0], dtype=torch.float64)
    if dtype == torch.float32:
        query = query / 16
    value = torch.randn(400, dtype=torch.float64)
    key, query, value = key.to(dtype), query.to(dtype), value.to(dtype)
    w = torch.ones((), dtype=dtype, requires_grad=True)
    x = query.clone().requires_grad_()
    out = nwfast.nadaraya_watson(x, key, value, w, backend=backend)
    right = exact(query, key, value, 1.0)
    slope_w, slope_q = torch.autograd.grad(out.sum(), (w, x))
    eps = ROUNDING[dtype]
    assert len(out.unique()) > 1.5
    assert_relative(out, right[0], 256 * eps, value.abs().max(), "out")
    assert_relative(slope_q, right[3], 1024 * eps, right[3].abs().max(), "slope in q")
    assert_relative(slope_w, right[2].sum(), 1024 * eps, right[2].abs().sum(), "slope in w")
    lse = nwfast.nadaraya_watson(query, key, value, 1.0, backend=backend, return_lse=True)[1]
    torch.testing.assert_close(lse.double(), right[1], rtol=4 * eps, atol=0)


@pytest.mark.parametrize("features", [1, 2])
def test_offsets(backend, features):
    """Keys near 1e6 with spacing 1e-3: as accurate as the same keys near 0, up to the rounding of the keys."""
    generator = torch.Generator().manual_seed(1)
    key = 1e6 + torch.arange(500, dtype=torch.float64)[:, None].expand(500, features) * 1e-3
    query = 1e6 + torch.rand(80, features, generator=generator, dtype=torch.float64) * 0.5
    value = torch.randn(500, 1, generator=generator, dtype=torch.float64)
    leaves = [
        x.clone().requires_grad_() for x in (query, key, value, torch.tensor(700.0, dtype=torch.float64))
    ]
    grad = torch.randn(80, 1, dtype=torch.float64)
    out = nwfast.nadaraya_watson(*leaves, backend=backend)
    near = [query - 1e6, key - 1e6, value, leaves[3].detach(), None]  # exact
    torch.testing.assert_close(out, textbook(*near)[0], rtol=0, atol=1e-11)
    scales = [right.abs().max() for right in gradients(near, grad)[:3]]
    # The sum over rows that is the gradient of w may cancel.
    scales.append(sum(gradients(near, grad * row[:, None])[3].abs() for row in torch.eye(80).double()))
    results = torch.autograd.grad(out, leaves, grad)
    for found, right, scale in zip(results, gradients(near, grad), scales, strict=False):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-11 * float(scale))


@pytest.mark.parametrize("n", [5, 3000])
def test_nan_and_infinity(backend, n):
    key, value = torch.rand(n).sort().values, torch.rand(n)

    def run(query=None, key=key, value=value, w=2000.0, **options):
        query = torch.linspace(0, 1, 40) if query is None else query
        return nwfast.nadaraya_watson(query, key, value, w, backend=backend, return_lse=True, **options)

    fine, fine_lse = run()
    for bad in (torch.nan, torch.inf, -torch.inf):
        query = torch.linspace(0, 1, 40)
        query[7] = bad
        out, lse = run(query)
        others = torch.arange(40) != 7
        assert out[7].isnan()
        torch.testing.assert_close(out[others], fine[others])
        torch.testing.assert_close(lse[others], fine_lse[others])
    for place in (0, n // 2, n - 1):
        broken = key.clone()
        broken[place] = torch.nan
        assert run(key=broken)[0].isnan().all()
        assert run(key=broken, w=0.5)[0].isnan().all()
        broken = value.clone()
        broken[place] = torch.nan
        assert run(value=broken, w=0.5)[0].isnan().all()
        reference = nwfast.nadaraya_watson(torch.linspace(0, 1, 40), key, broken, 2000.0, backend="reference")
        assert torch.equal(run(value=broken)[0].isnan(), reference.isnan())
        weight = torch.ones(n)
        weight[place] = torch.nan
        assert run(key_weight=weight)[0].isnan().all()
        weight[place] = -1.0
        assert run(key_weight=weight)[0].isnan().all()
    away = torch.cat([key, torch.tensor([torch.inf])])
    out, lse = run(key=away, value=torch.cat([value, torch.tensor([5.0])]))
    torch.testing.assert_close(out, fine)
    torch.testing.assert_close(lse, fine_lse)


@DTYPES
def test_a_key_of_weight_zero_counts_for_nothing(backend, dtype):
    """Wherever it lies, whatever its value: and its gradient is right, although log 0 has none."""
    key = torch.cat([torch.rand(40, dtype=dtype), torch.tensor([5.0, 0.5, -1e4], dtype=dtype)])
    value = torch.cat([torch.randn(40, dtype=dtype), torch.tensor([1e4, 1e4, -1e4], dtype=dtype)])
    query = torch.cat([torch.rand(30, dtype=dtype), torch.tensor([4.9, -1e4], dtype=dtype)])
    weight = torch.ones(43, dtype=dtype)
    weight[40:] = 0
    for w in (0.0, 2.0, 100.0):
        out, lse = nwfast.nadaraya_watson(
            query, key, value, w, key_weight=weight, backend=backend, return_lse=True
        )
        kept, kept_lse = nwfast.nadaraya_watson(
            query, key[:40], value[:40], w, backend=backend, return_lse=True
        )
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(out, kept, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse, kept_lse, rtol=tolerance, atol=tolerance)
    leaf = weight.clone().requires_grad_()
    query = query[:30]
    nwfast.nadaraya_watson(query, key, value, 2.0, key_weight=leaf, backend=backend).sum().backward()
    p = torch.exp(-((query.double()[:, None] - key.double()) ** 2) * 2)
    total = p[:, :40].sum(1, keepdim=True)
    out = p[:, :40] @ value[:40].double() / total[:, 0]
    right = (p / total * (value.double() - out[:, None])).sum(0)
    torch.testing.assert_close(
        leaf.grad.double(),
        right,
        rtol=1e-4 if dtype == torch.float32 else 1e-11,
        atol=float(right.abs().max() * 1e-6),
    )


@DTYPES
@pytest.mark.parametrize("place", [1e9, 1e30, "largest"])
@pytest.mark.parametrize("method", ["dense", "fgt"])
def test_ties_far_from_the_origin(native, method, place, dtype):
    """Keys at one place share, wherever they end in memory, and however far it is: the window must hold all of them."""
    place = torch.finfo(dtype).max / 4 if place == "largest" else place
    for near, ties in ((8, 9), (0, 33), (15, 18), (300, 40)):
        key = torch.cat([torch.linspace(0, 1, near, dtype=dtype), torch.full((ties,), place, dtype=dtype)])
        value = torch.arange(near + ties).to(dtype)
        query = torch.tensor([0.0] * 15 + [place], dtype=dtype)
        out = nwfast.nadaraya_watson(query, key, value, 1.0, backend="native", method=method)
        expected = value[near:].mean()
        torch.testing.assert_close(out[-1], expected, rtol=16 * ROUNDING[dtype], atol=0)


@DTYPES
@pytest.mark.parametrize("features", [1, 2])
def test_average_pooling_of_huge_coordinates(native, features, dtype):
    """Its derivatives by w and by coordinates are 0: no product of 0 and an overflow."""
    generator = torch.Generator().manual_seed(5)
    size = torch.finfo(dtype).max / 8
    query, key = (size * torch.randn(n, features, generator=generator, dtype=dtype) / 4 for n in (3, 20))
    value = torch.randn(20, generator=generator, dtype=dtype)
    leaves = [
        query.requires_grad_(),
        key.requires_grad_(),
        torch.tensor(0.0, dtype=dtype, requires_grad=True),
    ]
    out, lse = nwfast.nadaraya_watson(
        *leaves[:2], value, leaves[2], return_lse=True, backend="native", method="dense"
    )
    torch.testing.assert_close(out, value.mean().expand(3))
    for gradient in torch.autograd.grad(out.sum() + lse.sum(), leaves):
        assert not gradient.any()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_memory_of_a_large_forward_pass(native):
    """200 000 queries and keys in a fresh process: at most 100 MB over what importing took (the matrix has 160 GB)."""
    code = """
import torch, nwfast

def status(name):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again at what is in use
n = 200_000
x = torch.rand(n).sort().values
out = nwfast.nadaraya_watson(x, x, x.sin(), 20000.0, backend="native")
assert torch.allclose(out, x.sin(), atol=1e-3)
peak = status("VmHWM") - before
assert 2e6 < peak < 100e6, peak
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["dense", "fgt"])
@pytest.mark.parametrize(("keys", "extent"), [(40, 100), (700, 10_000)])
def test_tiny_weights_of_tiny_values(native, method, keys, extent):
    """Their products with each other and with small scores are below what float32 holds."""
    key = torch.rand(keys) * extent
    query = key + torch.randn(keys) * 10 ** -(6 * torch.rand(keys))
    for size in (1e-20, 1e-30):
        value, weight = size * torch.randn(keys), 10 ** (-12 * torch.rand(keys))
        tensors = query, key, value, torch.tensor(1.0), weight
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        grad = torch.randn(keys)
        out = nwfast.nadaraya_watson(*leaves[:4], key_weight=leaves[4], method=method, backend="native")
        gradients = torch.autograd.grad(out, leaves, grad)
        right = solve(*tensors, grad, boxes=BOXES if method == "fgt" else 0.0)
        names = ("out", "query", "key", "value", "w", "key_weight")
        for name, found in zip(names, (out, *gradients), strict=True):
            assert_accurate(found.detach(), right[name], name)


@DTYPES
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("own", [False, True])
def test_derivatives_that_a_cotangent_brings_back(backend, own, order, dtype):
    """d out / d query and d out / d w are beyond all numbers, the gradients are not; in leave-one-out rows too."""
    large = 1e30 if dtype == torch.float32 else 1e200
    key = torch.tensor([0.0, 1 / large, 3 / large][::order], dtype=dtype)
    value = torch.tensor([large, -large, large / 2], dtype=dtype)
    query = torch.tensor([0.0, 0.4 / large, 2 / large], dtype=dtype)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=dtype) if own else None
    w, grad = torch.tensor(large, dtype=dtype), torch.tensor([0.5, -1.5, 1.0], dtype=dtype) / large
    for method in nwfast.backends.METHODS[backend]:
        leaves = [x.clone().requires_grad_() for x in (query, key, value, w)]
        options = {"key_weight": weight, "exclude_self": own, "method": method, "backend": backend}
        out = nwfast.nadaraya_watson(*leaves, **options)
        boxes = BOXES if method == "fgt" else 0.0
        right = solve(query, key, value, w, weight, grad, exclude_self=own, boxes=boxes)
        names = ("query", "key", "value", "w")
        for wanted in ([0], [3], [0, 1], [0, 1, 2, 3]):
            gradients = torch.autograd.grad(out, [leaves[i] for i in wanted], grad, retain_graph=True)
            for i, found in zip(wanted, gradients, strict=True):
                assert_accurate(found, right[names[i]], f"{method} {names[i]}")


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [(torch.float32, unit) for unit in (1e-34, 1e-24, 1e-12, 1e12, 1e24, 1e33)]
    + [(torch.float64, unit) for unit in (1e-300, 1e-160, 1e160, 1e290)],
    ids=str,
)
@pytest.mark.parametrize(("features", "channels"), [(1, 1), (1, 2), (3, 1)])
def test_coordinates_in_any_unit(backend, features, channels, dtype, unit):
    """Squares of the coordinates are beyond all numbers, or their products with values, but no result is."""
    query, key = ((unit * torch.rand(n, features, dtype=torch.float64)).to(dtype) for n in (20, 30))
    value, weight = 1e3 * torch.rand(30, channels, dtype=dtype), torch.rand(30, dtype=dtype) + 0.1
    inputs = query, key, value, torch.full((features,), 2.0 / unit, dtype=dtype), weight
    grad, grad_lse = torch.randn(20, channels, dtype=dtype), torch.randn(20, dtype=dtype)
    for through_lse in (None, grad_lse):
        leaves = [x.clone().requires_grad_() for x in inputs]
        results = nwfast.nadaraya_watson(
            *leaves[:4], key_weight=leaves[4], return_lse=through_lse is not None, backend=backend
        )
        gradients = torch.autograd.grad(results, leaves, (grad, grad_lse)[: 1 if through_lse is None else 2])
        right = solve(*inputs, grad, through_lse, plain=backend == "reference")
        for name, found in zip(("query", "key", "value", "w", "key_weight"), gradients, strict=True):
            assert_accurate(found, right[name], name)


@pytest.mark.parametrize("w", [3e3, 2.4e9, 1e13])
@pytest.mark.parametrize(("features", "channels"), [(1, 1), (2, 1), (1, 2)])
def test_wide_bandwidths_of_subnormal_coordinates(backend, features, channels, w):
    """w times a coordinate may be subnormal where w squared times it, the gradient of a query, is not."""
    query, key = (2e-321 * torch.rand(n, features, dtype=torch.float64) for n in (5, 7))
    value = torch.randn(7, channels, dtype=torch.float64)
    inputs = query, key, value, torch.full((features,), w, dtype=torch.float64), torch.rand(7).double() + 0.5
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = nwfast.nadaraya_watson(*leaves[:4], key_weight=leaves[4], return_lse=True, backend=backend)
    grads = torch.randn(5, channels, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    right = solve(*inputs, *grads, plain=backend == "reference")
    found = torch.autograd.grad(results, leaves, grads)
    for name, gradient in zip(("query", "key", "value", "w", "key_weight"), found, strict=True):
        assert_accurate(gradient, right[name], name)


# A bandwidth at either end of the dtype, and the unit of coordinates: as far at the other end, or at neither.
ENDS = {
    "largest w": (0.9, 1.0, 0.0),
    "largest w, far queries": (0.9, 1.0, 1e6),
    "largest w of the least coordinates": (0.9, 0.0, 0.0),
    "largest w of the least coordinates, far queries": (0.9, 0.0, 1e4),
    "least w of the largest coordinates": (0.0, 0.9, 0.0),
    "least w of the largest coordinates, queries apart": (0.0, 0.2, 3.0),
}


@DTYPES
@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("features", [1, 2, 3, 6])
def test_bandwidths_at_the_ends_of_the_dtype(backend, features, kind, dtype):
    """Products of coordinates and w, and sums of their squares, are beyond all numbers; which key is nearest is not."""
    limits = torch.finfo(dtype)
    w, unit, far = ENDS[kind]
    w, unit = w * limits.max or 2 * limits.tiny, unit * (1 if unit == 1 else limits.max) or 4 / limits.max
    key = torch.rand(30, features, dtype=torch.float64) * unit
    # Far in every feature, in each by another length and on either side.
    place = far * torch.linspace(1.0, 0.5, features, dtype=torch.float64)
    place[1::2] *= -1
    query = (torch.rand(8, features, dtype=torch.float64) + place) * unit
    query[4:, :-1] = key[:4, :-1]  # of which one feature alone, or none, has a distance
    query, key = query.to(dtype), key.to(dtype)
    value, weight = torch.rand(30, 1, dtype=dtype), torch.rand(30, dtype=dtype) + 0.1
    inputs = query, key, value, torch.full((features,), w, dtype=dtype), weight
    # So small that all gradients are numbers, and none where lse is not.
    grad, grad_lse = 1e-9 * torch.randn(8, 1, dtype=dtype), 1e-9 * torch.rand(8, dtype=dtype)
    beyond = torch.from_numpy(-solve(*inputs, grad)["lse"].value > 0.1 * limits.max)
    grad_lse = torch.where(beyond.to(grad_lse.device), 0.0, grad_lse)
    linear = features <= nwfast.backends.FGT_FEATURES.get(backend, 0)
    for method in ("dense", "fgt") if linear else ("dense",):
        for through_lse in (None, grad_lse):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out, lse = nwfast.nadaraya_watson(
                *leaves[:4], key_weight=leaves[4], return_lse=True, backend=backend, method=method
            )
            cotangents = (grad,) if through_lse is None else (grad, grad_lse)
            gradients = torch.autograd.grad((out, lse)[: len(cotangents)], leaves, cotangents)
            boxes = BOXES if method == "fgt" else 0.0
            right = solve(*inputs, grad, through_lse, plain=backend == "reference", boxes=boxes)
            names = ("out", "lse", "query", "key", "value", "w", "key_weight")
            for name, found in zip(names, (out, lse, *gradients), strict=True):
                assert_accurate(found, right[name], f"{method} {name}")


@DTYPES
@pytest.mark.parametrize("features", [1, 2, 3])
def test_gradients_of_w_up_to_the_largest_number(backend, features, dtype):
    """Of a lone key, and of two of one place: lse is a square of w beyond all numbers, its derivative is a number."""
    most = torch.finfo(dtype).max
    query = torch.ones(1, features, dtype=dtype)
    distance = torch.tensor([0.5, 0.75, 0.125], dtype=dtype)[:features]
    expected = -(distance.double() ** 2)
    for keys in (1, 2):
        key, value = (query - distance).repeat(keys, 1), torch.arange(1.0, keys + 1, dtype=dtype)[:, None]
        for share in (1.0, 0.5, 1e-10):
            w = torch.full((features,), share * most, dtype=dtype, requires_grad=True)
            out, lse = nwfast.nadaraya_watson(
                query, key, value, w, return_lse=True, backend=backend, method="dense"
            )
            assert out.item() == pytest.approx((keys + 1) / 2)
            (gradient,) = torch.autograd.grad(out.sum() + lse.sum(), w)
            torch.testing.assert_close(gradient.double() / most, share * expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("place", "w"), [(2.0**1020, 2.0**1023), (1e300, 1e300), (1e200, 1e250)])
def test_the_nearest_of_keys_beyond_all_scores(backend, place, w):
    query = torch.zeros(1, 2, dtype=torch.float64)
    key = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 1.0]], dtype=torch.float64) * place
    value = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    bandwidth = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    out = nwfast.nadaraya_watson(query, key, value, bandwidth, backend=backend, method="dense")
    assert out.item() == 1
    (gradient,) = torch.autograd.grad(out, bandwidth)
    assert gradient == 0


@DTYPES
@pytest.mark.parametrize(("features", "channels"), [(1, 1), (1, 3), (2, 1)])
def test_coordinates_of_few_digits(backend, features, channels, dtype):
    """Small multiples of the least number: no result loses digits that its inputs have."""
    limits = torch.finfo(dtype)
    least, large = limits.tiny * limits.eps, 0.9 * limits.max
    query, key = (least * torch.randint(300, (n, features)).to(dtype) for n in (20, 30))
    value = torch.randn(30, channels, dtype=dtype)
    w = torch.full((features,), large, dtype=dtype)
    grad, grad_lse = torch.randn(20, channels, dtype=dtype), torch.randn(20, dtype=dtype)
    # Ordinary values leave nothing of the gradient of w, larger ones are beyond all numbers in those of coordinates.
    sizes = (1.0, ("query", "key", "value")), (1e290 if dtype == torch.float64 else 1e25, ("value", "w"))
    linear = features <= nwfast.backends.FGT_FEATURES.get(backend, 0)
    for method in ("dense", "fgt") if linear else ("dense",):
        for (size, names), through_lse in itertools.product(sizes, (None, grad_lse)):
            inputs = {"query": query, "key": key, "value": size * value, "w": w}
            leaves = {name: x.clone().requires_grad_(name in names) for name, x in inputs.items()}
            found = nwfast.nadaraya_watson(**leaves, return_lse=True, backend=backend, method=method)
            cotangents = (grad,) if through_lse is None else (grad, grad_lse)
            wanted = [leaves[name] for name in names]
            gradients = torch.autograd.grad(found[: len(cotangents)], wanted, cotangents)
            boxes = BOXES if method == "fgt" else 0.0
            right = solve(
                *inputs.values(), None, grad, through_lse, plain=backend == "reference", boxes=boxes
            )
            for name, result in zip(("out", "lse", *names), (*found, *gradients), strict=True):
                assert_accurate(result.detach(), right[name], f"{method} {name}")


@DTYPES
@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("share", [2.0**-30, 2.0**-8, 0.9])
def test_weighted_keys_at_the_end_of_the_dtype(backend, share, features, dtype):
    """Rows on keys so far out: weights count once, as anywhere."""
    most = torch.finfo(dtype).max * share
    key = torch.tensor([most, most, -most], dtype=dtype)[:, None].expand(-1, features).contiguous()
    value = torch.tensor([1.0, 4.0, -2.0], dtype=dtype)
    weight = torch.tensor([0.4, 0.1, 0.3], dtype=dtype)
    inputs = [key[:2].clone(), key, value, torch.tensor(1.0, dtype=dtype), weight]
    if features == 1:
        inputs[0], inputs[1] = inputs[0][:, 0], inputs[1][:, 0]
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = nwfast.nadaraya_watson(*leaves[:4], key_weight=leaves[4], backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 1.6), rtol=1e-6, atol=0)
    by_query, _, by_value, by_w, by_weight = torch.autograd.grad(out.sum(), leaves)
    torch.testing.assert_close(by_value, torch.tensor([1.6, 0.4, 0.0], dtype=dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(by_weight, torch.tensor([-2.4, 9.6, 0.0], dtype=dtype), rtol=1e-6, atol=0)
    assert (by_query == 0).all() and (by_w == 0).all()
