r"""Standard errors of a fit that is linear in y, in O(n) sums.

The fit at x, its slopes and their means are sums l_j y_j, with

    l_j = p_j (alpha + beta . (x_j - E[x])),   p_j the weights of Nadaraya-Watson, E their mean,

alpha = 1, beta = 0 for a local mean; alpha = 1, beta = -S^+ e for a local line, with e and S as in
`nwfast.estimators.criteria`; alpha = 0 and a row of S^+ for its slopes; alpha = 0 and w_f^2 for those of a local mean.
With the variance v_j / a_j of y_j the variance is sum l_j^2 v_j / a_j. Squared Gaussian weights are Gaussian weights
at sqrt(2) w, so that is another fit, at that w, to v times polynomials of x; all in float64.

What a residual tells of v comes from leave-one-out fits: r_i = y_i - fit_{-i} has the variance v_i / a_i + the variance
of that fit, so that v = sum a r^2 / sum (1 + a s), s the sum of l_j^2 / a_j. It contains the squared bias of the fit.
"""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import nadaraya_watson
from .criteria import as_call, flat, geometry, smooth
from .sites import Sites


class Weights(NamedTuple):
    """Fits at M queries with what their linear weights are made of, in float64."""

    query: Tensor  # (M, D)
    fit: Tensor  # (M, C)
    lse: Tensor  # (M,)
    mean: Tensor  # E[x], (M, D)
    tilt: Tensor  # beta of the fit, (M, D)
    slope: Tensor  # (M, D, C)
    turn: Tensor  # beta of the slopes, (M, D, D)


def weights_at(
    query: Tensor, sites: Sites, w: Tensor, degree: int, exclude_self: bool, slopes: bool = True
) -> Weights:
    """The fit at query (M, D) and its linear weights; slopes of a local mean only where they are asked for."""
    sites, query, w = sites.double(), query.double(), w.double()
    x, y = as_call(sites.x, sites.y)
    at = flat(query)
    options: dict[str, Any] = dict(key_weight=sites.key_weight, exclude_self=exclude_self)
    with torch.no_grad():
        fit, lse = nadaraya_watson(at, x, y, w, return_lse=True, **options)
        if degree == 1:
            fit, slope, offset, inverse = geometry(query, sites, w, exclude_self)
            tilt = -(inverse @ offset.unsqueeze(-1)).squeeze(-1)
            return Weights(query, fit, lse, query + offset, tilt, slope, inverse)
        fit = fit.reshape(len(query), -1)
        middle = sites.x.mean(0)
        mean = nadaraya_watson(at, x, sites.x - middle, w, **options) + middle
        tilt = torch.zeros_like(mean)
        turn = w.square().diag().expand(len(query), -1, -1)
    slope = tilt.new_zeros(*tilt.shape, sites.y.shape[1])
    if slopes:
        slope = w.square().unsqueeze(-1) * _covariance(query, sites, w, exclude_self)
    return Weights(query, fit, lse, mean, tilt, slope, turn)


def _covariance(query: Tensor, sites: Sites, w: Tensor, exclude_self: bool) -> Tensor:
    """Cov(x, y) of each row, (M, D, C): the derivative of the local mean in the query, over w^2."""
    x = flat(sites.x)
    at = query.detach().clone().requires_grad_()
    columns = []
    with torch.enable_grad():
        for column in sites.y.unbind(-1):
            rows = flat(at)
            fit = nadaraya_watson(rows, x, column, w, key_weight=sites.key_weight, exclude_self=exclude_self)
            columns.append(torch.autograd.grad(fit.sum(), at)[0])
    return torch.stack(columns, -1) / w.square().unsqueeze(-1)


def squared_weights(
    rows: Weights, sites: Sites, w: Tensor, alpha: Tensor, beta: Tensor, variance: Tensor, exclude_self: bool
) -> Tensor:
    """Sum of l_j^2 v_j / a_j for l of alpha (M, L) and beta (M, L, D) and v (1, C) or (S, C): (M, L, C)."""
    sites, w = sites.double(), w.double()
    middle = sites.x.mean(0)
    places = sites.x - middle
    first, second = torch.triu_indices(places.shape[1], places.shape[1])
    powers = torch.cat([torch.ones_like(places[:, :1]), places, places[:, first] * places[:, second]], -1)
    constant = len(variance) == 1
    columns = powers if constant else (variance.unsqueeze(-1) * powers.unsqueeze(-2)).flatten(-2)
    at, columns = as_call(rows.query, columns)
    x = flat(sites.x)
    with torch.no_grad():
        sums, lse = nadaraya_watson(
            at,
            x,
            columns,
            w * 2**0.5,
            key_weight=sites.key_weight,
            exclude_self=exclude_self,
            return_lse=True,
        )
        sums = sums.reshape(len(rows.query), -1, powers.shape[1])  # (M, C or 1, powers)
        level = alpha - (beta @ (rows.mean - middle).unsqueeze(-1)).squeeze(-1)  # (M, L)
        twice = torch.where(first == second, 1.0, 2.0).to(beta) * beta[..., first] * beta[..., second]
        factors = torch.cat([level.square().unsqueeze(-1), 2 * level.unsqueeze(-1) * beta, twice], -1)
        found = (factors @ sums.mT).clamp_min(0.0)
        # No weight is above that of a single key: far away, where both logarithms are large, this is known better.
        share = (lse - 2 * rows.lse).exp().clamp(1 / float(sites.mass.sum()), 1 / float(sites.mass.min()))
        return found * share[:, None, None] * (variance if constant else 1.0)


