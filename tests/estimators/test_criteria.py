"""Criteria, traces and variances against (n, n) matrices; counts against repeated rows."""

import numpy as np
import pytest
import torch
from conftest import pairwise
from scipy.special import stdtrit

from nwfast.estimators.criteria import criterion_of, in_sample
from nwfast.estimators.inference import (
    fit_errors,
    mean_slope,
    residual_variance,
    slope_errors,
    student_quantile,
    weights_at,
)
from nwfast.estimators.sites import sites_of

from . import dense

CASES = [(features, degree) for features in (1, 2, 4) for degree in (0, 1)]


def data(features, n=120, outputs=2, seed=0):
    """Distinct inputs of unlike scales, noisy outputs of unlike scales, bandwidths that keep some 20 neighbours."""
    random = np.random.default_rng((seed, features))
    scale = np.array([1.0, 50.0, 0.01, 3.0])[:features]
    x = random.random((n, features)) * scale + 7 * scale
    signal = np.sin(6 * x[:, :1] / scale[0]) + (x / scale).sum(1, keepdims=True)
    y = np.array([1.0, 30.0])[:outputs] * (signal + 0.3 * random.standard_normal((n, outputs)))
    return x, y, scale * {1: 0.08, 2: 0.15, 4: 0.4}[features]


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def sites(x, y, weight=None):
    return sites_of(*tensors(x, y), None if weight is None else torch.from_numpy(weight))


@pytest.mark.parametrize(("features", "degree"), CASES)
@pytest.mark.parametrize("name", ["loo", "gcv", "aicc"])
def test_criteria_by_their_definition(name, features, degree):
    x, y, bandwidth = data(features)
    found = criterion_of(name, sites(x, y), torch.from_numpy(1 / bandwidth), degree)
    assert float(found) == pytest.approx(dense.criterion(name, x, y, bandwidth, degree), rel=1e-9)


@pytest.mark.parametrize(("features", "degree"), CASES)
def test_trace_of_the_hat_matrix(features, degree):
    x, y, bandwidth = data(features)
    hat = dense.weights(x, x, bandwidth, degree)[0]
    squares, trace = in_sample(sites(x, y), torch.from_numpy(1 / bandwidth), degree)
    assert trace == pytest.approx(np.trace(hat), rel=1e-9)
    np.testing.assert_allclose(squares, ((y - hat @ y) ** 2).sum(0), rtol=1e-9)


@pairwise("case, name, weighted", CASES, ["loo", "gcv", "aicc"], [False, True])
def test_derivatives_in_each_bandwidth(case, name, weighted):
    features, degree = case
    x, y, bandwidth = data(features)
    weight = np.random.default_rng(1).integers(1, 4, len(x)) * 1.0 if weighted else None
    held = sites(x, y, weight)
    w = torch.from_numpy(1 / bandwidth).requires_grad_()
    (found,) = torch.autograd.grad(criterion_of(name, held, w, degree), w)
    step = 1e-5
    for feature in range(features):
        move = torch.zeros(features, dtype=torch.float64)
        move[feature] = step
        ends = [float(criterion_of(name, held, w.detach() * (1 + side * move), degree)) for side in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * step)
        scale = abs(expected) + 1e-3 * abs(ends[0])
        assert float(found[feature] * w.detach()[feature]) == pytest.approx(expected, abs=2e-5 * scale)


