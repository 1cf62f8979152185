"""Tests that only Triton's interpreter can run, on CPU tensors: test_triton.py runs this file in a process.

Small sizes, just over a block: the interpreter takes a tenth of a second for a program and walks over every one. It
pretends to 4 multiprocessors, and here loops are cut into parts of at least 64 keys.
"""

import math

import pytest
import torch
from conftest import every_other
from exact import assert_accurate, solve
from op import test_local_linear as local_linear
from op.test_functional import NAMES, check, make
from oracle import gradients, textbook
from unkind import KINDS, unkind

import nwfast
from nwfast.op import by_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def test_the_interpreter_runs():
    assert nwfast.backends.available()["triton"] is True
    assert nwfast.backends.load("triton").OPTIONS


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(nwfast.backends.load("triton.launch"), "LEAST_PART", 64)


SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16

# Shapes of query, key, value, w and key_weight, and exclude_self: each feature in float32 and in float64, dtypes of
# storage where they are read.
FORMS = {
    "tails, float32": ((5,), (75,), (75,), (1,), None, False, SINGLE),
    "tails, float64": ((3,), (75,), (75,), (1,), (75,), False, DOUBLE),
    "leave-one-out, weights": ((66,), (66,), (66,), (), (66,), True, SINGLE),
    "leave-one-out in batches": ((2, 9, 1), (2, 9, 1), (1, 9, 1), (2, 1), None, True, DOUBLE),
    "per-query keys": ((2,), (2, 29), (2, 29), (1,), (29,), False, SINGLE),
    "per-query keys, bandwidths": ((2,), (2, 29), (2, 29), (2, 1), None, False, DOUBLE),
    "features": ((5, 3), (18, 3), (18, 4), (3,), (18,), False, SINGLE),
    "features, one channel": ((5, 2), (5, 2), (5, 1), (1,), (5,), True, DOUBLE),
    "chunks": ((2, 17), (17, 17), (17, 33), (), None, False, SINGLE),
    "crossed": ((2, 1, 5, 1), (1, 2, 17, 1), (2, 2, 17, 1), (2, 1), (1, 2, 17), False, DOUBLE),
    "float16": ((5,), (40,), (40,), (), (40,), False, HALF),
    "heads, bfloat16": ((2, 2, 3, 2), (2, 1, 9, 2), (2, 1, 9, 3), (2, 2), None, False, BRAIN),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    *shapes, exclude_self, dtype = FORMS[form]
    check(make(shapes, dtype, w_scale=1.5 if form == "chunks" else 6.0), "triton", exclude_self)


@pytest.mark.parametrize("features", [1, 2])
def test_local_linear(features):
    shapes = (18, features), (18, features), (18, 2), (features,), (18,)
    local_linear.check(shapes, torch.float64, "triton", True, w_scale=2.0)


@every_other("form, kind", ["tails, float32", "leave-one-out, weights", "features", "crossed"], KINDS)
def test_data_that_is_not_kind(form, kind):
    *shapes, exclude_self, dtype = FORMS[form]
    inputs = unkind(kind, make(shapes, dtype))
    leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
    out, lse = nwfast.nadaraya_watson(
        *leaves[:4], key_weight=leaves[4], exclude_self=exclude_self, backend="triton", return_lse=True
    )
    grad_out, grad_lse = torch.randn(out.shape, dtype=dtype), torch.randn(lse.shape, dtype=dtype)
    named = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    found = torch.autograd.grad((out, lse), list(named.values()), (grad_out, grad_lse))
    right = solve(*inputs, grad_out, grad_lse, exclude_self)
    for name, result in zip(("out", "lse", *named), (out, lse, *found), strict=True):
        assert_accurate(result, right[name], name)


def test_gradients_through_lse_at_a_distance():
    """27 bandwidths from the only key: its share is 1, as rounded as its score may be."""
    query, key = torch.tensor([0.75], dtype=torch.float64), torch.tensor([0.875], dtype=torch.float64)
    leaves = [
        query.requires_grad_(),
        torch.tensor(217.58670415310513, dtype=torch.float64, requires_grad=True),
    ]
    _, lse = nwfast.nadaraya_watson(
        leaves[0], key, torch.ones_like(key), leaves[1], backend="triton", return_lse=True
    )
    by_query, by_w = torch.autograd.grad(lse.sum(), leaves)
    torch.testing.assert_close(by_query, leaves[1].detach()[None] ** 2 * 0.125, rtol=4e-15, atol=0)
    torch.testing.assert_close(by_w, -leaves[1].detach() * 0.125**2, rtol=4e-15, atol=0)


PARTS = {
    "single, keys": (((2,), (600,), (600,), (1,), (600,)), True),
    "tiled, keys": (((2, 2), (150, 2), (150, 3), (2,), None), False),
    "single, queries": (((600,), (2,), (2,), (1,), (2,)), True),
    "tiled, queries": (((300, 2), (2, 2), (2, 3), (2,), None), True),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts(case):
    """In float64, where the rounding of hundreds of terms is far below any fault."""
    shapes, with_gradients = PARTS[case]
    inputs = make(shapes, torch.float64)
    leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
    out = nwfast.nadaraya_watson(*leaves[:4], key_weight=leaves[4], backend="triton")
    torch.testing.assert_close(out, textbook(*inputs)[0], rtol=1e-11, atol=1e-11)
    if with_gradients:
        grad_out = torch.randn(out.shape, dtype=out.dtype)
        out.backward(grad_out)
        for leaf, right in zip(leaves, gradients(inputs, grad_out), strict=True):
            if leaf is not None:
                torch.testing.assert_close(leaf.grad, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("long", [1300, pytest.param(2300, marks=pytest.mark.full)])
@pytest.mark.parametrize("which", ["queries", "keys"])
def test_long_sums_in_float32(which, long):
    m, n = (long, 6) if which == "queries" else (6, long)
    inputs = make(((m,), (n,), (n,), (1,), (n,)), torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = nwfast.nadaraya_watson(*leaves[:4], key_weight=leaves[4], backend="triton")
    grad_out = torch.randn(out.shape)
    out.backward(grad_out)
    right = solve(*inputs, grad_out)
    assert_accurate(out, right["out"], "out")
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert_accurate(leaf.grad, right[name], f"gradient of {name}")


def test_long_sums_of_tiles_in_float32():
    inputs = make(((2, 2), (2300, 2), (2300, 3), (2,), None), torch.float32)
    out = nwfast.nadaraya_watson(*inputs[:4], backend="triton")
    assert_accurate(out, solve(*inputs, torch.zeros_like(out))["out"], "out")


@pytest.mark.parametrize("features", [1, 2])
def test_values_with_an_offset(features):
    """A large offset costs no digits of the output's deviation from it, and a constant comes back as it is."""
    inputs = make(((3, features), (20, features), (20, 2 * features - 1), (), None), torch.float32)
    deviation = inputs[2]
    inputs[2] = 1000 + 0.01 * deviation
    out = nwfast.nadaraya_watson(*inputs[:4], backend="triton")
    exact = textbook(*(x if x is None else x.double() for x in inputs))[0]
    assert (out.double() - exact).abs().max() <= 1000 * 2.0**-24 * 1.1
    query = inputs[0].clone().requires_grad_()
    for constant in (1234.567, -7e-30):
        inputs[2] = torch.full_like(deviation, constant)
        out = nwfast.nadaraya_watson(query, *inputs[1:4], backend="triton")
        assert (out == inputs[2][0]).all()
    (slope,) = torch.autograd.grad(out.sum(), query)
    assert not slope.any()


def test_batch_of_shared_queries():
    """Each element its own keys: wrong where a batch offset is."""
    check(make(((1, 5, 1), (3, 33, 1), (3, 33, 1), (1,), None), torch.float32), "triton")


@every_other("features, dtype, into_lse", (1, 2), (SINGLE, DOUBLE), (True, False))
def test_gradients_of_far_rows(features, dtype, into_lse):
    """Some queries thousands of bandwidths away, beside near ones: the weights are still those of the last keys."""
    spacing = 2.0**-12
    key = torch.arange(40, dtype=torch.float64)[:, None] * spacing * torch.tensor([1.0, 0.5])[:features]
    query = torch.cat([key[:3] + 0.1, key[:2] + 1875.0, key[:2] - 3000.0])
    inputs = query, key, torch.randn(40, 1), torch.ones(1), torch.rand(40) + 0.5
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double() for tensor in inputs]
    results = nwfast.nadaraya_watson(*inputs[:4], key_weight=inputs[4], backend="triton", return_lse=into_lse)
    outputs = list(results) if into_lse else [results]
    grads = [torch.randn_like(output) for output in outputs]
    if into_lse:
        grads[1][3:] *= 1e-3  # the distance itself, squared, would drown the rest
    found = torch.autograd.grad(outputs, inputs, grads, retain_graph=True)
    expected = by_reference.gradients(
        grads[0].double(), grads[1].double() if into_lse else None, *wide, False, 31
    )
    for name, a, b in zip(("query", "key", "value", "w", "key_weight"), found, expected, strict=True):
        scale = b.abs().max()
        error = (a.double() - b).abs().max()
        tolerance = 2e-4 if dtype == torch.float32 else 1e-7  # of the expected: scores of 1e7 in float64
        assert error <= tolerance * scale, f"{name}, into lse {into_lse}: error {error:.3g} of {scale:.3g}"


@DTYPES
def test_a_huge_w_gives_the_nearest_value(dtype):
    """Scores beyond float32: every row is far, and its gradients vanish."""
    key = (torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.5])).to(dtype)
    nearest = torch.tensor([7, 2, 4])
    query = key[nearest] + torch.tensor([0.25, 0.125], dtype=dtype)
    value = torch.randn(9, 2, dtype=dtype)
    leaves = [x.requires_grad_() for x in (query, key, torch.tensor(1e30, dtype=dtype))]
    out, lse = nwfast.nadaraya_watson(*leaves[:2], value, leaves[2], backend="triton", return_lse=True)
    assert torch.equal(out, value[nearest])
    assert not lse.isnan().any()
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert not gradient.any()


@DTYPES
def test_rows_without_keys_and_rows_of_nan(dtype):
    query, key, value, w, weight = make(((7,), (9,), (9,), (), (9,)), dtype)
    query[2], query[5] = torch.nan, torch.inf
    out, lse = nwfast.nadaraya_watson(query, key, value, w, backend="triton", return_lse=True)
    exact = textbook(query, key, value, w)[0]
    ordinary = torch.tensor([0, 1, 3, 4, 6])
    torch.testing.assert_close(out[ordinary], exact[ordinary])
    assert out[[2, 5]].isnan().all()
    assert lse[5] == -torch.inf
    weight.zero_()
    leaves = [x.clone().requires_grad_() for x in (query[ordinary], key, value, w)]
    out, lse = nwfast.nadaraya_watson(*leaves, key_weight=weight, backend="triton", return_lse=True)
    assert out.isnan().all()
    assert (lse == -torch.inf).all()
    alone = nwfast.nadaraya_watson(*leaves, key_weight=weight, backend="triton")
    for result in (out, alone):
        for gradient in torch.autograd.grad(result.square().sum(), leaves, retain_graph=True):
            assert not gradient.any()
    weight[3] = -1
    assert nwfast.nadaraya_watson(*leaves, key_weight=weight, backend="triton").isnan().all()


@every_other("channels, dtype", (1, 3), (SINGLE, DOUBLE))
def test_tiny_weights(channels, dtype):
    """Down to the last subnormal numbers they give what they give times a power of 2."""
    query, key, value, w, _ = make(((3, 2), (20, 2), (20, channels), (), None), dtype)
    weight = torch.randint(4, 9, (20,)).to(dtype) / 4
    grad = torch.randn(3, channels, dtype=dtype)
    unit = 2.0**-140 if dtype == torch.float32 else 2.0**-1040
    results = []
    for scale in (1.0, unit):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, w, weight * scale)]
        out = nwfast.nadaraya_watson(*leaves[:4], key_weight=leaves[4], backend="triton")
        results.append([out, *torch.autograd.grad(out, leaves, grad)[:4]])
    tolerance = 2e-4 if dtype == torch.float32 else 1e-11  # a logarithm of the weight is part of the score
    for right, found in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)


