"""The reference backend itself, against the formula in float64 numpy, and its edge cases."""

import numpy as np
import pytest
import torch
from test_functional import FORMS, NAMES, check, make

import nwfast
from nwfast.backends import reference


def formula(query, key, value, w, key_weight=None):
    """Loops over queries and keys: (M, D), (N, D), (N, C), (D,), (N,) -> out (M, C), lse (M,), p (M, N)."""
    m, n = len(query), len(key)
    p, lse = np.zeros((m, n)), np.zeros(m)
    a = np.ones(n) if key_weight is None else key_weight
    for i in range(m):
        for j in range(n):
            p[i, j] = a[j] * np.exp(-sum(((query[i, f] - key[j, f]) * w[f]) ** 2 for f in range(len(w))) / 2)
        lse[i] = np.log(p[i].sum())
        p[i] /= p[i].sum()
    return p @ value, lse, p


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_formula(features, weighted, device):
    generator = np.random.default_rng(2)
    query, key = generator.random((6, features)), generator.random((9, features))
    value, w = generator.standard_normal((9, 2)), 2 + generator.random(features)
    key_weight = generator.random(9) if weighted else None
    out, lse, p = formula(query, key, value, w, key_weight)
    tensors = [torch.from_numpy(array).to(device) for array in (query, key, value, w)]
    weight = None if key_weight is None else torch.from_numpy(key_weight).to(device)
    found = nwfast.nadaraya_watson(*tensors, key_weight=weight, backend="reference", return_lse=True)
    np.testing.assert_allclose(found[0].cpu(), out, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found[1].cpu(), lse, rtol=1e-13, atol=1e-13)
    matrix = nwfast.attention_weights(tensors[0], tensors[1], tensors[3], key_weight=weight)
    np.testing.assert_allclose(matrix.cpu(), p, rtol=1e-13, atol=1e-13)
    assert 1.5 < np.median(1 / (p**2).sum(1)) < 8  # neither one-hot nor uniform


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, dtype):
    *shapes, exclude_self = FORMS[form]
    check(make(shapes, dtype), "reference", exclude_self)


def test_derivatives():
    *shapes, _ = FORMS["1-D, weights"]
    shapes = [tuple(min(size, 5) for size in shape) for shape in shapes]
    leaves = [tensor.requires_grad_() for tensor in make(shapes, torch.float64, w_scale=2.0)]

    def function(query, key, value, w, key_weight):
        return nwfast.nadaraya_watson(
            query, key, value, w, key_weight=key_weight, backend="reference", return_lse=True
        )

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert len(leaves) == len(NAMES)


def test_float32_is_computed_in_float64():
    """Scores of 1e6 bandwidths keep the digits that tell two keys apart."""
    key = torch.tensor([0.0, 2.0**-10])
    value = torch.tensor([0.0, 1.0])
    out = nwfast.nadaraya_watson(torch.tensor([4096.0]), key, value, 1.0, backend="reference")
    difference = 4096.0 * 2.0**-10 - 2.0**-21
    torch.testing.assert_close(out, torch.tensor([1 / (1 + np.exp(-difference))], dtype=torch.float32))
    assert reference.arithmetic_dtype(torch.float16) == torch.float32
    assert reference.arithmetic_dtype(torch.float64) == torch.float64


def test_rows_without_keys():
    query, key, value = torch.rand(3), torch.rand(3, 4), torch.rand(3, 4)
    w = torch.tensor([2.0], requires_grad=True)
    weight = torch.ones(3, 4)
    weight[1] = 0
    weight.requires_grad_()
    out, lse = nwfast.nadaraya_watson(
        query, key, value, w, key_weight=weight, backend="reference", return_lse=True
    )
    assert out.isnan().tolist() == [False, True, False]
    assert lse[1] == -torch.inf
    gradients = torch.autograd.grad(out.square().sum(), (w, weight), create_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][1].any()
    second = torch.autograd.grad(sum(gradient.sum() for gradient in gradients), (w, weight))
    assert all(gradient.isfinite().all() for gradient in second)
    matrix = nwfast.attention_weights(query, key, w, key_weight=weight)
    assert matrix[1].isnan().all()
    torch.testing.assert_close(matrix[[0, 2]].sum(1), torch.ones(2))


def test_edge_cases():
    key, value = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 2.0, 4.0])

    def run(query, w, **options):
        return nwfast.nadaraya_watson(torch.tensor(query), key, value, w, backend="reference", **options)

    assert torch.equal(run([0.2, 0.9, 1e6], 1e30), torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(run([0.2, -7.0], 0.0), torch.full((2,), 7 / 3))
    assert run([torch.nan, 0.0], 1.0).isnan().tolist() == [True, False]
    assert run([torch.inf, 0.0], 1.0).isnan().tolist() == [True, False]
    # A key of weight 0 that lies nearer than all others by more than exp can say.
    assert torch.equal(run([0.0], 1e4, key_weight=torch.tensor([0.0, 1.0, 1.0])), torch.tensor([2.0]))
    assert run([0.0], 1.0, key_weight=torch.tensor([1.0, -1.0, 1.0])).isnan().all()
    assert torch.equal(
        nwfast.nadaraya_watson(key, key, value, 1e9, exclude_self=True, backend="reference"),
        torch.tensor([2.0, 1.0, 2.0]),
    )
    lone = nwfast.nadaraya_watson(key[:1], key[:1], value[:1], exclude_self=True, backend="reference")
    assert lone.isnan().all()
