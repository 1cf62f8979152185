"""What linear time promises on every backend that has it."""

import numpy as np
import pytest
import torch

import nwfast


@pytest.mark.parametrize("presorted", [True, False])
@pytest.mark.parametrize("w", [3.0, 1e3, 1e5])
def test_same_bits_for_any_number_of_threads(backend, w, presorted):
    """Crowds, a heap of equal keys and far queries; gradients with a cotangent of lse, and from saved tangents."""
    generator = np.random.default_rng(8)
    key = torch.from_numpy(np.r_[generator.uniform(0, 5, 25_000), np.full(15_000, 2.0), [9.0, 9.5]])
    query = torch.from_numpy(generator.uniform(-1, 12, 30_000))
    if presorted:
        key, query = key.sort().values, query.sort().values
    inputs = query, key, key.cos(), torch.tensor([w], dtype=torch.float64)
    cotangent = torch.arange(30_000.0, dtype=torch.float64).cos()
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_() for x in inputs]
            out, lse = nwfast.nadaraya_watson(*leaves, method="fgt", backend=backend, return_lse=True)
            alone = nwfast.nadaraya_watson(*leaves, method="fgt", backend=backend)
            gradients = torch.autograd.grad((out, lse), leaves, (cotangent, cotangent))
            by_tangents = torch.autograd.grad(alone, (leaves[0], leaves[3]), cotangent)
            runs.append((out, lse, alone, *gradients, *by_tangents))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kept", [True, False])
def test_bandwidths_that_share_their_data_are_computed_as_if_alone(backend, kept, dtype):
    """Keys and queries are sorted once for all of them; queries are the keys, or others, some of them odd."""
    generator = torch.Generator().manual_seed(5)
    key = torch.rand(3000, generator=generator, dtype=torch.float64).to(dtype)
    query = key
    if not kept:
        query = 2 * torch.rand(3000, generator=generator, dtype=torch.float64).to(dtype) - 0.5
        query[[5, 70]] = torch.tensor([float("inf"), 30.0], dtype=dtype)
    value = torch.stack([key.cos(), key - 7], 1)
    w = torch.tensor([0.0, 3.0, 300.0 if kept else 12.0, -4e4 if kept else -40.0], dtype=dtype)
    weight = torch.ones(3000, dtype=dtype) if kept else (key * 8).floor()
    for channels, options in ((1, {}), (2, {}), (1, {"exclude_self": True}), (2, {"exclude_self": True})):
        results = []
        for many in (True, False):
            leaves = [x.clone().requires_grad_() for x in (value[:, :channels], w, weight)]
            points, places = (x[:, None].clone().requires_grad_() for x in (query, key))
            if kept:
                places = points
            values, ws, weights = leaves
            each = ws[:, None, None] if many else [ws[i : i + 1] for i in range(4)]
            outs = [
                nwfast.nadaraya_watson(
                    points, places, values, one, key_weight=weights, method="fgt", backend=backend, **options
                )
                for one in ([each[:, 0]] if many else each)
            ]
            out = outs[0] if many else torch.stack(outs)
            cotangent = torch.where(out.isfinite(), out.detach().sin(), 0.0)
            wanted = [*leaves, points] if kept else [*leaves, points, places]
            results.append((out, *torch.autograd.grad(out, wanted, cotangent)))
        # Sums over the bandwidths may be taken in another order.
        assert torch.equal(results[0][0].nan_to_num(7), results[1][0].nan_to_num(7))
        for a, b in zip(results[0][1:], results[1][1:], strict=True):
            scale = b.abs().max()
            assert scale > 0
            torch.testing.assert_close(a, b, rtol=0, atol=float(8 * torch.finfo(dtype).eps * scale))
