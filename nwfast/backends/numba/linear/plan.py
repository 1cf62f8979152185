"""Choice of the boxes of the linear method, and the matrices between them.

Interpolating exp(-(x - u)^2 / 2) in x and in u, each at T Chebyshev nodes of boxes of half width h bandwidths, has an
error of at most 8.72 (h/2)^T / sqrt(T!) exp(-d^2 / 4) for boxes at distance d (from |d^T/dx^T exp(-x^2/2)| <=
1.09 sqrt(T!) exp(-x^2/4); two interpolations, one of them with the other's Lebesgue constant before it).
"""

import math
from dataclasses import dataclass

import numpy as np

from .... import constants

TERMS = (8, 12, 16, 20, 24)
MOST_BOXES = 2**44  # from 0: their edges are exact numbers
LEAST_HALF = 1e-150  # of the width of one box, whose inverse has to be finite
ONE_BOX = (
    0.35  # half width in bandwidths up to which all data goes in one box with matrices from the power series
)


@dataclass(frozen=True)
class Accuracy:
    """What depends on the precision of the data."""

    truncation: float  # of expansions, relative to the mass of a box
    accept: float  # of a row's total: a row with a larger error bound is far
    negligible: float  # of a row's total: what keys may add together that no far row takes
    largest_half: float  # half width of a box in bandwidths
    far_terms: int  # nodes of a box of half width 2^-level, seen from far rows
    one_box_terms: int


FLOAT = Accuracy(
    constants.TRUNCATION_FLOAT, constants.ACCEPT_FLOAT, 0.01 * constants.ACCEPT_FLOAT, 1.5, 16, 12
)
DOUBLE = Accuracy(
    constants.TRUNCATION_DOUBLE, constants.ACCEPT_DOUBLE, 2.0**-constants.NEGLIGIBLE_DOUBLE, 1.0, 24, 20
)


@dataclass
class Plan:
    """A grid of boxes; width 0 where no grid serves and all rows are far."""

    width: float  # of a box in the unit of the data: few bits, so that centres are exact
    origin: float  # centre of the only box (one_box)
    one_box: bool
    terms: int
    matrices: np.ndarray  # (2 reach + 1, terms, terms)
    error: np.ndarray  # (2 reach + 1) relative to the mass of a box so far away
    least_kernel: np.ndarray  # (2 reach + 1) between the points of boxes so far apart
    largest_kernel: np.ndarray  # (2 reach + 1)
    tail: float  # what keys beyond the reach add, relative to their mass
    log_span: float  # keys count whose score is at most so much below the largest

    @property
    def inverse(self) -> float:
        """1 / width."""
        return 1.0 / self.width if self.width else 0.0


def root_factorial(n: int) -> float:
    """sqrt(n!)."""
    return math.exp(0.5 * math.lgamma(n + 1))


def expansion_error(terms: int, half: float) -> float:
    """The bound above for boxes that touch."""
    return 8.72 * (half / 2) ** terms / root_factorial(terms)


def half_width(terms: int, error: float) -> float:
    """The largest half width at which the bound holds."""
    return 2 * (error * root_factorial(terms) / 8.72) ** (1 / terms)


