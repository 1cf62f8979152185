"""Sizes at which 32-bit numbers, grids and (M, N) matrices end."""

import pytest
import torch

import nwfast


def require_memory(gigabytes: float) -> None:
    """Skip where the device has not so much free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"it takes {gigabytes} GB of the device's memory, {free:.1f} are free")


@pytest.fixture(autouse=True)
def give_memory_back():
    yield
    torch.cuda.empty_cache()


def exact(query, key, value, w, **options):
    """In float64 on the CPU."""
    tensors = (x.detach().cpu().double() for x in (query, key, value))
    return nwfast.nadaraya_watson(*tensors, w, **options)


def assert_near(found, expected, tolerance=2e-5):
    error = (found.detach().cpu().double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max(), f"error {error:.3g}"


@pytest.mark.parametrize("order", ["sorted", "unsorted"])
@pytest.mark.parametrize("w", [1.0, 3000.0])
def test_more_pairs_than_32_bits_count(kernels, w, order):
    """2^34 pairs: the matrix would take 64 GiB, here only what has the size of the inputs is allocated."""
    n = 131072
    query, key, value = torch.rand(n) * 5, torch.rand(n) * 5, torch.randn(n)
    if order == "sorted":
        query, key = query.sort().values, key.sort().values
    nwfast.nadaraya_watson(query, key, value, w, backend=kernels)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = nwfast.nadaraya_watson(query, key, value, w, backend=kernels, return_lse=True)
    assert torch.cuda.max_memory_allocated() - before < 2**28
    rows = torch.randperm(n)[:300]
    right, right_lse = exact(query[rows], key, value, w, return_lse=True)
    assert_near(out[rows], right)
    assert_near(lse[rows], right_lse)


def test_gradients_of_more_pairs_than_32_bits_count(kernels):
    """Against float64 for the queries; by what the sums must add up to for keys, values and w."""
    n = 131072
    query, key, value = torch.rand(n) * 5, torch.rand(n) * 5, torch.randn(n)
    leaves = [x.requires_grad_() for x in (query, key, value, torch.tensor(2.0))]
    grad = torch.randn(n)
    out = nwfast.nadaraya_watson(*leaves, backend=kernels)
    of_query, of_key, of_value, of_w = torch.autograd.grad(out, leaves, grad)
    rows = torch.randperm(n)[:300]
    part = query.detach()[rows].cpu().double().requires_grad_()
    right = nwfast.nadaraya_watson(part, key.detach().cpu().double(), value.detach().cpu().double(), 2.0)
    (right_gradient,) = torch.autograd.grad(right, part, grad[rows].cpu().double())
    assert_near(of_query[rows], right_gradient, 1e-4)
    of_query, of_key, of_value, grad = (x.double() for x in (of_query, of_key, of_value, grad))
    # Weights of a row add up to 1; moving all queries and keys together changes nothing; only wq and wk count.
    size = grad.abs().sum()
    assert abs(of_value.sum() - grad.sum()) <= 1e-5 * size
    assert abs(of_query.sum() + of_key.sum()) <= 1e-5 * (of_query.abs().sum() + of_key.abs().sum())
    products = torch.cat([query.detach().double() * of_query, key.detach().double() * of_key])
    assert abs(2.0 * of_w.double() - products.sum()) <= 1e-5 * products.abs().sum()


@pytest.mark.parametrize("shapes", [
    ((70000, 3, 1), (70000, 5, 1), (70000, 5, 1)),
    ((70000, 3, 2), (70000, 5, 2), (70000, 5, 4)),
    ((70000,), (70000, 9), (70000, 9)),
    ((300, 1, 2, 1), (1, 300, 5, 1), (300, 300, 5, 2)),
], ids=str)  # fmt: skip
def test_more_batches_than_a_grid_has_rows(kernels, shapes):
    check_small_rows(kernels, shapes)


@pytest.mark.parametrize("shapes", [
    ((5_000_000,), (3,), (3,)),
    ((3,), (5_000_000,), (5_000_000,)),
    ((5_000_000, 2), (3, 2), (3, 3)),
    ((3, 2), (5_000_000, 2), (5_000_000, 3)),
], ids=str)  # fmt: skip
def test_many_on_one_side(kernels, shapes):
    check_small_rows(kernels, shapes)


def check_small_rows(kernels, shapes):
    """out and gradients against the reference in float64 on the device."""
    query, key, value = (torch.rand(shape) for shape in shapes)
    # Values that follow the keys: the derivatives of a mean over noise alone are lost in its rounding.
    value = value / 4 + (key if key.shape == value.shape else key.mean(-1, keepdim=True))
    leaves = query, key, value
    w = torch.tensor(3.0, requires_grad=True)
    results = []
    for backend, dtype in (kernels, torch.float32), ("reference", torch.float64):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (*leaves, w)]
        out = nwfast.nadaraya_watson(*inputs, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.cos().sum(), inputs)])
        torch.cuda.empty_cache()
    for found, right in zip(*results, strict=True):
        assert_near(found, right.cpu(), 1e-4)


def test_offsets_of_values_beyond_32_bits(kernels):
    """The second batch element of the values begins more than 2^31 elements after the first."""
    require_memory(60)
    n, channels = 2**20 + 3, 2049
    assert n * channels > 2**31
    query = torch.tensor([[[0.0], [1.0]]]).half()
    key = torch.full((1, n, 1), 9.0).half()
    key[0, 0], key[0, -1] = 0.0, 1.0  # the first query sees the first key alone, the second the last
    value = torch.zeros(2, n, channels, dtype=torch.float16)
    value[:, 0], value[:, -1] = torch.randn(2, channels).half(), torch.randn(2, channels).half()
    value.requires_grad_()
    out = nwfast.nadaraya_watson(query, key, value, 20.0, backend=kernels)
    assert torch.equal(out[:, 0], value[:, 0])
    assert torch.equal(out[:, 1], value[:, -1])
    grad = torch.randn(out.shape).half()
    (gradient,) = torch.autograd.grad(out, value, grad)
    assert torch.equal(gradient[:, 0], grad[:, 0])
    assert torch.equal(gradient[:, -1], grad[:, 1])
    assert not gradient[:, 1:-1].any()


def test_offsets_of_results_beyond_32_bits(kernels):
    require_memory(40)
    m, channels = 2**21 + 5, 1025
    assert m * channels > 2**31
    query = torch.arange(m, dtype=torch.float32)[:, None] % 7
    key, value = torch.arange(7.0)[:, None], torch.randn(7, channels)
    out = nwfast.nadaraya_watson(query, key, value, 20.0, backend=kernels)
    for rows in (slice(0, 50), slice(m // 2, m // 2 + 50), slice(m - 50, m)):
        torch.testing.assert_close(out[rows], value[query[rows, 0].long()], rtol=1e-6, atol=1e-6)


def test_strides_beyond_32_bits(kernels):
    """Keys and values as columns of a wide, mostly untouched, matrix."""
    require_memory(20)
    n, width = 3000, 2**20
    assert n * width > 2**31
    wide = torch.empty(n, width, dtype=torch.float32)
    wide[:, 0], wide[:, -1] = torch.rand(n), torch.randn(n)
    query = torch.rand(200)
    out = nwfast.nadaraya_watson(query, wide[:, 0], wide[:, -1], 30.0, backend=kernels)
    copies = wide[:, 0].clone(), wide[:, -1].clone()
    assert torch.equal(out, nwfast.nadaraya_watson(query, *copies, 30.0, backend=kernels))