@pytest.mark.parametrize(("features", "degree"), CASES)
@pytest.mark.parametrize("name", ["loo", "gcv", "aicc"])
def test_whole_weights_are_repeated_rows(name, features, degree):
    x, y, bandwidth = data(features, n=80)
    counts = np.random.default_rng(2).integers(0, 4, len(x))
    weighted = sites(x, y, counts * 1.0)
    repeated = sites(np.repeat(x, counts, 0), np.repeat(y, counts, 0))
    for one, other in zip(weighted[:5], repeated[:5], strict=True):
        assert torch.equal(one, other)
    w = torch.from_numpy(1 / bandwidth)
    x, y = np.repeat(x, counts, 0), np.repeat(y, counts, 0)
    order = np.random.default_rng(3).permutation(len(x))
    expected = dense.criterion(name, x[order], y[order], bandwidth, degree)
    assert float(criterion_of(name, weighted, w, degree)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("degree", [0, 1])
@pytest.mark.parametrize("name", ["loo", "gcv", "aicc"])
def test_ties_with_different_outputs(name, degree):
    random = np.random.default_rng(5)
    x = random.integers(0, 12, 150)[:, None] / 12.0
    y = np.sin(5 * x) + random.standard_normal((150, 2))
    found = criterion_of(name, sites(x, y), torch.tensor([8.0], dtype=torch.float64), degree)
    assert float(found) == pytest.approx(dense.criterion(name, x, y, np.array([0.125]), degree), rel=1e-9)


@pytest.mark.parametrize("degree", [0, 1])
def test_precisions_are_left_out_whole(degree):
    x, y, bandwidth = data(1, outputs=1)
    weight = np.random.default_rng(6).random(len(x)) + 0.1
    rows = dense.weights(x, x, bandwidth, degree, weight, exclude=np.arange(len(x)))[0]
    squares = weight[:, None] * (y - rows @ y) ** 2
    found = criterion_of("loo", sites(x, y, weight), torch.from_numpy(1 / bandwidth), degree)
    assert float(found) == pytest.approx(squares.sum() / weight.sum(), rel=1e-9)
    for scale in (1e-3, 300.5):  # of the weights: no matter
        scaled = criterion_of("loo", sites(x, y, scale * weight), torch.from_numpy(1 / bandwidth), degree)
        assert float(scaled) == pytest.approx(float(found), rel=1e-9)


@pytest.mark.parametrize(("features", "degree"), CASES)
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_variances(features, degree, constant, weighted):
    x, y, bandwidth = data(features)
    random = np.random.default_rng(7)
    weight = random.random(len(x)) + 0.2 if weighted else None
    held, w = sites(x, y, weight), torch.from_numpy(1 / bandwidth)
    order = np.lexsort(x.T[::-1])
    x, y = x[order], y[order]
    mass = np.ones(len(x)) if weight is None else weight[order]
    # Leave-one-out residuals and what they are expected to be.
    rows = dense.weights(x, x, bandwidth, degree, mass, exclude=np.arange(len(x)))[0]
    squares = mass[:, None] * (y - rows @ y) ** 2
    expected = 1 + mass * (rows**2 / mass).sum(1)
    variance = squares / expected[:, None]
    if constant:
        variance = (squares.sum(0) / expected.sum())[None]
    found = residual_variance(held, w, degree, constant)
    np.testing.assert_allclose(found, variance, rtol=1e-7)
    # Of fits and slopes at other places, some beyond the data.
    query = np.concatenate([x[::17] + 0.3 * bandwidth, x.max(0, keepdims=True) + 1.5 * bandwidth])
    lines, slopes = dense.weights(query, x, bandwidth, degree, mass)
    at = weights_at(torch.from_numpy(query), held, w, degree, False)
    of_y = np.broadcast_to(variance, y.shape) / mass[:, None]
    np.testing.assert_allclose(at.fit, lines @ y, rtol=1e-8)
    np.testing.assert_allclose(at.slope, slopes @ y, rtol=1e-7, atol=1e-7 * np.abs(slopes @ y).max())
    np.testing.assert_allclose(fit_errors(at, held, w, found), lines**2 @ of_y, rtol=1e-6)
    np.testing.assert_allclose(slope_errors(at, held, w, found), slopes**2 @ of_y, rtol=1e-5)
    # Of the mean of all slopes.
    weights = np.einsum("m,mdn->dn", mass / mass.sum(), dense.weights(x, x, bandwidth, degree, mass)[1])
    mean, error = mean_slope(held, w, degree, found)
    np.testing.assert_allclose(mean, weights @ y, rtol=1e-6, atol=1e-7 * float(at.slope.abs().max()))
    np.testing.assert_allclose(error, weights**2 @ of_y, rtol=1e-5)


@pytest.mark.parametrize("degree", [0, 1])
def test_counts_in_variances_are_repeated_rows(degree):
    x, y, bandwidth = data(2, n=60, outputs=1)
    counts = np.random.default_rng(8).integers(1, 4, len(x))
    held, w = sites(x, y, counts * 1.0), torch.from_numpy(1 / bandwidth)
    x, y = np.repeat(x, counts, 0), np.repeat(y, counts, 0)
    residual, rows = dense.leave_one_out(x, y, bandwidth, degree)
    expected = (residual**2).sum() / (1 + (rows**2).sum(1)).sum()
    assert float(residual_variance(held, w, degree, True)) == pytest.approx(expected, rel=1e-8)


def test_far_from_the_data_one_observation_counts():
    x, y, bandwidth = data(1, outputs=1)
    held, w = sites(x, y), torch.from_numpy(1 / bandwidth)
    query = torch.tensor([[1e3], [-1e7], [1e12]], dtype=torch.float64) * bandwidth[0]
    at = weights_at(query, held, w, 0, False)
    np.testing.assert_allclose(fit_errors(at, held, w, torch.ones(1, 1)), np.ones((3, 1)), rtol=1e-6)


@pytest.mark.parametrize("freedom", [1.0, 9999.0, 1e4, 20001.5, 1e9])
def test_the_quantile_of_student_is_that_of_scipy(freedom):
    for share in (0.5, 0.51, 0.975, 0.9995, 1 - 1e-9, 1 - 2.0**-53):
        assert student_quantile(freedom, share) == pytest.approx(
            stdtrit(freedom, share), rel=3e-15, abs=1e-15
        )
    assert student_quantile(freedom, 1.0) == np.inf
