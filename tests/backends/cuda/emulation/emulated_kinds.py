"""Data that is not kind to the float32 kernels, which need more pairs than the tests of all backends have.

Run by test_emulated.py with the plugin beside this file.
"""

import ctypes
import math
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from op.test_functional import call, check, make
from oracle import gradients, textbook

# Queries, keys, features and channels of the kernels for one feature and channel, and of each product of the others.
SIZES = {
    "single": (520, 600, 1, 1),
    "few channels": (131, 203, 3, 5),
    "many channels": (131, 203, 3, 20),
    "features in chunks": (131, 150, 21, 9),
}
KINDS = pytest.mark.parametrize("size", SIZES)


def draw(size, offset=2.0):
    """Query, key, value, w and key weights; values of one sign."""
    m, n, d, c = SIZES[size]
    inputs = make(((m, d), (n, d), (n, c), (), (n,)), torch.float32, 6.0 / d**0.5)
    inputs[2] = inputs[2] + offset
    return inputs


def results(inputs, grad_out, exclude_self=False):
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    out, lse = call(leaves, "cuda", exclude_self=exclude_self, return_lse=True)
    found = iter(torch.autograd.grad(out, [x for x in leaves if x is not None], grad_out))
    return [out.detach(), lse.detach(), *(None if x is None else next(found) for x in leaves)]