def short_number(x: float) -> float:
    """Rounded down to six significant bits."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(math.floor(fraction * 64), exponent - 6)


def make_plan(
    accuracy: Accuracy,
    scale: float,
    key: np.ndarray,
    query: np.ndarray,
    wide: bool = False,
    unevenness: float = 1.0,
) -> Plan:
    """The cheapest grid for these sorted coordinates and inverse bandwidth |w|; wide: for queries anywhere.

    unevenness: how many times larger than most the largest values are, so that smaller weights count.
    """
    low, high = float(key[0]), float(key[-1])
    if len(query):
        low, high = min(low, float(query[0])), max(high, float(query[-1]))
    n, m = len(key), len(query)
    window = math.sqrt(2 * (math.log(n / (0.01 * accuracy.accept)) + math.log(unevenness)))
    log_span = math.log(n / accuracy.negligible) + math.log(unevenness)
    spread = high / 2 - low / 2
    if wide and scale == 0:
        spread = 1e100
    if spread * scale <= ONE_BOX and not (wide and scale):
        # no smaller than the data needs, but not 0
        half = max(spread, LEAST_HALF) if spread > 0 else (1.0 if scale <= ONE_BOX else ONE_BOX / scale)
        terms = accuracy.one_box_terms
        matrix = matrix_within(terms, half * scale)
        error = np.array([8e-16 if accuracy is DOUBLE else 1e-10])
        kernels = np.exp([-2 * (half * scale) ** 2]), np.ones(1)
        return Plan(
            2 * half, low + (high - low) / 2, True, terms, matrix[None], error, *kernels, 0.0, log_span
        )
    gaps = np.diff(key[np.linspace(0, n - 1, min(n, 257)).astype(np.int64)].astype(np.float64))
    share = n / max(1, len(gaps))
    best = math.inf
    for candidate in TERMS:
        half = min(half_width(candidate, accuracy.truncation), accuracy.largest_half)
        boxes = 1 + float(np.minimum(gaps * (scale / (2 * half)), share).sum())
        neighbours = min(window / half + 1, boxes)
        cost = (n + m) * (6 + 1.5 * candidate) + boxes * neighbours * candidate * (0.35 * candidate + 5)
        if cost < best:
            best, terms, width = cost, candidate, short_number(2 * half / scale)
    if not width > 0 or max(abs(low), abs(high)) / width > MOST_BOXES:
        return no_plan(terms, log_span)
    half = width * scale / 2
    # Boxes of data are no further apart than this; queries that are to come may be anywhere.
    apart = 2**40 if wide else math.ceil(min(2 * spread / width, 2.0**40)) + 1
    reach = min(math.ceil(window / (2 * half)), apart)
    offsets = np.abs(np.arange(-reach, reach + 1))
    nearest, farthest = np.maximum(offsets - 1, 0) * 2 * half, (offsets + 1) * 2 * half
    error = expansion_error(terms, half) * np.exp(-(nearest**2) / 4)
    kernels = np.exp(-(farthest**2) / 2), np.exp(-(nearest**2) / 2)
    tail = math.exp(-((2 * half * reach) ** 2) / 2) if reach < apart else 0.0
    return Plan(
        width, 0.0, False, terms, matrices_between(terms, half, reach), error, *kernels, tail, log_span
    )


def no_plan(terms: int, log_span: float) -> Plan:
    """One by which all rows are far."""
    none = np.zeros(1)
    return Plan(0.0, 0.0, False, terms, np.zeros((1, terms, terms)), none, none, none, 0.0, log_span)


def nodes(terms: int) -> np.ndarray:
    """Chebyshev nodes of [-1, 1]."""
    return np.cos(np.pi * (np.arange(terms) + 0.5) / terms)


def node_charges(terms: int) -> np.ndarray:
    """(terms, terms) from Chebyshev moments to the charges at the nodes that stand for a box, [node, moment]."""
    k = np.arange(terms)
    table = np.cos(np.pi * k[None] * (k[:, None] + 0.5) / terms) * (2.0 / terms)
    table[:, 0] /= 2
    return table


def powers(terms: int) -> np.ndarray:
    """Chebyshev polynomials by powers, [polynomial, power]."""
    table = np.zeros((terms, terms))
    table[0, 0] = table[1, 1] = 1
    for k in range(2, terms):
        table[k, 1:] = 2 * table[k - 1, :-1]
        table[k] -= table[k - 2]
    return table


def matrices_between(terms: int, half: float, reach: int) -> np.ndarray:
    """[offset, moment, power] for exp(-(half (s - t + 2 offset))^2 / 2), by interpolation in s and t.

    Chebyshev coefficients in t, to go with Chebyshev moments; powers in s lose nothing, since coefficients fall fast.
    """
    at, table = nodes(terms), node_charges(terms)
    offset = np.arange(reach + 1)[:, None, None]
    grid = np.exp(-((half * (at[None, :, None] - at[None, None, :] + 2 * offset)) ** 2) / 2)  # offset, s, t
    by_moment = grid @ table  # offset, s, moment
    by_both = table.T @ by_moment  # offset, polynomial in s, moment
    upward = (powers(terms).T @ by_both).transpose(0, 2, 1)
    k = np.arange(terms)
    mirrored = upward * (1.0 - 2.0 * ((k[:, None] + k[None]) % 2))
    return np.concatenate((mirrored[:0:-1], upward))


def matrix_within(terms: int, half: float) -> np.ndarray:
    """[moment, power] for exp(-(half (s - t))^2 / 2) from its power series: each entry to its own rounding.

    exp(-h^2 s^2 / 2) exp(-h^2 t^2 / 2) exp(h^2 s t), multiplied out.
    """
    h = half * half
    bell = np.zeros(terms)
    bell[::2] = [(-h / 2) ** k / math.factorial(k) for k in range((terms + 1) // 2)]
    by_powers = np.zeros((terms, terms))  # power of t, power of s
    for k in range(terms):
        by_powers[k:, k:] += h**k / math.factorial(k) * np.outer(bell[: terms - k], bell[: terms - k])
    by_polynomials = np.zeros((terms, terms))  # t^n in Chebyshev polynomials
    by_polynomials[0, 0] = 1
    for n in range(1, terms):
        before = by_polynomials[n - 1]
        by_polynomials[n, 1:] += before[:-1] / 2
        by_polynomials[n, :-1] += before[1:] / 2
        by_polynomials[n, 1] += before[0] / 2
    return np.ascontiguousarray(by_polynomials.T @ by_powers)
