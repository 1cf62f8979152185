"""What the tests of all backends leave out: the float32 kernels of one feature and channel, which need many pairs.

Run by test_emulated.py with the plugin beside this file.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from conftest import every_other
from op.edges.test_extremes import assert_relative
from op.edges.test_extremes import exact as exact_row
from op.test_functional import call, check, make
from oracle import textbook

SHAPES = {
    "plain": ((523,), (1219,), (1219,), (), None, False),
    "few queries": ((33,), (8200,), (8200,), (), None, False),
    "leave-one-out, weights": ((521,), (521,), (521,), (1,), (521,), True),
    "batch, bandwidths, shared keys": ((2, 515, 1), (1, 517, 1), (2, 517, 1), (2, 1), None, False),
}


@every_other("shape, order", tuple(SHAPES), ("sorted", "unsorted"))
def test_float32_sums(backend, shape, order, monkeypatch):
    """Sorted with as many parts of the keys as there may be, unsorted in one part."""
    monkeypatch.setenv("NWFAST_EMULATED_MULTIPROCESSORS", "4" if order == "sorted" else "1")
    *shapes, exclude_self = SHAPES[shape]
    inputs = make(shapes, torch.float32, 30.0)
    if order == "sorted" and len(shapes[0]) == 1:
        inputs[0], inputs[1] = inputs[0].sort().values, inputs[1].sort().values
    check(inputs, backend, exclude_self)


@pytest.mark.parametrize("w", [0.0, 0.5, 3000.0, 1e6])
def test_bandwidths(backend, w):
    """Average pooling, wide, narrow, and so narrow that most rows go to the kernels in double."""
    query, key, value, _, _ = make(((523,), (1219,), (1219,), (), None), torch.float32)
    for order in (slice(None), key.argsort()):
        x, weight = query.clone().requires_grad_(), torch.tensor(w, requires_grad=True)
        out = call([x, key[order], value[order], weight, None], backend)
        slope_w, slope_q = torch.autograd.grad(out.sum(), (weight, x))
        right = exact_row(query, key, value, w)
        scale = value.abs().max()
        assert_relative(out, right[0], 2e-6 + 1e-7 * w, scale, "out")
        assert_relative(slope_q, right[3], 1e-5 + 1e-7 * w, scale * w + right[3].abs().max(), "slope in q")
        if w:
            size = scale / w * len(query) + right[2].abs().sum()
            assert_relative(slope_w, right[2].sum(), 1e-5, size, "slope in w")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(backend, dtype):
    check(make(((523,), (531,), (531,), (), (531,)), dtype, 20.0), backend)


def test_far_and_bad_rows_among_good_ones(backend):
    """Each such row is computed alone; the others' bits do not change."""
    query, key, value, w, _ = make(((600,), (700,), (700,), (), None), torch.float32, 50.0)
    fine, fine_lse = call([query, key, value, w, None], backend, return_lse=True)
    broken = query.clone()
    broken[3], broken[100], broken[599], broken[77] = torch.nan, 1e4, -30.0, torch.inf
    out, lse = call([broken, key, value, w, None], backend, return_lse=True)
    others = torch.ones(600, dtype=torch.bool)
    others[[3, 100, 599, 77]] = False
    assert torch.equal(out[others], fine[others])
    assert torch.equal(lse[others], fine_lse[others])
    assert out[3].isnan()
    assert out[77].isnan()
    right = textbook(*(x.double() for x in (broken[[100, 599]], key, value, w)))[0]
    torch.testing.assert_close(out[[100, 599]].double(), right, rtol=1e-6, atol=1e-6)
    check([torch.cat([query, torch.tensor([3.0, -2.0])]), key, value, w, None], backend, with_gradients=True)


@pytest.mark.parametrize("place", [0, 350, 699])
def test_keys_and_values_that_are_not_finite(backend, place):
    query, key, value, w, _ = make(((600,), (700,), (700,), (), None), torch.float32, 50.0)
    key = key.sort().values
    broken = key.clone()
    broken[place] = torch.nan
    assert call([query, broken, value, w, None], backend).isnan().all()
    broken = value.clone()
    broken[place] = torch.nan
    assert call([query, key, broken, w, None], backend).isnan().all()


def test_values_far_from_zero(backend):
    """Constants come out exactly, and what varies about them keeps its digits."""
    query, key, value, w, _ = make(((600,), (700,), (700,), (), None), torch.float32, 50.0)
    assert (call([query, key, torch.full_like(value, 1e3), w, None], backend) == 1e3).all()
    inputs = [query, key, (1000 + value / 8).float(), w, None]
    slope = torch.autograd.grad(call([query.requires_grad_(), *inputs[1:]], backend).sum(), query)[0]
    right = exact_row(query.detach(), key, inputs[2], float(w))[3]
    assert_relative(slope, right, 1e-5, right.abs().max())