@every_other("features, dtype", (1, 2), (DOUBLE, SINGLE))
def test_the_gradient_of_a_weight_of_zero_grows_to_the_end_of_the_numbers(features, dtype):
    """The key without weight is at one query, all others far from it: the true derivative, then the largest number."""
    largest = torch.finfo(dtype).max
    for apart in (12.0, 20.0, 1e3):
        key = torch.tensor([0.0, apart, apart * 1.01], dtype=dtype)[:, None].expand(-1, features)
        query = torch.tensor([0.0, apart], dtype=dtype)[:, None].expand(-1, features)
        weight = torch.tensor([0.0, 1.0, 1.0], dtype=dtype, requires_grad=True)
        for held in (5.0, -5.0):
            value = torch.tensor([held, 1.0, 2.0], dtype=dtype)[:, None]
            out = nwfast.nadaraya_watson(query, key, value, 1.0, key_weight=weight, backend="triton")
            found = torch.autograd.grad(out.sum(), weight)[0][0]
            right = solve(query, key, value, 1.0, weight, torch.ones_like(out))["key_weight"].value[0]
            if not abs(right) < largest:
                right = math.copysign(largest, held)
            torch.testing.assert_close(found, torch.tensor(float(right), dtype=dtype), rtol=2e-4, atol=0)


def test_same_bits_again():
    inputs = [
        x if x is None else x.requires_grad_() for x in make(((4,), (300,), (300,), (), None), torch.float32)
    ]
    runs = []
    for _ in range(2):
        out = nwfast.nadaraya_watson(*inputs[:4], backend="triton")
        runs.append([out, *torch.autograd.grad(out.sin().sum(), inputs[:4])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