def assert_close(found, right, scale, what=""):
    """To float32 sums of terms of size `scale`, in other orders or in double."""
    assert found.isfinite().all(), what
    assert (found - right).abs().max() <= 3e-6 * scale, what


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 12, 64, 75])
def test_values_of_one_sign_and_mixed_scales(backend, channels, dtype):
    """In [1, 2], in [-300, -100], about 0 and tiny, channel by channel."""
    query, key, value, w, key_weight = make(
        ((131, 3), (203, 3), (203, channels), (3,), (203,)), torch.float64, 3.0
    )
    value = torch.rand_like(value)
    value[:, 0::4] += 1
    value[:, 1::4] = -100 - 200 * value[:, 1::4]
    value[:, 3::4] *= 1e-3
    inputs = [x.to(dtype) for x in (query, key, value, w, key_weight)]
    out = call(inputs, backend)
    exact = textbook(*[x.double() for x in inputs])[0]
    unit = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    assert ((out.double() - exact).abs() <= unit * exact.abs().amax(0)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_half_products(backend, dtype):
    """Weights are rounded one by one: the mean is over their own total, and lse is of the weights as they are."""
    inputs = make(((131, 2), (203, 2), (203, 20), (), None), dtype, 3.0)
    inputs[2] = inputs[2] + 1.5
    wide = [x if x is None else x.double() for x in inputs]
    grad_out = torch.ones(131, 20)
    tensors = (*inputs[:3], inputs[3][None].float(), None)
    out, lse, state, *none = torch.ops.nwfast.cuda_forward(*tensors, False, False, False)
    assert (lse.double() - textbook(*wide)[1]).abs().max() <= 3e-6
    found = torch.ops.nwfast.cuda_backward(grad_out, None, *tensors, out, state, *none, False, 8)[3]
    right = gradients(wide, grad_out.double())[3]
    size = gradients(wide, grad_out.double() * torch.randn(131, 20).sign())[3].abs() + right.abs()
    assert abs(float(found) - float(right)) <= (2e-3 if dtype == torch.float16 else 1.5e-2) * float(size)


def test_long_sums_have_two_levels(backend, monkeypatch):
    """More keys, or rows, than the inner sums hold: maxima that rise later, in one part."""
    monkeypatch.setenv("NWFAST_EMULATED_MULTIPROCESSORS", "1")
    n = 9000
    for dtype, channels in ((torch.float32, 3), (torch.float32, 9), (torch.float16, 9)):
        inputs = make(((40, 2), (n, 2), (n, channels), (), (n,)), dtype, 4.0)
        inputs[1] = inputs[1][inputs[1][:, 0].argsort()]
        inputs[2] = inputs[2] + 2
        check(inputs, backend, with_gradients=False)
    inputs = make(((9000, 2), (40, 2), (40, 3), (), (40,)), torch.float32, 4.0)
    found = results(inputs, torch.ones(9000, 3))
    right = gradients(inputs, torch.ones(9000, 3))
    for a, b in zip(found[2:], right, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-2 * (a.numel() == 1)


@pytest.mark.parametrize("half", [False, True])
def test_memory_grows_as_the_problem_and_its_results(half):
    """Workspace of an H100 for sizes that it can hold: a few times what inputs and results take."""
    library = ctypes.CDLL(os.environ["NWFAST_EMULATED_LIBRARY"])
    plan = library.nwfast_workspace
    plan.restype = ctypes.c_int64
    plan.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_bool] * 3 + [ctypes.c_int]
    for size in (10**5, 10**6, 4 * 10**6, 10**8):
        for features, channels in ((1, 1), (2, 1), (3, 64), (64, 8)):
            for lse in (False, True):
                for backward in (False, True):
                    taken = plan(size, size, features, channels, half, lse, backward, 132)
                    assert taken <= 4 * size * (4 * (2 * features + 2 * channels) + 64) + 2**27, (
                        size,
                        features,
                        channels,
                    )
    for m, n in ((1, 10**8), (10**8, 1), (100, 10**7)):
        for backward in (False, True):
            assert plan(m, n, 3, 64, half, True, backward, 132) <= (m + n) * 4 * 4 * 80 + 2**30


@pytest.mark.parametrize("features", [257, 1000])
def test_many_features(backend, features):
    """Squares are added up in blocks, in gradients as well (slow to emulate), and no row needs double."""
    inputs = make(((40, features), (410, features), (410, 3), (), None), torch.float32, 20.0 / features**0.5)
    state = torch.ops.nwfast.cuda_forward(*inputs[:3], inputs[3][None], None, False, False, False)[2]
    assert (state[:, 0] == 0).all()
    check(inputs, backend, with_gradients=features < 1000)


@KINDS
def test_what_keys_of_weight_zero_hold(size):
    query, key, value, w, weight = draw(size)
    weight[::5] = 0
    left_out = weight == 0
    grad_out = torch.randn(len(query), value.shape[1])
    right = results([query, key[~left_out], value[~left_out], w, weight[~left_out]], grad_out)
    key, value = key.clone(), value.clone()
    for place, held in enumerate((math.nan, math.inf, -math.inf, 1e30)):
        key[10 * place + 5, -1] = held
        value[10 * place + 10, 0] = held
    found = results([query, key, value, w, weight], grad_out)
    assert not found[3][left_out].any()
    assert not found[4][left_out].any()
    assert found[6].isfinite().all()
    for place, (a, b) in enumerate(zip(found, right, strict=True)):
        a = a[~left_out] if place in (3, 4, 6) else a
        assert_close(a, b, 10 + 10 * b.abs().max(), place)


@KINDS
def test_one_outlying_key_or_query_spoils_no_other_row(size):
    query, key, value, w, _ = draw(size)
    grad_out = torch.randn(len(query), value.shape[1])
    right = results([query, key[:-1], value[:-1], w, None], grad_out)
    for far in (1e10, 1e20, -3e38, math.inf):
        outlier = key.clone()
        outlier[-1] = far
        for place, (a, b) in enumerate(
            zip(results([query, outlier, value, w, None], grad_out), right, strict=True)
        ):
            if b is not None:
                a = a[:-1] if place in (3, 4) else a
                assert_close(a, b, 10 + 10 * b.abs().max(), (far, place))
    grad_out[-1] = 0  # nor does a row that nobody uses
    right = results([query, key, value, w, None], grad_out)
    for far in (1e20, -3e38, math.inf, math.nan):
        outlier = query.clone()
        outlier[-1] = far
        for place, (a, b) in enumerate(
            zip(results([outlier, key, value, w, None], grad_out), right, strict=True)
        ):
            if b is not None:
                a, b = (a[:-1], b[:-1]) if place < 3 else (a, b)
                assert_close(a, b, 10 + 10 * b.abs().max(), (far, place))


@KINDS
def test_the_own_key_that_is_left_out_may_hold_anything(size):
    query, key, value, w, weight = draw(size)
    n = min(len(query), len(key))
    query, key, value, weight = query[:n], key[:n], value[:n], weight[:n]
    grad_out = torch.zeros(n, value.shape[1])
    grad_out[7] = 1
    right = results([query, key, value, w, weight], grad_out, True)
    for spoilt in (key, value):
        for held in (math.nan, math.inf):
            spoilt[7, 0], kept = held, float(spoilt[7, 0])
            found = results([query, key, value, w, weight], grad_out, True)
            spoilt[7, 0] = kept
            for place in (0, 1, 2):
                assert_close(found[place][7], right[place][7], 10 + 10 * right[place].abs().max(), place)
            assert_close(found[5], right[5], 10 + 10 * right[5].abs(), "w")


@KINDS
@pytest.mark.parametrize("w", [math.nan, math.inf])
def test_bandwidths_that_are_not_finite(size, w):
    query, key, value, _, weight = draw(size)
    found = results([query, key, value, torch.tensor(w), weight], torch.ones(len(query), value.shape[1]))
    assert all(x.isnan().all() for x in (found if math.isnan(w) else found[:2]))
