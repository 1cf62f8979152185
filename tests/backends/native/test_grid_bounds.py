"""Bounds that series on a grid rely on (docs/linear-time.md): of interpolation in two features, of derivatives."""

import math

import numpy as np
import pytest
from numpy.polynomial import chebyshev

PLACES = np.linspace(-1, 1, 41)


def truncation(terms, half):
    """4 E_T(r): the bound of one feature's series, before exp(-z^2 / 4)."""
    return 4 * 2.18 * (half / 2) ** terms / math.sqrt(math.factorial(terms))


def series(terms, half, apart):
    """Coefficients [of t, of s] of exp(-z^2 / 2) with z = half (s - t + 2 apart), at nodes of both boxes."""
    nodes = np.cos(np.pi * (np.arange(terms) + 0.5) / terms)
    kernel = np.exp(-((half * (nodes[None, :] - nodes[:, None] + 2 * apart)) ** 2) / 2)
    transform = np.cos(np.pi * np.outer(np.arange(terms), np.arange(terms) + 0.5) / terms) * 2 / terms
    transform[0] /= 2
    return transform @ kernel @ transform.T


def values(coefficients, order=0):
    """The series, or its derivatives by the place s of the target, at all PLACES of t and s."""
    terms = len(coefficients)
    by_target = chebyshev.chebder(coefficients, order, axis=1) if order else coefficients
    return (
        chebyshev.chebvander(PLACES, terms - 1)
        @ by_target
        @ chebyshev.chebvander(PLACES, by_target.shape[1] - 1).T
    )


def kernel_values(half, apart, order=0):
    """The same of the kernel itself; derivatives are by the place in the box."""
    z = half * (PLACES[None, :] - PLACES[:, None] + 2 * apart)
    factor = (1, -z, z**2 - 1)[order]
    return factor * half**order * np.exp(-(z**2) / 2)


@pytest.mark.parametrize(("terms", "half"), [(8, 0.2), (12, 0.6), (16, 1.2), (20, 1.5)])
def test_two_features_keep_the_sum_of_their_bounds(terms, half):
    bound = 2 * truncation(terms, half)
    largest = 0.0
    for first in range(5):
        for second in range(first + 1):
            a, b = (values(series(terms, half, apart)) for apart in (first, second))
            exact_a, exact_b = (kernel_values(half, apart) for apart in (first, second))
            error = np.abs(np.multiply.outer(a, b) - np.multiply.outer(exact_a, exact_b)).max()
            gaps = [2 * half * max(apart - 1, 0) for apart in (first, second)]
            allowed = bound * (1 + bound) * math.exp(-sum(gap**2 for gap in gaps) / 4)
            assert error <= allowed + 1e-14
            largest = max(largest, error / bound)
    assert largest > 1e-3, "a bound so loose wastes terms"


@pytest.mark.parametrize(("terms", "half"), [(8, 0.1), (12, 0.4), (16, 0.8), (20, 1.2)])
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_keep_theirs(terms, half, order):
    growth = terms**2 if order == 1 else terms**2 * (terms**2 - 1) / 3
    for apart in range(5):
        error = np.abs(values(series(terms, half, apart), order) - kernel_values(half, apart, order)).max()
        gap = 2 * half * max(apart - 1, 0)
        assert error <= growth * (truncation(terms, half) * math.exp(-(gap**2) / 4) + 1e-15)
