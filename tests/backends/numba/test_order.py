"""Keys and rows of several features are computed in a spatial order, and far tiles skipped: results stay right."""

import time

import numpy as np
import pytest
import torch

import nwfast

pytest.importorskip("numba")
from exact import assert_accurate, solve

from nwfast.backends.numba.dense import order
from nwfast.backends.numba.dense.tiles import TILE

M, N = 40, 2 * TILE + 300
KINDS = ("plain", "exclude_self", "left out", "channels", "values in a batch", "far", "keys without numbers")


def draw(kind, d, dtype, n=N, m=M, clusters=12):
    """Clusters with gaps between them, in no order: query, key, value, w, key_weight, exclude_self."""
    generator = torch.Generator().manual_seed(10 * d + len(kind))

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    centres = 10 * rand(clusters, d)
    both = centres[torch.randint(clusters, (m + n,), generator=generator)] + 0.3 * (rand(m + n, d) - 0.5)
    query, key, value, w, weight = both[:m], both[m:], rand(n, 1) + 1, 4 + 4 * rand(d), None
    if kind == "exclude_self":
        query = key = key[: TILE + 150]
        value = value[: TILE + 150]
    elif kind == "left out":
        weight = rand(n) * (rand(n) < 0.7)
        key[weight == 0] = torch.nan
    elif kind == "channels":
        value = rand(n, 6) - 0.5
    elif kind == "values in a batch":
        value = rand(2, n, 2)
        query, key = query[None], key[None]
    elif kind == "far":
        query[::3] += 1000
    elif kind == "keys without numbers":
        key[7, 0] = torch.inf
    return [
        None if x is None else x.to(dtype) for x in (query, key, value, w, weight)
    ], kind == "exclude_self"


def compute(tensors, exclude_self):
    """All results by name, and their cotangents."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    out, lse = nwfast.nadaraya_watson(
        *leaves[:4], key_weight=leaves[4], exclude_self=exclude_self, return_lse=True, backend="numba", method="dense"
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (out, lse)]
    names = [
        name
        for name, x in zip(("query", "key", "value", "w", "key_weight"), leaves, strict=True)
        if x is not None
    ]
    found = torch.autograd.grad((out, lse), [x for x in leaves if x is not None], given)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, found, strict=True))}, given


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("d", "dtype"), [(2, torch.float32), (3, torch.float64), (5, torch.float32)], ids=str
)
def test_results_are_right(kind, d, dtype, monkeypatch):
    monkeypatch.setattr(order, "_LEAST_PAIRS", 0)
    tensors, exclude_self = draw(kind, d, dtype)
    kept = torch.nan_to_num(tensors[1])  # left-out keys are replaced before the order is looked for
    ordered = order.order_of(
        tensors[0], tensors[1] if kind != "left out" else kept, tensors[3], exclude_self, 16
    )
    assert (ordered is None) == (kind == "keys without numbers")
    found, given = compute(tensors, exclude_self)
    right = solve(*tensors, *given, exclude_self=exclude_self)
    for name, result in found.items():
        odd = ~np.isfinite(right[name].value.astype(np.float64))
        np.testing.assert_array_equal(result.double().numpy()[odd], right[name].value[odd].astype(np.float64))
        right[name].value[odd] = 0
        assert_accurate(result.masked_fill(torch.from_numpy(odd), 0), right[name], name)


@pytest.mark.parametrize("n", [TILE + 1, 5 * TILE, 9 * TILE - 1])
def test_every_aligned_tile_lies_together(n, monkeypatch):
    """A permutation, and the tiles of points along a line are its pieces, whatever the scale of the other axis."""
    monkeypatch.setattr(order, "_LEAST_PAIRS", 0)
    generator = torch.Generator().manual_seed(n)
    points = torch.stack(
        [torch.randperm(n, generator=generator).double(), torch.rand(n, generator=generator)], 1
    )
    found = order.order_of(points, points, torch.tensor([1.0, 1e-3]), False, TILE)
    keys = found.keys.numpy()
    np.testing.assert_array_equal(np.sort(keys), np.arange(n))
    along = points[:, 0].numpy()[keys]
    for first in range(0, n, TILE):
        piece = along[first : first + TILE]
        assert np.ptp(piece) == len(piece) - 1


@pytest.mark.parametrize("gradients", [False, True])
def test_narrow_bandwidths_take_less_time(gradients, monkeypatch):
    """Of one thread's own time; four to seven times less is measured, and a third less would pass."""
    (query, key, value, w, _), _ = draw("plain", 2, torch.float32, 8000, 8000, 40)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def seconds(least_pairs):
        monkeypatch.setattr(order, "_LEAST_PAIRS", least_pairs)
        leaves = [x.clone().requires_grad_(gradients) for x in (query, key, value)]
        start = time.process_time()
        out = nwfast.nadaraya_watson(*leaves, 10 * w, backend="numba", method="dense")
        if gradients:
            out.sum().backward()
        return time.process_time() - start

    try:
        seconds(0)
        ordered, as_they_come = (min(seconds(least) for _ in range(2)) for least in (0, 10**12))
    finally:
        torch.set_num_threads(threads)
    assert ordered < as_they_come / 1.5
