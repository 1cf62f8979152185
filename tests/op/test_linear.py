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
