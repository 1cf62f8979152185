"""Local linear regression in plain PyTorch: what all backends solve for each row, and the dense formula.

    m = E[v],  e = E[k] - q,  S = Cov(k, k),  B = Cov(k, v),  slope = S^+ B,  fit = m - e . slope

with the weights p of `nwfast.backends.reference`. Moments are taken about the middle of all keys, and S is judged in
units of u_f, the bandwidth or what keys extend over if that is less: sums of weights are known to some 1e-14, so that
an eigenvalue below `_tolerance` may be noise. Such directions are faded out, by eigenvalue^6 / (eigenvalue^6 +
tolerance^6), which is continuous, and get the slope of least norm in bandwidths. In float64, all of it. The power is
so high that the inverse of what is noise, some 1e-3 of a tolerance, is far below 1: with 2 it is 1e-3 / tolerance.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import is_captured, reference

# Eigenvalues above this many tolerances are not faded at all, to rounding.
_CLEAR = 1e3
# Binary exponents of u up to which products of four coordinates are numbers.
_MOST_EXPONENT = 200


class Frame(NamedTuple):
    """The coordinates in which moments are taken, for keys that count."""

    key: Tensor  # from the middle of the keys, (*B, N, D); 0 where a key does not count
    query: Tensor  # from there too, (*B, M, D)
    counted: Tensor  # finite keys whose weight is not 0, (*B, N)
    extent: Tensor  # of the keys, to each side of the middle, (*B, 1, D)
    reach: Tensor  # the most between a query and a key, (*B, D), above 0
    unit: Tensor  # u, (*B, 1, D)
    penalty: Tensor  # of a slope per u, as slope in bandwidths, at most 1, (*B, 1, D)


def frame(query: Tensor, key: Tensor, w: Tensor, key_weight: Tensor | None) -> Frame:
    """The frame of canonical inputs in float64; only `key` and `query` are differentiable."""
    counted, middle, extent = _keys(key.detach(), key_weight)
    w = w.detach().abs().unsqueeze(-2)
    far = (query.detach() - middle).abs()
    far = torch.where(far.isfinite(), far, 0.0)
    reach = extent + far.amax(-2, keepdim=True) if query.shape[-2] else extent
    reach = torch.where(reach > 0, reach, 1.0).squeeze(-2)
    unit = _unit(w, extent)
    largest = w.amax(-1, keepdim=True)
    bandwidth = torch.where(largest > 0, torch.maximum(w, largest * 2.0**-20), 1.0)
    penalty = 1 / (unit * bandwidth)
    penalty = penalty / penalty.amax(-1, keepdim=True)
    penalty = torch.where(penalty.isfinite(), penalty, 1.0)
    place = torch.where(counted.unsqueeze(-1), key - middle, 0.0)
    return Frame(place, query - middle, counted, extent, reach, unit, penalty)


def _keys(key: Tensor, key_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which keys count, (*B, N), the middle of these, and how far they extend to each side of it, (*B, 1, D)."""
    counted = key.isfinite().all(-1)
    if key_weight is not None:
        counted = counted & (key_weight != 0)
    mask = counted.unsqueeze(-1)
    low = torch.where(mask, key, torch.inf).amin(-2, keepdim=True)
    high = torch.where(mask, key, -torch.inf).amax(-2, keepdim=True)
    low, high = torch.where(low <= high, low, 0.0), torch.where(low <= high, high, 0.0)
    return counted, low / 2 + high / 2, high / 2 - low / 2


def _unit(w: Tensor, extent: Tensor) -> Tensor:
    unit = torch.where(w * extent > 1, 1 / w, extent)
    return torch.where((unit > 0) & unit.isfinite(), unit, 1.0)


def extreme_unit(key: Tensor, w: Tensor, key_weight: Tensor | None) -> Tensor:
    """What to divide coordinates (in float64) by, (*B, 1, D), so that their products are numbers: a power of two.

    1 where they are as they come.
    """
    unit = _unit(w.detach().abs().unsqueeze(-2), _keys(key.detach(), key_weight)[2])
    exponent = unit.log2().round()
    return torch.where(exponent.abs() > _MOST_EXPONENT, exponent.clamp(-1000.0, 1000.0), 0.0).exp2()


def inverse_of(frame: Frame, offset: Tensor, spread: Tensor) -> Tensor:
    """S^+ (*B, M, D, D) of e (*B, M, D) and S, a constant for autograd; 0 where S is not finite."""
    unit = (frame.unit.unsqueeze(-1) * frame.unit.unsqueeze(-2)).detach()
    # (D, D, *B, M): steps over small matrices are then steps over rows.
    scaled = (spread.detach() / unit).movedim((-2, -1), (0, 1)).contiguous()
    scaled = (scaled + scaled.transpose(0, 1)) / 2
    tolerance = _tolerance(frame, offset.detach())
    usable = scaled.isfinite().flatten(0, 1).all(0) & tolerance.isfinite()
    scaled = torch.where(usable, scaled, 0.0)
    tolerance = torch.where(usable, tolerance, 1.0)
    penalty = frame.penalty.expand(offset.shape)
    by_row = scaled.movedim((0, 1), (-2, -1))
    if spread.shape[-1] == 1:
        inverse = _inverse(scaled, tolerance).movedim((0, 1), (-2, -1))
    elif is_captured() or torch._C._are_functorch_transforms_active():
        inverse = _faded(by_row, tolerance, penalty)
    else:
        swept, clear = _swept(scaled, tolerance)
        inverse, some = swept.movedim((0, 1), (-2, -1)), ~clear
        inverse[some] = _faded(by_row[some], tolerance[some], penalty[some])
    return inverse / unit


