"""The error bounds that the fast Gauss transform trusts: of its expansions, and of the keys beyond its reach."""

import numpy as np
import pytest
import torch
from exact import BEYOND, BOXES, assert_accurate, solve

import nwfast
from nwfast.backends.numba.linear import plan as numba_plans

CASES = [
    # keys, w, dtype: from few keys a bandwidth, with few terms, to many
    (2_000, 1000.0, torch.float32),
    (20_000, 1000.0, torch.float32),
    (200_000, 100.0, torch.float32),
    (2_000, 1000.0, torch.float64),
    (20_000, 300.0, torch.float64),
    (200_000, 30.0, torch.float64),
]
# What expansions may add, relative to the mass of a box; docs/linear-time.md
TRUNCATION = {torch.float32: 1e-9, torch.float64: 2e-15}


def native_plan(key, w):
    """Half width, matrices [offset, power of t, power of s], errors by distance, tail."""
    nwfast.nadaraya_watson(key[:9], key[:9], key[:9], w, backend="native")  # loads the operators
    compressed = torch.ops.nwfast.native_fgt_compress(
        key, key[:, None], torch.tensor(w, dtype=key.dtype), None
    )
    matrices, numbers = compressed[-2].numpy().ravel(), compressed[-1].numpy()
    scale, box, terms, reach, tail = (numbers[place] for place in (1, 2, 3, 4, 7))
    terms, reach = int(terms), int(reach)
    pitch = -(-terms // 8) * 8
    lower = matrices.reshape(reach + 1, terms, pitch)[:, :, :terms]  # from boxes that lie lower
    parity = (-1) ** np.add.outer(np.arange(terms), np.arange(terms))
    return (
        box * scale / 2,
        np.concatenate((lower[:0:-1] * parity, lower)),
        numbers[-(reach + 1) :],
        tail,
    )


def numba_plan(key, w):
    """As native_plan, with Chebyshev polynomials of t turned into powers."""
    accuracy = numba_plans.DOUBLE if key.dtype == torch.float64 else numba_plans.FLOAT
    x = key.double().numpy()
    plan = numba_plans.make_plan(accuracy, w, x, x)
    matrices = np.einsum("kn,okm->onm", numba_plans.powers(plan.terms), plan.matrices)
    return plan.width * w / 2, matrices, plan.error[len(plan.error) // 2 :], plan.tail


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("plan", [native_plan, numba_plan])
def test_expansions_keep_their_bound(request, plan, case):
    if plan is native_plan:
        request.getfixturevalue("native")
    n, w, dtype = case
    key = torch.linspace(0, 5, n, dtype=dtype)
    half, matrices, errors, tail = plan(key, w)
    reach, terms = len(matrices) // 2, matrices.shape[1]
    places = np.linspace(-1, 1, 81)
    powers = places[:, None] ** np.arange(terms)
    largest = 0.0
    for offset in range(-reach, reach + 1):
        apart = half * (places[:, None] - places[None, :] + 2 * offset)  # query, key
        found = powers @ matrices[offset + reach].T @ powers.T
        error = np.abs(found - np.exp(-(apart**2) / 2)).max()
        assert error <= errors[abs(offset)] + 6e-15  # and rounding, of matrices too
        largest = max(largest, error)
    assert errors[0] <= 1.01 * TRUNCATION[dtype]
    if dtype == torch.float32:
        assert largest >= errors[0] / 1000, "a bound so loose wastes terms"
    # Keys in boxes that are not translated are further away than so.
    assert np.exp(-((2 * half * reach) ** 2) / 2) <= tail * (1 + 1e-12) or 2 * reach * half >= 5 * w
    assert tail <= TRUNCATION[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("keys", [2, 8, 500])
def test_windows_leave_out_what_they_may(backend, keys, dtype):
    """A second key with a share of the nearest one's term that is just below, and just above, what may be left out."""
    for of_share in (0.5, 2.0):
        score = -np.log(of_share * BEYOND[dtype] / min(keys, 64))
        # 800 bandwidths from the nearest key, the other one lies score / 800 behind it: at the window's edge.
        key = torch.zeros(keys, dtype=torch.float64)
        key[1:] = -100.0
        key[keys // 2] = -score / 800
        key, value = key.to(dtype), torch.zeros(keys, dtype=dtype)
        value[keys // 2] = 1.0
        query, weight = torch.full((300,), 800.0, dtype=dtype), torch.ones(keys, dtype=dtype)
        leaves = [x.requires_grad_() for x in (query, key, value, torch.tensor(1.0, dtype=dtype), weight)]
        out, lse = nwfast.nadaraya_watson(
            *leaves[:4], key_weight=weight, backend=backend, method="fgt", return_lse=True
        )
        cotangents = torch.ones_like(out), torch.ones_like(lse)
        gradients = torch.autograd.grad((out, lse), leaves, cotangents)
        right = solve(*leaves[:4], weight, *cotangents, boxes=BOXES)
        names = ("out", "lse", "query", "key", "value", "w", "key_weight")
        for name, found in zip(names, (out, lse, *gradients), strict=True):
            assert_accurate(found, right[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_share", [0.2, 0.39, 0.41, 2.0])
def test_boxes_leave_out_what_they_may(backend, of_share, dtype):
    """A lone key of large value, in a box of its own, whose share of the sums is about what a box is left out at."""
    apart = np.sqrt(-2 * np.log(of_share * BEYOND[dtype]))
    key = torch.cat([torch.linspace(-0.01, 0.01, 3, dtype=torch.float64), torch.tensor([apart]).double()]).to(
        dtype
    )
    value = torch.randn(4, 3, dtype=dtype)
    value[3] = 1e4
    query = torch.linspace(-0.005, 0.005, 60, dtype=torch.float64).to(dtype)
    leaves = [x.requires_grad_() for x in (query, key, value, torch.tensor(1.0, dtype=dtype))]
    out, lse = nwfast.nadaraya_watson(*leaves, backend=backend, method="fgt", return_lse=True)
    cotangents = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.autograd.grad((out, lse), leaves, cotangents)
    right = solve(*leaves, None, *cotangents, boxes=BOXES)
    for name, found in zip(("out", "lse", "query", "key", "value", "w"), (out, lse, *gradients), strict=True):
        assert_accurate(found.detach(), right[name], name)
