"""The fast Gauss transform of the native backend: gradients, against extended precision, and what they must satisfy."""

import numpy as np
import pytest
import torch
from conftest import every_other, pairwise
from exact import BOXES, assert_accurate, solve
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import BANDWIDTHS, KINDS, exact, keys_of, problems, queries_of
from oracle import gradients

import nwfast

pytestmark = pytest.mark.usefixtures("native")


def linear(*args, **options):
    return nwfast.nadaraya_watson(*args, method="fgt", backend="native", **options)


def linear_gradients(tensors, grad_out, grad_lse=None, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    weight = {"key_weight": leaves[4]} if len(leaves) == 5 else {}
    result = linear(*leaves[:4], **weight, **options, return_lse=grad_lse is not None)
    if grad_lse is None:
        return torch.autograd.grad(result, leaves, grad_out)
    return torch.autograd.grad(result, leaves, (grad_out, grad_lse))


def exact_gradients(query, key, value, w, grad):
    """Gradients of sum_i grad_i out_i by query, key, value and w in extended precision.

    And what a key's sums take at most: of |grad|, and of |grad| times the distance in bandwidths.
    """
    expected = exact(query, key, value, w)
    q, k, v, g = (tensor.double().numpy().astype(np.longdouble) for tensor in (query, key, value, grad))
    used = expected.p * g[:, None]
    distances = w * (q[:, None] - k)
    by_key = w * (used * (v - expected.out) * distances).sum(0)
    by_w = (g * expected.tangent_w[:, 0]).sum()
    most = [float(np.abs(terms).sum(0).max()) for terms in (used, used * distances)]
    return (g * expected.tangent_q[:, 0], by_key, used.sum(0), by_w), *most


def assert_backward(query, key, value, w, bound=None, ordered=True) -> None:
    bound = bound or {torch.float64: 1e-11, torch.float32: 2e-5}[query.dtype]
    grad = torch.randn(len(query), dtype=query.dtype)
    bandwidth = torch.tensor(w, dtype=query.dtype)
    found = linear_gradients((query, key, value, bandwidth), grad)
    wanted, crowd, pull = exact_gradients(query, key, value, float(bandwidth), grad)
    most, largest = float(grad.abs().max()), float(value.abs().max())
    crowd = max(crowd, most)
    scales = (
        most * largest * w,
        max(crowd, pull) * largest * w,
        crowd,
        most * largest * len(query) ** 0.5 / max(w, 1e-3),
    )
    for name, actual, exactly, scale in zip(
        ("query", "key", "value", "w"), found, wanted, scales, strict=True
    ):
        error = np.max(np.abs(actual.numpy() - exactly))
        assert error <= bound * max(scale, float(np.max(np.abs(exactly)))), f"{name}: {error}, scale {scale}"


@every_other("kind, w, dtype", KINDS, BANDWIDTHS[1:], (torch.float64, torch.float32))
def test_gradients_at_every_bandwidth(kind, w, dtype):
    generator = np.random.default_rng(1)
    keys = keys_of(kind, 1000, generator)
    query = torch.from_numpy(np.sort(queries_of(keys, 700, generator))).to(dtype)
    key = torch.from_numpy(np.sort(keys)).to(dtype)
    # The rounding of the saved outputs counts w (q - k) times in the gradient of a key.
    query = query[query < key.max() + (1e4 if dtype == torch.float64 else 10) / w]
    assert_backward(query, key, torch.sin(key - key[0]), w)


@pairwise(
    "dtype, exclude_self, keys_a_bandwidth", (torch.float64, torch.float32), (False, True), (0.2, 1.0, 3.0)
)
def test_gradients_with_few_rows_around_each_key(dtype, exclude_self, keys_a_bandwidth):
    """Rows are visited one by one, some across 0, where float32 differences are not exact; lse has a gradient."""
    generator = np.random.default_rng(5)
    key, query = (torch.from_numpy(np.sort(generator.uniform(-1, 4, 2000))).to(dtype) for _ in range(2))
    query = key if exclude_self else query
    tensors = query, key, torch.sin(3 * key), torch.tensor(400 / keys_a_bandwidth, dtype=dtype)
    grads = torch.randn(2, 2000, dtype=dtype)
    found = linear_gradients(tensors, *grads, exclude_self=exclude_self)
    wide = [tensor.double().clone().requires_grad_() for tensor in tensors]
    result = nwfast.nadaraya_watson(*wide, exclude_self=exclude_self, return_lse=True, backend="reference")
    for actual, expected in zip(found, torch.autograd.grad(result, wide, tuple(grads.double())), strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error <= (1e-11 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("distance", [3.6, 3.75, 3.9])
def test_gradients_at_the_verge_of_what_is_expanded(distance):
    """A crowd of queries sees a small crowd of keys from so far that its sums are just large enough to be expanded."""
    generator = np.random.default_rng(6)
    rest = np.linspace(40, 60, 100)
    key = torch.from_numpy(np.r_[np.sort(generator.uniform(0, 1e-3, 52)), rest])
    query = torch.from_numpy(np.r_[np.sort(distance + generator.uniform(0, 1e-3, 700)), rest])
    assert_backward(query, key, torch.sin(1e3 * key), 1.0)


@given(problems())
def test_gradients_of_few_points(problem):
    query, key, value, w = problem
    near = (query[:, None] - key).abs().min(1).values * w < 1e4
    if near.any() and w > 0:
        assert_backward(query[near], key, value, w)


def test_far_rows_pull_their_nearest_key_by_exactly_nothing():
    key = torch.linspace(0, 5, 400, dtype=torch.float64)
    query = torch.linspace(40, 1e6, 300, dtype=torch.float64)
    by_query, by_key, by_value, by_w = linear_gradients(
        (query, key, torch.cos(key), torch.tensor(1e3, dtype=torch.float64)),
        torch.ones(300, dtype=torch.float64),
    )
    assert not by_query.any() and not by_key.any() and by_w == 0
    assert by_value[-1] == 300 and not by_value[:-1].any()


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("w", [2.0, 40.0, 900.0])
def test_all_gradients_with_weights_channels_and_lse(exclude_self, channels, w):
    """Against autograd through the textbook; among the keys some have weight 0."""
    generator = np.random.default_rng(2)
    key = torch.from_numpy(generator.uniform(0, 5, 500))
    query = key + 1e-3 if exclude_self else torch.from_numpy(generator.uniform(0, 5, 300))
    value = torch.from_numpy(generator.normal(size=(500,) if channels is None else (500, channels)))
    weight = torch.from_numpy(generator.uniform(0.1, 2, 500))
    tensors = query, key, value, torch.tensor(w, dtype=torch.float64), weight
    grad_out = torch.randn(len(query), *value.shape[1:], dtype=torch.float64)
    grad_lse = torch.randn(len(query), dtype=torch.float64)
    found = linear_gradients(tensors, grad_out, grad_lse, exclude_self=exclude_self)
    for actual, wanted in zip(
        found, gradients(tensors, grad_out, grad_lse, exclude_self=exclude_self), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11 * float(wanted.abs().max()))


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("w", [0.7, 30.0, 600.0])
def test_gradients_with_masked_keys(exclude_self, w):
    """A key of weight 0 gets no gradient but that of its weight."""
    generator = np.random.default_rng(3)
    key = torch.from_numpy(np.sort(generator.uniform(0, 5, 600)))
    query = key.clone() if exclude_self else torch.from_numpy(generator.uniform(-0.5, 5.5, 600))
    weight = torch.from_numpy(generator.uniform(0.1, 2, 600))
    weight[::3] = 0
    tensors = query, key, torch.cos(key), torch.tensor(w, dtype=torch.float64), weight
    grad = torch.randn(600, dtype=torch.float64)
    found = linear_gradients(tensors, grad, exclude_self=exclude_self)
    right = solve(*tensors, grad, exclude_self=exclude_self, boxes=BOXES)
    for actual, name in zip(found, ("query", "key", "value", "w", "key_weight"), strict=True):
        assert_accurate(actual, right[name], f"gradient of {name}")
    assert not found[1][::3].any() and not found[2][::3].any()


@given(problems(), st.integers(0, 2**32 - 1))
def test_adjoint_identity(problem, seed):
    """<g, A v> = <A^T g, v>: grad_value is the transpose of the forward pass."""
    query, key, value, w = problem
    grad = torch.from_numpy(np.random.default_rng(seed).normal(size=len(query)))
    value = value - value.mean()
    out = linear(query, key, value, w)
    transposed = linear_gradients((query, key, value, torch.tensor(w, dtype=torch.float64)), grad)[2]
    size = float(grad.abs().sum() * value.abs().max())
    assert abs(float(grad @ out - transposed @ value)) <= 1e-13 * size + 1e-300


@pytest.mark.parametrize("w", [0.5, 20.0, 1e3, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_homogeneity(kind, w):
    """out depends on w q and w k alone: w dL/dw = sum q dL/dq + sum k dL/dk."""
    key = torch.from_numpy(keys_of(kind, 2000, np.random.default_rng(4)))
    key = key - key.mean()
    query = key[::2] + 0.3 / w
    grad = torch.randn(len(query), dtype=torch.float64)
    by_query, by_key, _, by_w = linear_gradients(
        (query, key, torch.sin(w * key), torch.tensor(w, dtype=torch.float64)), grad
    )
    terms = torch.cat([query * by_query, key * by_key])
    size = float(terms.abs().sum() + w * (query * grad).abs().sum())
    assert abs(float(w * by_w - terms.sum())) <= 1e-12 * size


def test_batches_and_shared_keys():
    query, key = torch.rand(2, 3, 60, 1, dtype=torch.float64), torch.rand(1, 3, 300, 1, dtype=torch.float64)
    value = torch.randn(2, 3, 300, 2, dtype=torch.float64)
    w = torch.tensor([2.0, 50.0, 800.0], dtype=torch.float64)[:, None]
    grad = torch.randn(2, 3, 60, 2, dtype=torch.float64)
    found = linear_gradients((query, key, value, w), grad)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value, w)]
    out = nwfast.nadaraya_watson(*leaves, backend="reference")
    for actual, wanted in zip(found, torch.autograd.grad(out, leaves, grad), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11 * float(wanted.abs().max()))