def _tolerance(frame: Frame, offset: Tensor) -> Tensor:
    """Below what eigenvalues of S, in units of u, may be rounding, (*B, M)."""
    distance = (offset / frame.unit).abs().amax(-1)
    return (1e-11 + 1e3 * 2.0**-52 * (frame.extent / frame.unit).amax(-1)) * (1 + distance)


def _swept(matrix: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse (D, D, ...) by Gauss-Jordan steps, for all rows at once, and for which rows it serves."""
    trace = matrix.diagonal().sum(-1)
    least = trace.clone()  # a bound of the least eigenvalue, by the determinant
    inverse = matrix.clone()
    clear = torch.ones_like(trace, dtype=torch.bool)
    for f in range(len(matrix)):
        pivot = inverse[f, f].clone()
        clear &= pivot > 0
        least = least * (pivot / trace)
        pivot = torch.where(clear, pivot, 1.0)
        row, column = inverse[f] / pivot, inverse[:, f].clone()
        inverse -= column.unsqueeze(1) * row
        inverse[f] = row
        inverse[:, f] = -column / pivot
        inverse[f, f] = 1 / pivot
    clear &= least > _CLEAR * tolerance
    return inverse, clear


def _inverse(eigenvalue: Tensor, tolerance: Tensor) -> Tensor:
    """1 / eigenvalue, faded out where that is noise; a variance is not negative."""
    share = (eigenvalue / tolerance).clamp(0.0, _CLEAR)
    return torch.where(share < _CLEAR, share**5 / (1 + share**6) / tolerance, 1 / eigenvalue)


def _faded(matrix: Tensor, tolerance: Tensor, penalty: Tensor) -> Tensor:
    """The pseudo-inverse of semi-definite matrices without their noise, of least norm with the penalty."""
    values, vectors = torch.linalg.eigh(matrix)
    tolerance = tolerance.unsqueeze(-1)
    inverse = (vectors * _inverse(values, tolerance).unsqueeze(-2)) @ vectors.mT
    null = vectors * (values < tolerance).unsqueeze(-2)
    null = null @ null.mT
    squares = penalty.unsqueeze(-1) ** 2
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    oblique = one - null @ torch.linalg.solve(null @ (squares * null) + one - null, null * squares.mT)
    return oblique @ inverse @ oblique.mT


def fit_of(mean: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
    """M - e . slope, or m where that is no number."""
    change = (offset.unsqueeze(-2) @ slope).squeeze(-2)
    return mean - torch.where(change.isfinite(), change, 0.0)


def forward(
    query: Tensor, key: Tensor, value: Tensor, w: Tensor, key_weight: Tensor | None, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """(fit (*B, M, C), slope (*B, M, D, C)) in float64, from (M, N) matrices; differentiable to the second order."""
    query, key, value, w = query.double(), key.double(), value.double(), w.double()
    key_weight = key_weight if key_weight is None else key_weight.double()
    mean = reference.forward(query, key, value, w, key_weight, exclude_self)[0]
    weights = reference.attention_weights(query, key, w, key_weight, exclude_self)
    weights = torch.where(weights.isnan(), 0.0, weights)
    coordinates = frame(query, key, w, key_weight)
    middle = weights @ coordinates.key
    offset = middle - coordinates.query
    centred = coordinates.key.unsqueeze(-3) - middle.unsqueeze(-2)  # (*B, M, N, D)
    heavy = weights.unsqueeze(-1) * centred
    spread = heavy.mT @ centred
    values = torch.where(coordinates.counted.unsqueeze(-1) & value.isfinite(), value, 0.0).unsqueeze(-3)
    common = heavy.mT @ (values - mean.detach().nan_to_num(0.0, 0.0, 0.0).unsqueeze(-2))
    inverse = inverse_of(coordinates, offset, spread)
    # Newton steps leave the slope as it is and give it its derivatives, those of S^+ on its range.
    slope = inverse @ common.detach()
    slope = slope + inverse @ (common - spread @ slope)
    refined = 2 * inverse - inverse @ spread @ inverse
    slope = slope + refined @ (common - spread @ slope)
    slope = torch.where(mean.isnan().unsqueeze(-2), torch.nan, slope)
    return fit_of(mean, offset, slope), slope
