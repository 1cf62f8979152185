"""Bounds that series and meshes on a grid rely on (docs/linear-time.md): of interpolation, and of derivatives."""

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


NODES, DEGREE = 12, 14  # of a mesh's window
FRACTIONS = np.linspace(0, 1, 9)


def window(shape):
    """Of Kaiser and Bessel, as polynomials between nodes: of node g, by the place from 0 to 1 after its fifth."""
    beta = shape * NODES

    def value(x):
        return np.i0(beta * np.sqrt(np.maximum(1 - (x / (NODES / 2)) ** 2, 0))) / np.i0(beta)

    return [
        chebyshev.Chebyshev.interpolate(lambda f, g=g: value(f - g + NODES / 2 - 1), DEGREE, domain=[0, 1])
        for g in range(NODES)
    ]


def taps(spacing, shape, count, squares=False):
    """The kernel between nodes: the transform of exp(-z^2 / 2), or z^2 times that, over the square of the window's."""
    angle = np.pi * (np.arange(256) + 0.5) / 256
    root = np.sqrt((shape * NODES) ** 2 - (NODES / 2 * angle) ** 2)
    transform = NODES * np.sinh(root) / (root * np.i0(shape * NODES))
    factor = np.sqrt(2 * np.pi) / spacing * np.exp(-((angle / spacing) ** 2) / 2) / transform**2 / 256
    if squares:
        factor = factor * (1 - (angle / spacing) ** 2)
    return np.cos(np.outer(np.arange(count), angle)) @ factor


@pytest.mark.parametrize(
    ("most", "shape", "order"), [(0.35, 2.45, 0), (0.3, 2.7, 0), (0.3, 2.7, 1), (0.3, 2.7, 2)]
)
@pytest.mark.parametrize("share", [1, 0.7])
def test_meshes_keep_their_bound(most, shape, order, share):
    """Values, first and second derivatives, by the offset z of a query from a key."""
    spacing, polynomials = most * share, window(shape)
    at_key = np.array([p(FRACTIONS) for p in polynomials])
    at_query = np.array([(p.deriv(order) if order else p)(FRACTIONS) for p in polynomials]) / spacing**order
    far = int(9 / spacing)
    tap = taps(spacing, shape, far + NODES)
    bound = (1e-11, 5e-11, 7e-9)[order]
    largest = 0.0
    for apart in range(far):
        between = tap[np.abs(apart + np.arange(NODES)[:, None] - np.arange(NODES))]
        z = spacing * (apart + FRACTIONS[:, None] - FRACTIONS)
        exact = (1, -z, z**2 - 1)[order] * np.exp(-(z**2) / 2)
        error = np.abs(at_query.T @ between @ at_key - exact)
        assert (error <= bound * np.exp(-(z**2) / 8) + 1e-14 / spacing**order).all()
        largest = max(largest, error.max() / bound)
    assert largest > 1e-3, "a bound so loose wastes rows"
    if order == 0 and share == 1:
        assert not_a_bound(spacing, shape)


@pytest.mark.parametrize(
    ("most", "shape", "squares"), [(0.35, 2.45, False), (0.3, 2.7, False), (0.3, 2.7, True)]
)
@pytest.mark.parametrize("share", [1, 0.97])
def test_one_mesh_keeps_its_bound(most, shape, squares, share):
    """Values of the kernel, and of z^2 times the kernel, from taps that fade out; none reaches beyond kFadeTo."""
    spacing, reach = most * share, 9.3
    weights = np.array([p(FRACTIONS) for p in window(shape)])
    far = int(12 / spacing)
    tap = taps(spacing, shape, far + NODES, squares)
    offsets = spacing * np.arange(far + NODES)
    tap *= np.cos(np.pi / 2 * np.clip((offsets - 7.2) / (reach - 7.2), 0, 1)) ** 2
    bound, largest = 8e-11 if most < 0.35 else 1e-11, 0.0
    for apart in range(far):
        between = tap[np.abs(apart + np.arange(NODES)[:, None] - np.arange(NODES))]
        z = spacing * (apart + FRACTIONS[:, None] - FRACTIONS)
        error = np.abs(weights.T @ between @ weights - (z**2 if squares else 1) * np.exp(-(z**2) / 2))
        assert (error <= bound * np.exp(-(z**2) / 8) + 1e-14).all()
        largest = max(largest, error.max() / bound)
    assert largest > 1e-3, "a bound so loose wastes rows"


def not_a_bound(spacing, shape):
    """Whether values are worse than the bound where nodes lie a fifth further apart: the test can tell."""
    wide, polynomials = 1.2 * spacing, window(shape)
    weights = np.array([p(FRACTIONS) for p in polynomials])
    tap = taps(wide, shape, NODES)
    between = tap[np.abs(np.arange(NODES)[:, None] - np.arange(NODES))]
    z = wide * (FRACTIONS[:, None] - FRACTIONS)
    return np.abs(weights.T @ between @ weights - np.exp(-(z**2) / 2)).max() > 1e-11
