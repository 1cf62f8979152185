"""Many features: scores that are sums of hundreds of squares keep the small differences that weights depend on."""

import numpy as np
import pytest
import torch
from conftest import every_other
from oracle import ROUNDING
from precise import NAMES, precise

import nwfast

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def random_data(features, channels, dtype, seed=0, queries=12, keys=70):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key = rand(queries, features), rand(keys, features)
    return query, key, 2 * rand(keys, channels) - 1, rand(queries, channels) - 0.5, rand(queries) - 0.5


@every_other(
    "features_and_w, per_feature, dtype",
    [
        (16, 2.0),
        (17, 2.0),
        (64, 1.0),
        (64, 5.0),
        (257, 1.0),
        (1000, 1.0),
        (1000, 5.0),
        (4096, 0.3),
        (4096, 2.0),
    ],
    [False, True],
    [torch.float32, torch.float64],
)
def test_accuracy(native, features_and_w, per_feature, dtype):
    """Errors relative to the sums of absolute terms: a few roundings, and half of one of the scores."""
    features, w = features_and_w
    query, key, value, grad, grad_lse = random_data(features, 3, dtype)
    w = torch.full((features,) if per_feature else (), w, dtype=dtype)
    if per_feature:
        w[::3] *= 0.75
    exact = precise(query, key, value, w, grad, grad_lse)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value, w)]
    out, lse = nwfast.nadaraya_watson(*leaves, backend="native", method="dense", return_lse=True)
    found = torch.autograd.grad([out, lse], leaves, [grad, grad_lse])
    distance = torch.cdist((query * w).double(), (key * w).double()).square() / 2
    budget = ROUNDING[dtype] * (4 + float(distance.amin(1).max()) / 2)
    checks = [
        ("out", out, exact.out, exact.out_scale.amax()),
        ("lse", lse, exact.lse, 4.0),
    ]  # lse is rounded itself
    for name, gradient in zip(NAMES, found, strict=False):
        right, scale = exact.gradients[name], exact.scales[name]
        if name == "w" and not per_feature:
            right, scale = right.sum(), scale.sum()
        checks.append((name, gradient, right, scale.amax()))
    for name, actual, right, scale in checks:
        error = float((actual.detach().double() - right).abs().max())
        assert error <= budget * float(scale), (
            f"{name}: error {error:.3g}, allowed {budget * float(scale):.3g}"
        )


@DTYPES
def test_weights_and_own_keys(native, dtype):
    """The same with weights of keys and without the own ones."""
    _, key, value, _, _ = random_data(300, 2, dtype, keys=40)
    grad, weight = (
        torch.linspace(-1, 1, 80, dtype=dtype).reshape(40, 2),
        torch.linspace(0.5, 2, 40, dtype=dtype),
    )
    exact = precise(key, key, value, 1.5, grad, None, weight, exclude_self=True)
    leaves = [
        tensor.clone().requires_grad_()
        for tensor in (key, key, value, torch.tensor(1.5, dtype=dtype), weight)
    ]
    out = nwfast.nadaraya_watson(
        *leaves[:4], key_weight=leaves[4], exclude_self=True, backend="native", method="dense"
    )
    budget = 64 * ROUNDING[dtype]
    assert float((out.detach() - exact.out).abs().max()) <= budget * float(exact.out_scale.max())
    for name, gradient in zip(NAMES, torch.autograd.grad(out, leaves, grad), strict=True):
        right, scale = exact.gradients[name], exact.scales[name]
        if name == "w":
            right, scale = right.sum(), scale.sum()
        assert float((gradient - right).abs().max()) <= budget * float(scale.max()), name


@pytest.mark.parametrize("batch", [(), (50,)], ids=str)
def test_the_gradient_of_one_w_is_one_sum(native, batch):
    """Over all features and batch elements: it costs no more than its own rounding."""
    query = 5 + torch.rand(*batch, 1, 4096, dtype=torch.float64)
    key, value = torch.zeros_like(query), torch.ones(*batch, 1, 1, dtype=torch.float64)
    w = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    _, lse = nwfast.nadaraya_watson(query, key, value, w, return_lse=True, backend="native", method="dense")
    (found,) = torch.autograd.grad(lse.sum(), w)
    right = -np.longdouble(w.item()) * (query.numpy().astype(np.longdouble) ** 2).sum()
    assert abs(found.item() - right) <= 2**-51 * abs(right)
