r"""What a bandwidth is judged by, as functions of w: leave-one-out, generalised cross-validation, AICc.

All three need two things of each place x_s: the fit from all other places, and

    q_s = 1 / (e_1^T M_s^{-1} e_1),   M_s = sum_j a_j e^{s_j} (1, x_j - x_s)(1, x_j - x_s)^T

over those places, the weight of a single observation that would do as well as they do. For a local mean (degree 0) it
is the sum of weights; for a local line that sum over 1 + e . S^+ e, with e the mean offset of the keys and S their
covariance. An observation of weight a then moves the fit there by a / (q + a) of the way to itself: the diagonal of
the hat matrix, without cancellation where an observation is alone.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..functional import local_linear, nadaraya_watson
from ..leave_one_out import leave_one_out_loss
from ..op import call
from ..op import local_linear as lines
from .sites import Sites


def flat(part: Tensor) -> Tensor:
    """(n, D) or (n, C) in the shortest form that the op takes, which is its fastest: (n,) where D or C is 1."""
    return part.squeeze(-1) if part.shape[-1] == 1 else part


def as_call(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both of x (n, D) and y (n, C), flat."""
    return flat(x), flat(y)


def geometry(query: Tensor, sites: Sites, w: Tensor, exclude_self: bool) -> lines.Rows:
    """The local line of each query with the geometry of the keys around it, constants in float64."""
    with torch.no_grad():
        name = backends.resolve("auto", query.device)
        kernel = call.choose_kernel(name, "auto", query.shape[1], query.shape[0] * len(sites.x))
        mass = sites.key_weight
        return lines.rows(kernel, query, sites.x, sites.y, w.detach(), mass, exclude_self)


