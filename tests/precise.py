"""The op and its gradients in np.longdouble, relative to each row's nearest key, with the sums of absolute terms.

Data far from its keys, overflowing scores, and coordinates at the ends of the range are beyond the textbook in any
common precision; this is what to hold them against. Unbatched: query (M, D), key (N, D), value (N, C).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NAMES = "query", "key", "value", "w", "key_weight"


@dataclass
class Precise:
    """Results and, of the same shapes, what their rounding is relative to; gradients in the order of NAMES."""

    out: Tensor
    lse: Tensor
    gradients: dict[str, Tensor]
    out_scale: Tensor
    scales: dict[str, Tensor]


def _long(tensor) -> np.ndarray:
    return torch.as_tensor(tensor, dtype=torch.float64).detach().numpy().astype(np.longdouble)


def _float64(array: np.ndarray) -> Tensor:
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.ascontiguousarray(array).astype(np.float64))


def precise(query, key, value, w, grad_out, grad_lse=None, key_weight=None, exclude_self=False) -> Precise:
    """All results for finite data whose rows each have a key; w a number or (D,)."""
    x, k, v, g = _long(query), _long(key), _long(value), _long(grad_out)
    m, n = len(x), len(k)
    w = np.broadcast_to(_long(w), (x.shape[1],))
    a = np.ones(n, np.longdouble) if key_weight is None else _long(key_weight)
    g_lse = np.zeros(m, np.longdouble) if grad_lse is None else _long(grad_lse)
    counted = np.broadcast_to(a > 0, (m, n)).copy()
    own = np.zeros((m, n), bool)
    if exclude_self:
        own = np.eye(n, dtype=bool)
        counted &= ~own
    out, lse, out_scale = (
        np.empty((m, v.shape[1]), np.longdouble),
        np.empty(m, np.longdouble),
        np.empty((m, v.shape[1]), np.longdouble),
    )
    grads = {
        name: np.zeros(shape, np.longdouble)
        for name, shape in zip(NAMES, (x.shape, k.shape, v.shape, w.shape, (n,)), strict=True)
    }
    scales = {name: np.zeros_like(grad) for name, grad in grads.items()}
    for i in range(m):
        keys = np.flatnonzero(counted[i])
        nearest = keys[np.argmin((((x[i] - k[keys]) * w) ** 2).sum(1))]
        for _ in range(3):  # what rounding hides from the distances shows in their differences
            terms = w * (k[nearest] - k) * (w * (2 * x[i] - k[nearest] - k))
            nearest = keys[np.argmax(-terms[keys].sum(1) / 2)]
        terms = w * (k[nearest] - k) * (w * (2 * x[i] - k[nearest] - k))
        score = -terms.sum(1) / 2
        p = np.where(counted[i], a * np.exp(np.minimum(score, 0)), 0)
        total = p.sum()
        p = p / total
        away = (((x[i] - k[nearest]) * w) ** 2).sum() / 2
        out[i], out_scale[i] = p @ v, p @ abs(v)
        lse[i] = np.log(total) - away
        pull = v @ g[i] - out[i] @ g[i] + g_lse[i]
        size = abs(v) @ abs(g[i]) + abs(out[i]) @ abs(g[i]) + abs(g_lse[i])
        own_pull = (v - out[i]) @ g[i]
        weight = np.where(own[i], 0, np.exp(score.clip(max=11000)) / total)  # of a unit of key weight
        offset = x[i] - k
        step, base = k[nearest] - k, x[i] - k[nearest]
        # The sums of p (v - out) vanish: with them, terms of the nearest key.
        grads["query"][i] = -(w**2) * ((p * (own_pull + g_lse[i])) @ step + g_lse[i] * base)
        scales["query"][i] = w**2 * ((p * size) @ abs(step) + abs(g_lse[i] * base))
        square = step * (2 * x[i] - k[nearest] - k)
        grads["w"] += -w * ((p * (own_pull + g_lse[i])) @ square + g_lse[i] * base**2)
        scales["w"] += abs(w) * ((p * size) @ abs(square) + abs(g_lse[i]) * base**2)
        grads["key"] += w**2 * (p * pull)[:, None] * offset
        scales["key"] += w**2 * (p * size)[:, None] * abs(offset)
        grads["value"] += p[:, None] * g[i]
        scales["value"] += p[:, None] * abs(g[i])
        grads["key_weight"] += weight * pull
        scales["key_weight"] += weight * size
    return Precise(
        _float64(out),
        _float64(lse),
        {name: _float64(grad) for name, grad in grads.items()},
        _float64(out_scale),
        {name: _float64(scale) for name, scale in scales.items()},
    )
