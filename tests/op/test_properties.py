"""Properties that hold for any data: hypothesis draws shapes, strides, dtypes and scales."""

import pytest
import torch

import nwfast

pytest.importorskip("hypothesis", reason="the package hypothesis is not installed")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# The backend fixture is the same for all examples of a test.
draws = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@st.composite
def problems(draw, square=False):
    """query, key, value, w, key_weight in canonical shapes, of varied strides; w spans uniform to one-hot weights."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 90))
    m = n if square else m
    features, channels = draw(st.sampled_from([1, 1, 2, 4])), draw(st.sampled_from([1, 1, 3, 9]))
    batch = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    data_scale = 10.0 ** draw(st.integers(-3, 3))

    def data(*shape):
        layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"]))
        sizes = [
            1 if layout == "expanded" and i < len(batch) else size for i, size in enumerate((*batch, *shape))
        ]
        if layout == "strided":
            sizes[-2] *= 2
        tensor = torch.randn(sizes, generator=generator, dtype=torch.float64)
        if layout == "transposed":
            tensor = tensor.mT.contiguous().mT
        if layout == "strided":
            tensor = tensor[..., ::2, :]
        return tensor.to(dtype).expand(*batch, *shape)

    query, key, value = data_scale * data(m, features), data_scale * data(n, features), data(n, channels)
    w = 10.0 ** draw(st.floats(-2, 3)) / data_scale * draw(st.sampled_from([1, -1, 0]))
    weighted = draw(st.booleans())
    key_weight = (data(n, 1).abs() + 0.05)[..., 0] if weighted else None
    return query, key, value, torch.tensor(w, dtype=dtype), key_weight


def call(backend, query, key, value, w, key_weight, **options):
    return nwfast.nadaraya_watson(query, key, value, w, key_weight=key_weight, backend=backend, **options)


@draws
@given(problem=problems())
def test_constant_values_return_the_constant(backend, problem):
    query, key, value, w, key_weight = problem
    constant = torch.full_like(value, -1.25)
    out = call(backend, query, key, constant, w, key_weight)
    torch.testing.assert_close(out, torch.full_like(out, -1.25), rtol=16 * torch.finfo(out.dtype).eps, atol=0)


@draws
@given(problem=problems())
def test_outputs_lie_among_the_values(backend, problem):
    query, key, value, w, key_weight = problem
    out = call(backend, query, key, value, w, key_weight)
    band = 16 * torch.finfo(out.dtype).eps * value.abs().max()
    assert (out >= value.amin(-2, keepdim=True) - band).all()
    assert (out <= value.amax(-2, keepdim=True) + band).all()


@draws
@given(problem=problems(), step=st.integers(-4, 4))
def test_translation_of_queries_and_keys(backend, problem, step):
    """By a power of two times a grid on which all coordinates lie, so that the sums are exact."""
    query, key, value, w, key_weight = problem
    grid = 2.0**-8 * float(2.0 ** torch.tensor(float(query.abs().max())).log2().floor())
    query, key = (query / grid).round() * grid, (key / grid).round() * grid
    shift = step * 64 * grid
    moved = call(backend, query + shift, key + shift, value, w, key_weight, return_lse=True)
    here = call(backend, query, key, value, w, key_weight, return_lse=True)
    for a, b in zip(moved, here, strict=True):
        bound = 64 * torch.finfo(a.dtype).eps * (1 + b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=float(bound))


@draws
@given(problem=problems(), seed=st.integers(0, 1000))
def test_permutation_of_keys(backend, problem, seed):
    query, key, value, w, key_weight = problem
    order = torch.randperm(key.shape[-2], generator=torch.Generator().manual_seed(seed))
    here = call(backend, query, key, value, w, key_weight, return_lse=True)
    weight = None if key_weight is None else key_weight[..., order]
    there = call(backend, query, key[..., order, :], value[..., order, :], w, weight, return_lse=True)
    for a, b in zip(here, there, strict=True):
        bound = 64 * torch.finfo(a.dtype).eps * (1 + b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=float(bound))


@draws
@given(problem=problems(), share=st.sampled_from([0.5, 0.25, 0.0]))
def test_splitting_a_key_in_two(backend, problem, share):
    query, key, value, w, key_weight = problem
    if key_weight is None:
        key_weight = torch.ones(key.shape[:-1], dtype=key.dtype)
    parts = torch.cat(
        [key_weight[..., :1] * share, key_weight[..., :1] * (1 - share), key_weight[..., 1:]], -1
    )
    twice = [torch.cat([tensor[..., :1, :], tensor], -2) for tensor in (key, value)]
    here = call(backend, query, key, value, w, key_weight, return_lse=True)
    for a, b in zip(call(backend, query, *twice, w, parts, return_lse=True), here, strict=True):
        bound = 64 * torch.finfo(a.dtype).eps * (1 + b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=float(bound))


@draws
@given(problem=problems(), cut=st.floats(0, 1))
def test_concatenating_keys_is_merging_by_lse(backend, problem, cut):
    query, key, value, w, key_weight = problem
    n = key.shape[-2]
    if n == 1:
        return
    at = 1 + int(cut * (n - 2))
    parts = []
    for part in (slice(0, at), slice(at, n)):
        weight = None if key_weight is None else key_weight[..., part]
        parts.append(call(backend, query, key[..., part, :], value[..., part, :], w, weight, return_lse=True))
    merged_lse = torch.stack([lse for _, lse in parts])
    share = torch.softmax(merged_lse.double(), 0)
    merged_out = sum(p[..., None] * out for p, (out, _) in zip(share, parts, strict=True))
    whole, lse = call(backend, query, key, value, w, key_weight, return_lse=True)
    # lse of size 1e5 knows its last digits no better than its rounding, and the shares with it.
    bound = (
        64
        * torch.finfo(whole.dtype).eps
        * (1 + float(merged_lse.abs().max()))
        * (1 + float(value.abs().max()))
    )
    torch.testing.assert_close(merged_out, whole.double(), rtol=0, atol=bound)
    torch.testing.assert_close(merged_lse.double().logsumexp(0), lse.double(), rtol=0, atol=bound)


@draws
@given(problem=problems(square=True))
def test_leave_one_out_is_a_weight_of_zero_for_each(backend, problem):
    _, key, value, w, key_weight = problem
    n = key.shape[-2]
    if n == 1:
        return
    out, lse = call(backend, key, key, value, w, key_weight, exclude_self=True, return_lse=True)
    for i in {0, n // 2, n - 1}:
        weight = torch.ones(key.shape[:-1], dtype=key.dtype) if key_weight is None else key_weight.clone()
        weight[..., i] = 0
        one, one_lse = call(backend, key[..., i : i + 1, :], key, value, w, weight, return_lse=True)
        eps = torch.finfo(out.dtype).eps
        torch.testing.assert_close(
            one[..., 0, :], out[..., i, :], rtol=0, atol=64 * eps * float(1 + out.abs().max())
        )
        bound = 64 * eps * float(1 + one_lse.abs().max())
        torch.testing.assert_close(one_lse[..., 0], lse[..., i], rtol=0, atol=bound)


@draws
@given(problem=problems())
@pytest.mark.parametrize("return_lse", [False, True])
def test_out_depends_on_products_wq_and_wk_alone(backend, problem, return_lse):
    """Hence w dL/dw = sum q dL/dq + sum k dL/dk."""
    query, key, value, w, key_weight = problem
    # In float64: the identity is one of exact derivatives, and its two sides cancel.
    query, key, w = (tensor.double().clone().requires_grad_() for tensor in (query, key, w))
    key_weight = None if key_weight is None else key_weight.double()
    result = call(backend, query, key, value.double(), w, key_weight, return_lse=return_lse)
    loss = sum(part.sin().sum() for part in (result if return_lse else [result]))
    dq, dk, dw = torch.autograd.grad(loss, (query, key, w))
    terms = torch.cat([(query * dq).flatten(), (key * dk).flatten()])
    # With one key alone, value - out is a rounding, and the squared distance in bandwidths magnifies it.
    largest = float(w.detach().abs() * torch.cat([query.flatten(), key.flatten()]).detach().abs().max())
    bound = 1e-11 * float(terms.abs().sum() + (w * dw).abs()) + 1e-16 * (1 + largest**2) * query.numel()
    torch.testing.assert_close((w * dw).reshape(()), terms.sum(), rtol=0, atol=bound)