def smooth(query: Tensor, sites: Sites, w: Tensor, degree: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """The fit (M, C) at query (M, D) and log q (M,), both differentiable in w (D,)."""
    x, y = as_call(sites.x, sites.y)
    at = flat(query)
    options: dict[str, Any] = dict(key_weight=sites.key_weight, exclude_self=exclude_self)
    fit, lse = nadaraya_watson(at, x, y, w, return_lse=True, **options)
    if degree == 1:
        fit = local_linear(at, x, y, w, **options)
        lse = lse - torch.log1p(_tilt(query, sites, w, exclude_self)).to(lse.dtype)
    return fit.reshape(len(query), -1), lse


def _tilt(query: Tensor, sites: Sites, w: Tensor, exclude_self: bool) -> Tensor:
    """E . S^+ e of each row (M,), at least 0, in float64."""
    _, _, offset, inverse = geometry(query, sites, w, exclude_self)
    direction = (inverse @ offset.unsqueeze(-1)).squeeze(-1)
    value = (direction * offset).sum(-1).clamp_min(0.0)
    if not (torch.is_grad_enabled() and w.requires_grad):
        return value
    # With u = S^+ e held fixed, 2 u . e - u . S u has the derivative of e . S^+ e.
    middle = sites.x.double().mean(0)
    places = sites.x.double() - middle
    first, second = torch.triu_indices(places.shape[1], places.shape[1])
    columns = torch.cat([places, places[:, first] * places[:, second]], -1)
    mass = None if sites.key_weight is None else sites.mass.double()
    at, values = as_call(query.double(), columns)
    keys = flat(sites.x.double())
    options: dict[str, Any] = dict(key_weight=mass, exclude_self=exclude_self)
    means = nadaraya_watson(at, keys, values, w.double(), **options)
    mean = means[:, : len(middle)]
    factor = torch.where(first == second, 1.0, 2.0) * direction[:, first] * direction[:, second]
    along = (direction * mean).sum(-1)
    spread = (factor * means[:, len(middle) :]).sum(-1) - along.square()
    tangent = 2 * (along - (direction * (query.double() - middle)).sum(-1)) - spread
    return value + (tangent - tangent.detach())


def criterion_of(name: str, sites: Sites, w: Tensor, degree: int) -> Tensor:
    """The criterion at w (D,), a scalar; its unit is that of y squared, but for "aicc", which is a logarithm.

    "loo" is `nwfast.leave_one_out_loss` of the observations. With residuals r of n observations, their weights a and
    the hat matrix H, sigma^2 = sum a r^2 / sum a: "gcv" is sigma^2 / (1 - tr H / n)^2 (Craven and Wahba 1979), and
    "aicc" is log sigma^2 + 1 + 2 (tr H + 1) / (n - tr H - 2) (Hurvich, Simonoff and Tsai 1998), infinite where that
    denominator is not above 0. Several outputs: their mean.
    """
    if name == "loo" and bool(sites.within.count_nonzero() == 0) and bool((sites.mass == sites.unit).all()):
        x, y = as_call(sites.x, sites.y)
        scale = w.reshape(()) if x.ndim == 1 else w
        return leave_one_out_loss(x, y, scale, key_weight=sites.key_weight, degree=degree)
    others, log_q = smooth(sites.x, sites, w, degree, True)
    return _criterion(name, sites, others, log_q)


def in_own_unit(sites: Sites) -> tuple[Sites, float]:
    """The same with y in a unit in which squares are numbers in any dtype, and that unit, a power of two."""
    exponent = math.frexp(float(sites.y.abs().max()))[1]
    if abs(exponent) < 20:
        return sites, 1.0
    unit = 2.0**exponent
    return sites._replace(y=sites.y / unit, within=sites.within / unit**2), unit


def in_unit_of(name: str, value: float, unit: float) -> float:
    """The criterion of y, from that of y in the unit."""
    return value + 2 * math.log(unit) if name == "aicc" else value * unit**2


def value_of(name: str, sites: Sites, w: Tensor, degree: int) -> float:
    """The criterion at w (D,) as a number, of y in any unit."""
    judged, unit = in_own_unit(sites)
    with torch.no_grad():
        return in_unit_of(name, float(criterion_of(name, judged, w, degree)), unit)


def _criterion(name: str, sites: Sites, others: Tensor, log_q: Tensor) -> Tensor:
    mass, unit, copies = sites.mass, sites.unit, sites.copies
    q = log_q.exp()
    alone = mass == unit
    error = others - sites.y
    rest, whole = q + mass - unit, q + mass  # the weight that predicts an observation: all others, all
    if name == "loo":
        rest = torch.where(alone, 1.0, rest)
        pull = torch.where(alone, 1.0, q / rest).unsqueeze(-1)
        swell = torch.where(alone, 1.0, whole / rest).unsqueeze(-1)
        squares = copies.unsqueeze(-1) * (pull * error).square() + swell.square() * sites.within
        return (unit.unsqueeze(-1) * squares).sum() / (mass.sum() * error.shape[-1])
    squares, freedom = _in_sample(sites, error, q)
    variance, count = squares / mass.sum(), copies.sum()
    if name == "gcv":
        return (variance / (freedom / count).square()).mean()
    trace = count - freedom
    if not bool(freedom > 2):
        return torch.full_like(trace, math.inf) + 0 * trace
    smallest = torch.finfo(variance.dtype).tiny
    return variance.clamp_min(smallest).log().mean() + 1 + 2 * (trace + 1) / (freedom - 2)


def _in_sample(sites: Sites, error: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums of squared residuals of the fit to all observations (C,), and n - tr H."""
    whole = q + sites.mass
    pull = (q / whole).unsqueeze(-1)
    squares = sites.within + sites.copies.unsqueeze(-1) * (pull * error).double().square()
    freedom = (sites.copies * (whole - sites.unit) / whole).sum()
    return (sites.unit.unsqueeze(-1) * squares).sum(0), freedom


def in_sample(sites: Sites, w: Tensor, degree: int) -> tuple[Tensor, float]:
    """Weighted sums of squared residuals of the fit to all observations, (C,), and the trace of the hat matrix."""
    if len(sites.x) == 1:
        return (sites.unit.unsqueeze(-1) * sites.within).sum(0), 1.0
    with torch.no_grad():
        others, log_q = smooth(sites.x, sites, w, degree, True)
        squares, freedom = _in_sample(sites, others - sites.y, log_q.exp())
    return squares, float(sites.copies.sum() - freedom)
