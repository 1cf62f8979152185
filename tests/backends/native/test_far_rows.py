"""Rows far from all keys in two and three features: sums over the tree of keys (csrc/cpu/grid/far)."""

import numpy as np
import pytest
import torch

import nwfast

# Of the largest value; of max(1, |lse|). Windows of float32 data are summed in it, as far as 16 bandwidths away.
LIMIT = {torch.float32: 2e-6, torch.float64: 1e-13}
KEYS, QUERIES, CHECKED = 60_000, 3000, 30


def wide(tensor):
    return tensor.double().numpy().astype(np.longdouble)


def precise(query, key, value, w, key_weight):
    """Out and lse of the rows, from differences of squared distances in long double."""
    query, key, value, w = wide(query), wide(key), wide(value), wide(w)
    with np.errstate(divide="ignore"):
        log_weight = 0 if key_weight is None else np.log(wide(key_weight))
    outs, sums = [], []
    for x in query:
        square = (((x - key) * w) ** 2).sum(1)
        nearest = key[np.argmin(square)]
        # (x - k).(x - k) - (x - k*).(x - k*) = (k - k*).(k + k* - 2 x)
        relative = -(w**2 * (key - nearest) * ((key - x) + (nearest - x))).sum(1) / 2 + log_weight
        top = relative.max()
        weight = np.exp(relative - top)
        outs.append((weight[:, None] * value).sum(0) / weight.sum())
        sums.append(top + np.log(weight.sum()) - (((x - nearest) * w) ** 2).sum() / 2)
    return np.array(outs), np.array(sums)


def clusters(n, features, spread, generator):
    centres = torch.rand(5, features, generator=generator, dtype=torch.float64)
    chosen = torch.randint(5, (n,), generator=generator)
    return centres[chosen] + spread * torch.randn(n, features, generator=generator, dtype=torch.float64)