def test_the_same_bits_at_every_run(backend):
    inputs = make(((600,), (2000,), (2000,), (), (2000,)), torch.float32, 50.0)
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = call(leaves, backend)
        runs.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


TILED = {
    "features": ((131, 3), (203, 3), (203, 5), (3,), None, False),
    "one channel": ((131, 2), (203, 2), (203, 1), (), (203,), False),
    "many channels": ((131, 3), (203, 3), (203, 64), (), None, False),
    "more channels than a chunk": ((131, 2), (203, 2), (203, 75), (2,), (203,), False),
    "more features than a chunk": ((131, 19), (203, 19), (203, 12), (), None, False),
    "leave-one-out": ((203, 3), (203, 3), (203, 9), (3,), (203,), True),
    "batch": ((2, 3, 131, 2), (1, 3, 203, 2), (2, 1, 203, 11), (3, 2), (1, 3, 203), False),
}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in TILED),
        *((shape, torch.float16) for shape in TILED if shape != "batch"),
        ("more channels than a chunk", torch.bfloat16),
    ],
    ids=str,
)
def test_tiles(backend, shape, dtype):
    *shapes, exclude_self = TILED[shape]
    inputs = make(shapes, dtype, 6.0 / shapes[0][-1] ** 0.5)
    check(inputs, backend, exclude_self, with_gradients=dtype == torch.float32)


def test_tiles_in_parts(backend, monkeypatch):
    """Keys of which a part holds none that counts, merged in order."""
    monkeypatch.setenv("NWFAST_EMULATED_MULTIPROCESSORS", "8")
    for dtype in (torch.float32, torch.float16):
        query, key, value, w, _ = make(((70, 2), (2100, 2), (2100, 10), (), None), dtype)
        weight = torch.ones(2100, dtype=dtype)
        weight[300:1700] = 0
        check([query, key, value, w, weight], backend, with_gradients=False)


def test_tiles_leave_far_and_bad_rows_to_double(backend):
    query, key, value, w, _ = make(((131, 2), (203, 2), (203, 9), (), None), torch.float32)
    fine = call([query, key, value, w, None], backend)
    broken = query.clone()
    broken[3, 1], broken[100], broken[77] = torch.nan, 1e4, torch.inf
    out = call([broken, key, value, w, None], backend)
    others = torch.ones(131, dtype=torch.bool)
    others[[3, 100, 77]] = False
    assert torch.equal(out[others], fine[others])
    assert out[[3, 77]].isnan().all()
    state = torch.ops.nwfast.cuda_forward(broken, key, value, w[None], None, False, False, False)[2]
    assert (state[:, 0] != 0).nonzero().tolist() == [[100]]  # relative to the nearest key: computed in double
    right = textbook(broken[100:101].double(), key.double(), value.double(), w.double())[0]
    torch.testing.assert_close(out[100:101].double(), right, rtol=1e-6, atol=1e-6)


def test_far_rows_count_once_in_tiled_gradients(backend):
    inputs = make(((131, 2), (203, 2), (203, 9), (), (203,)), torch.float32)
    inputs[0][[3, 100]] = torch.tensor([[8.0, -9.0], [-10.0, 3.0]])
    query, key, value, w, key_weight = inputs
    state = torch.ops.nwfast.cuda_forward(query, key, value, w[None], key_weight, False, False, False)[2]
    assert (state[:, 0] != 0).nonzero()[:, 0].tolist() == [3, 100]
    check(inputs, backend)


@pytest.mark.parametrize("weights", ["none", "with zeros", "of sizes that float32 does not hold"])
@pytest.mark.parametrize("w", [0.0, 1.0, 30.0, 1000.0])
def test_tiled_gradients_at_any_bandwidth(backend, w, weights):
    """Against the kernels in double; some queries lie on keys, and at 1000 rows have all their weight on one key."""
    query, key, value, _, weight = make(((131, 2), (203, 2), (203, 9), (), (203,)), torch.float32)
    query[:20] = key[:20]
    weight[::7] = 0 if weights == "with zeros" else 1e-25
    grad, grad_lse = torch.randn(131, 9), torch.randn(131)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [query, key, value, torch.tensor(w), None if weights == "none" else weight]
        leaves = [x if x is None else x.to(dtype).requires_grad_() for x in inputs]
        outputs = call(leaves, backend, return_lse=True)
        present = [x for x in leaves if x is not None]
        results.append(torch.autograd.grad(outputs, present, [grad.to(dtype), grad_lse.to(dtype)]))
    for leaf, found, right in zip(present, *results, strict=True):
        counts = ...
        if leaf.shape == (203,) and w == 1000:  # else no float32 holds the slope
            counts = weight > 0
        assert_relative(found[counts], right[counts], 2e-5 + 4e-6 * w)
