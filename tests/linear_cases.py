"""Data that is hard for a fast Gauss transform, and what the op should return for it, in extended precision.

The textbook's two lines lose digits of their own where queries are many bandwidths from every key, so `exact` takes
scores relative to the nearest key: -(d^2 - d*^2) w^2 / 2 = -(k* - k)(2 q - k - k*) w^2 / 2, in numpy's longdouble.
"""

from dataclasses import dataclass

import numpy as np
import torch
from exact import exp
from hypothesis import strategies as st
from torch import Tensor

BANDWIDTHS = (0.0, 0.01, 3.0, 100.0, 1e3, 1e4, 1e6)


@dataclass
class Exact:
    """out (M, C), lse (M,), and the tangents d out / d w and d out / d query (M, C), or None where not asked for.

    And what they are made of: weights that sum to 1 for each row (M, N).
    """

    out: np.ndarray
    lse: np.ndarray
    tangent_w: np.ndarray | None
    tangent_q: np.ndarray | None
    p: np.ndarray


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: float,
    key_weight: Tensor | None = None,
    exclude_self: bool = False,
    rows: slice = slice(None),
    tangents: bool = True,
) -> Exact:
    """The textbook's results for some of the queries, `rows`; value is (N,) or (N, C)."""
    q, k, v = (tensor.double().numpy().astype(np.longdouble) for tensor in (query, key, value))
    v = v[:, None] if v.ndim == 1 else v
    left_out = np.eye(len(k), dtype=bool) if exclude_self else np.zeros((len(q), len(k)), dtype=bool)
    q, left_out = q[rows], left_out[rows]
    distance = np.abs(q[:, None] - k)
    weight = np.ones(len(k)) if key_weight is None else key_weight.double().numpy().astype(np.longdouble)
    left_out = left_out | (weight == 0)
    nearest = k[np.where(left_out, np.inf, distance).argmin(1)][:, None]
    square = (nearest - k) * (2 * q[:, None] - k - nearest)  # d^2 - d*^2
    terms = weight * exp(np.where(left_out, -np.inf, -square * np.longdouble(w) ** 2 / 2))
    total = terms.sum(1, keepdims=True)
    p = terms / total
    out = p @ v
    lse = np.log(total[:, 0]) - ((q - nearest[:, 0]) * w) ** 2 / 2
    if not tangents:
        return Exact(out, lse, None, None, p)
    pull = p[:, :, None] * (v - out[:, None])
    by_w, by_q = ((pull * times[:, :, None]).sum(1) for times in (square, nearest - k))
    return Exact(out, lse, -w * by_w, -(w**2) * by_q, p)


def some_rows(m: int) -> slice:
    """The rows to hold against `exact`, which takes long: of many every third, which meets every lane of a vector."""
    return slice(None, None, 3 if m >= 700 else 1)


def keys_of(kind: str, n: int, generator: np.random.Generator) -> np.ndarray:
    """n keys, not sorted."""
    if kind == "uniform":
        return generator.uniform(0, 5, n)
    if kind == "clusters":  # of widths from 1e-6 to 0.1
        centres, widths = generator.uniform(0, 5, 6), 10.0 ** generator.uniform(-6, -1, 6)
        which = generator.integers(0, 6, n)
        return centres[which] + widths[which] * generator.normal(size=n)
    if kind == "duplicates":
        return generator.integers(0, 5, n).astype(float)
    if kind == "isolated":
        keys = 0.01 * generator.normal(size=n)
        keys[: min(n // 2, 3)] = (0.3, 3.0, 4.0)[: min(n // 2, 3)]
        return keys
    assert kind == "offset"
    return 1e6 + 1e-3 * generator.permutation(n)


KINDS = ("uniform", "clusters", "duplicates", "isolated", "offset")


def queries_of(keys: np.ndarray, m: int, generator: np.random.Generator) -> np.ndarray:
    """m queries among the keys, in their gaps, on them, and beyond the ends by up to 1e6."""
    low, high = keys.min(), keys.max()
    spread = max(high - low, 1e-3)
    sort = generator.integers(0, 4, m)
    among = generator.uniform(low - 0.2 * spread, high + 0.2 * spread, m)
    near = keys[generator.integers(0, len(keys), m)] + spread * 10.0 ** generator.uniform(-8, -1, m)
    on = keys[generator.integers(0, len(keys), m)]
    beyond = high + 10.0 ** generator.uniform(-3, 6, m)
    return np.choose(sort, (among, near, on, beyond))


@st.composite
def problems(draw, most: int = 70) -> tuple[Tensor, Tensor, Tensor, float]:
    """(query, key, value, w) in float64: sizes on both sides of every vector, block and box."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m = draw(st.integers(1, most)), draw(st.integers(1, most))
    keys = keys_of(draw(st.sampled_from(KINDS)), n, generator)
    scale, offset = 10.0 ** draw(st.integers(-3, 3)), draw(st.sampled_from((0.0, 0.0, -7.0, 1e3)))
    keys = keys * scale + offset
    queries = queries_of(keys, m, generator)
    values = np.sin(3 * keys / scale) + draw(st.sampled_from((0.0, 10.0))) + 0.1 * generator.normal(size=n)
    w = draw(st.sampled_from(BANDWIDTHS)) / scale
    return torch.from_numpy(queries), torch.from_numpy(keys), torch.from_numpy(values), w