def bias_at(query: Tensor, sites: Sites, w: Tensor, degree: int) -> Tensor:
    """An estimate (M, C) of the bias at query: what smoothing does to the fit, as it did to the regression function."""
    sites, query, w = sites.double(), query.double(), w.double()
    with torch.no_grad():
        fitted, _ = smooth(sites.x, sites, w, degree, False)
        both = torch.cat([sites.y, fitted.to(sites.y)], -1)
        found, _ = smooth(query, sites._replace(y=both), w, degree, False)
        once, twice = found.chunk(2, -1)
    return twice - once


def fit_errors(
    rows: Weights, sites: Sites, w: Tensor, variance: Tensor, exclude_self: bool = False
) -> Tensor:
    """Variances (M, C) of the fits."""
    one = torch.ones_like(rows.tilt[:, :1])
    return squared_weights(rows, sites, w, one, rows.tilt.unsqueeze(-2), variance, exclude_self).squeeze(-2)


def slope_errors(rows: Weights, sites: Sites, w: Tensor, variance: Tensor) -> Tensor:
    """Variances (M, D, C) of the slopes."""
    return squared_weights(rows, sites, w, torch.zeros_like(rows.tilt), rows.turn, variance, False)


def residual_variance(sites: Sites, w: Tensor, degree: int, constant: bool) -> Tensor:
    """The variance of an observation of weight 1, (1, C); or one for each place, (S, C)."""
    sites = sites.double()
    if len(sites.x) == 1:
        freedom = sites.copies - 1
        return torch.where(freedom > 0, sites.unit * sites.within / freedom, torch.nan)
    with torch.no_grad():
        others, log_q = smooth(sites.x, sites, w.double(), degree, True)
    rows = weights_at(sites.x, sites, w, degree, True, slopes=False)
    spread = fit_errors(rows, sites, w, torch.ones_like(others[:1, :1]), exclude_self=True)  # (S, 1)
    q = log_q.exp().unsqueeze(-1)
    mass, unit, copies = (part.unsqueeze(-1) for part in (sites.mass, sites.unit, sites.copies))
    alone = mass == unit
    rest = torch.where(alone, 1.0, q + mass - unit)
    # The fit without one observation: that without its place, drawn to the mean of the others there.
    pull = torch.where(alone, 1.0, q / rest)
    swell = torch.where(alone, 1.0, (q + mass) / rest)
    squares = unit * ((pull * (others - sites.y)).square() + swell.square() * sites.within / copies)
    kin = torch.where(alone, 0.0, (1 - pull).square() / (mass - unit).clamp_min(1e-300))
    expected = 1 + unit * (pull.square() * spread + kin)
    if not constant:
        return squares / expected
    return (copies * squares).sum(0, keepdim=True) / (copies * expected).sum(0, keepdim=True)


def mean_slope(sites: Sites, w: Tensor, degree: int, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the slopes over all observations, (D, C), and its variance, (D, C).

    It is a sum c_j y_j, whose c_j are transposed sums: the gradient of a fit in its values.
    """
    sites, w = sites.double(), w.double()
    rows = weights_at(sites.x, sites, w, degree, False)
    share = sites.mass / sites.mass.sum()
    average = (share[:, None, None] * rows.slope).sum(0)
    middle = sites.x.mean(0)
    places = sites.x - middle
    at = flat(sites.x)
    found = []
    for feature in range(places.shape[1]):
        beta = rows.turn[:, feature]  # (S, D)
        values = torch.zeros(len(places), 1 + places.shape[1], dtype=places.dtype, device=places.device)
        values.requires_grad_()
        cotangent = share.unsqueeze(-1) * torch.cat(
            [-(beta * (rows.mean - middle)).sum(-1, keepdim=True), beta], -1
        )
        with torch.enable_grad():
            fit = nadaraya_watson(at, at, values, w, key_weight=sites.key_weight)
            (grad,) = torch.autograd.grad(fit, values, cotangent)
        weight = grad[:, 0] + (places * grad[:, 1:]).sum(-1)
        found.append((weight.square().unsqueeze(-1) * variance / sites.mass.unsqueeze(-1)).sum(0))
    return average, torch.stack(found)


def student_quantile(freedom: float, share: float) -> float:
    """The quantile of Student's distribution.

    Of 10,000 degrees of freedom and more by Fisher's expansion (Abramowitz and Stegun 26.7.5), whose next term is below
    rounding there, so that bands of many observations need not wait for the import of SciPy.
    """
    if freedom < 1e4:
        from scipy.special import stdtrit

        return float(stdtrit(freedom, share))
    z = float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))
    terms = (
        (4, 1, 1),
        (96, 5, 16, 3),
        (384, 3, 19, 17, -15),
        (92160, 79, 776, 1482, -1920, -945),
    )
    found = z
    for k, (divisor, *factors) in enumerate(terms, 1):
        found += (
            z
            * reduce(lambda total, factor: total * z * z + factor, map(float, factors))
            / (divisor * freedom**k)
        )
    return found