def assert_right(query, key, value, w, key_weight=None):
    out, lse = nwfast.nadaraya_watson(
        query, key, value, w, key_weight=key_weight, return_lse=True, method="fgt", backend="native"
    )
    some = torch.arange(0, len(query), max(1, len(query) // CHECKED))
    right, right_lse = precise(query[some], key, value, w, key_weight)
    limit = LIMIT[query.dtype]
    assert np.abs(out[some].numpy() - right).max() <= limit * np.abs(value.numpy()).max()
    assert (np.abs(lse[some].numpy() - right_lse) / np.maximum(1, np.abs(right_lse))).max() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [2, 3])
@pytest.mark.parametrize(
    ("w", "spread", "channels", "weights"),
    [
        (3.0, 0.01, 1, None),  # a cluster is a point, or little more
        (20.0, 0.02, 2, "some zero"),
        (60.0, 0.03, 3, "uneven"),  # a box of the tree at the edge is a small part of a cluster
        (500.0, 0.004, 1, "uneven"),
        (30.0, 0.0, 1, None),  # five points, twelve thousand times each
    ],
)
def test_map_around_clusters(features, dtype, w, spread, channels, weights):
    generator = torch.Generator().manual_seed(int(w))
    query = 2 * torch.rand(QUERIES, features, generator=generator, dtype=torch.float64) - 0.5
    key = clusters(KEYS, features, spread, generator)
    value = torch.randn(KEYS, channels, generator=generator, dtype=torch.float64)
    scale = w * torch.tensor([1.0, 0.5, 1.5], dtype=torch.float64)[:features]
    key_weight = None
    if weights == "uneven":
        key_weight = torch.exp(4 * torch.randn(KEYS, generator=generator, dtype=torch.float64)).to(dtype)
    elif weights:
        key_weight = torch.randint(0, 3, (KEYS,), generator=generator).to(dtype)
    assert_right(query.to(dtype), key.to(dtype), value.to(dtype), scale.to(dtype), key_weight)


@pytest.mark.parametrize("distance", [10.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("features", [2, 3])
def test_float64_keeps_its_digits_at_any_distance(features, distance):
    # Half of the rows have two clusters at nearly the same distance: differences of large scores decide.
    generator = torch.Generator().manual_seed(7)
    key = 0.3 * torch.randn(KEYS, features, generator=generator, dtype=torch.float64)
    key[: KEYS // 2, 0] += 1.5 * distance
    query = torch.randn(QUERIES, features, generator=generator, dtype=torch.float64)
    query[::2, 0] += 0.75 * distance + 0.1 / distance * query[::2, 0]
    query[1::2] *= distance / query[1::2].norm(dim=1, keepdim=True)
    query[:, 1] += distance
    value = torch.randn(KEYS, 1, generator=generator, dtype=torch.float64)
    assert_right(query, key, value, torch.ones(features, dtype=torch.float64))


@pytest.mark.parametrize("features", [2, 3])
def test_lattice_line_and_offset(features):
    generator = torch.Generator().manual_seed(3)
    query = 1000 + 40 * torch.rand(QUERIES, features, generator=generator, dtype=torch.float64)
    value = torch.randn(KEYS, 1, generator=generator, dtype=torch.float64)
    key = torch.randint(0, 30, (KEYS, features), generator=generator).double() / 8 + 1000
    assert_right(query, key, value, torch.full((features,), 2.0, dtype=torch.float64))
    key = key[:, :1].expand(-1, features).contiguous()
    assert_right(query, key, value, torch.full((features,), 7.0, dtype=torch.float64))


def test_the_bits_do_not_depend_on_threads():
    generator = torch.Generator().manual_seed(5)
    query = torch.rand(QUERIES, 2, generator=generator)
    key = clusters(KEYS, 2, 0.02, generator).float()
    value = torch.randn(KEYS, generator=generator)

    def out():
        return nwfast.nadaraya_watson(query, key, value, 40.0, method="fgt", backend="native")

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = out()
        torch.set_num_threads(4)
        assert all(torch.equal(out(), alone) for _ in range(3))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e300])
def test_odd_rows_among_far_ones(odd):
    generator = torch.Generator().manual_seed(9)
    query = 3 + torch.rand(QUERIES, 2, generator=generator, dtype=torch.float64)
    query[17, 1] = odd
    key = clusters(KEYS, 2, 0.02, generator)
    value = torch.randn(KEYS, generator=generator, dtype=torch.float64)
    w = 25.0
    found = nwfast.nadaraya_watson(query, key, value, w, method="fgt", backend="native")
    right = nwfast.nadaraya_watson(query[::50], key, value, w, method="dense", backend="native")
    assert torch.allclose(found[::50], right, rtol=0, atol=1e-12)
    own = nwfast.nadaraya_watson(query[17:18], key, value, w, method="dense", backend="native")
    assert torch.allclose(found[17:18], own, rtol=0, atol=1e-12, equal_nan=True)


def test_gradients_take_the_same_rows():
    # Values with and without gradients are of two ways of summing.
    generator = torch.Generator().manual_seed(11)
    query = torch.rand(600, 2, generator=generator, dtype=torch.float64) * 2
    key = clusters(20_000, 2, 0.02, generator)
    value = torch.randn(20_000, generator=generator, dtype=torch.float64)
    w = torch.tensor([30.0, 20.0], dtype=torch.float64)
    plain = nwfast.nadaraya_watson(query, key, value, w, method="fgt", backend="native")
    w.requires_grad_()
    value.requires_grad_()
    out = nwfast.nadaraya_watson(query, key, value, w, method="fgt", backend="native")
    assert torch.allclose(plain, out.detach(), rtol=0, atol=1e-12)
    out.sum().backward()
    assert torch.isfinite(w.grad).all()
    assert torch.allclose(value.grad.sum(), torch.tensor(600.0, dtype=torch.float64))


@pytest.mark.parametrize("features", [2, 3])
def test_keys_without_a_weight_may_lie_nearer(features):
    generator = torch.Generator().manual_seed(13)
    query = torch.rand(QUERIES, features, generator=generator, dtype=torch.float64)
    key = clusters(KEYS, features, 0.02, generator)
    key[::3] = torch.rand(KEYS // 3, features, generator=generator, dtype=torch.float64)
    key_weight = torch.ones(KEYS, dtype=torch.float64)
    key_weight[::3] = 0
    value = torch.randn(KEYS, 2, generator=generator, dtype=torch.float64)
    assert_right(query, key, value, torch.full((features,), 400.0, dtype=torch.float64), key_weight)
