"""`select_bandwidth`: the bandwidth of least cross-validation, found by a scan and then by descent.

The scan looks at a grid of bandwidths, spaced evenly in their logarithm between bounds that the data give: of one to
three features the full grid, of more a line (all features in proportion), each feature alone left out or kept, and a
Sobol sequence. The lowest minima are followed down by L-BFGS-B, with exact derivatives. Of many observations the scan
takes a sample, whose best bandwidths, brought to the full number by the rate n^(-1/(D + 4)), start the descent on all.
What is narrower than a sample can judge is scanned on runs of neighbours, with several features on all observations.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from torch import Tensor

from . import CRITERIA, RULES
from .criteria import criterion_of
from .frames import to_tensor
from .sites import Sites, sites_of

_WIDEST = 10.0  # times the range: wider, weights differ by less than half a percent
_SAMPLE = {1: 1 << 16, 2: 1 << 13, 3: 1 << 11}  # observations that a scan takes, by the number of features
_MOST_SAMPLE = 1 << 11
_LEVELS = {2: 12, 3: 7}  # of a feature in a full grid
_MORE_LEVELS = {2: 4, 3: 1}  # where the criterion costs little, and is rough
_STEP = 1.3  # between bandwidths of a scan in one feature
_SOBOL = 32
_STARTS = 4  # minima of the scan that are followed
_STARTS_OF_MANY = 2
_FACTORS = 0.5, 0.63, 0.8, 1.25, 1.6, 2.0  # of a minimum: where a lower one may be
_FACTORS_OF_MANY = 0.5, 2.0
_ROUNDS = 6
_LEEWAY = 0.15  # of the best, above which a minimum of the scan may lie to be followed
_NOISE = 0.05  # by which the criterion of a sample may be off
_LEVEL = 1e-7  # by which a criterion may vary over a level stretch
_FLAT = 1e-9  # relative differences of a criterion that say nothing
_Log = NDArray[np.float64]
_End = tuple[_Log, float]  # logarithms of bandwidths, (D,), and the criterion there


@dataclass(frozen=True)
class BandwidthSelection:
    """A bandwidth and how it was found.

    ``float(selection)`` is the bandwidth where there is one feature.
    """

    bandwidth: Any  #: h = 1 / w in the unit of x, a number for x (n,), else (D,); a tensor where x is one
    loss: float  #: the criterion there, NaN for a rule of thumb
    criterion: str  #: "loo", "gcv", "aicc", "silverman" or "scott"
    degree: int  #: of the local polynomial
    lower: NDArray[np.float64]  #: bounds of the search, (D,)
    upper: NDArray[np.float64]  #: likewise
    at_bound: tuple[str | None, ...]  #: for each feature "lower", "upper" or None
    note: str  #: why the minimum lies on a bound, in words; empty where it does not
    evaluations: int  #: of the criterion, on all observations and on samples
    path: tuple[NDArray[np.float64], NDArray[np.float64]] = field(repr=False)
    """Bandwidths (k, D) where the criterion of all observations is known, and its values (k,), ascending."""

    @property
    def w(self) -> Any:
        """The inverse bandwidth 1 / h."""
        return 1.0 / self.bandwidth

    def __float__(self) -> float:
        return float(np.asarray(self.bandwidth).reshape(-1).item())


def select_bandwidth(
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    *,
    criterion: str = "loo",
    degree: int = 0,
    key_weight: ArrayLike | Tensor | None = None,
    bounds: tuple[ArrayLike, ArrayLike] | None = None,
    progress: bool | None = None,
) -> BandwidthSelection:
    r"""The bandwidth of a regression of y on x, one for each feature, that minimises a criterion.

    .. math:: h^* = \arg\min_h \frac1n \sum_i (\hat y_{-i}(h) - y_i)^2, \qquad h = 1 / w,

    is that of ``criterion="loo"``, with the fit to all observations but i, as in `leave_one_out_loss`.

    Parameters
    ----------
    x : array or Tensor
        Observed inputs, (n,) or (n, D), finite.
    y : array or Tensor
        Observed outputs, (n,) or (n, C), finite. Several outputs share the bandwidth.
    criterion : {"loo", "gcv", "aicc", "silverman", "scott"}
        "loo": leave-one-out squared error. "gcv": generalised cross-validation, sigma^2 / (1 - tr H / n)^2. "aicc":
        log sigma^2 + 1 + 2 (tr H + 1) / (n - tr H - 2), the corrected Akaike criterion. sigma^2 is the mean squared
        residual and H the hat matrix, whose trace is exact. The rules of thumb look at x alone: "scott" is
        s n^(-1/(D + 4)), with the standard deviation s of each feature, "silverman" that times
        ((D + 2) / 4)^(-1/(D + 4)).
    degree : {0, 1}
        0 for `nadaraya_watson`, 1 for `local_linear`.
    key_weight : array or Tensor, optional
        Weights a_i >= 0, (n,). Whole numbers are counts: an observation of weight 3 is three equal ones, of which one
        is left out at a time. Others are precisions, the inverse of a variance up to a factor, and an observation is
        left out whole. Divide whole numbers that are no counts by their mean.
    bounds : (lower, upper), optional
        Of the bandwidths, numbers or (D,). Default: from half of the tenth percentile of the gaps between neighbours,
        feature by feature, to ten times the range.
    progress : bool, optional
        Show a progress bar (tqdm); by default on a terminal, for selections of more than two seconds.

    Returns
    -------
    BandwidthSelection
        Its `bandwidth` has the form of a row of x. Where the minimum lies on a bound, `at_bound` says so for each
        feature and `note` why, and a UserWarning is given if that bound is the lower one or all features lie on the
        upper one. Deterministic: the same data give the same bandwidth.

    Raises
    ------
    TypeError, ValueError
        Not numbers, not finite, shapes that do not fit, less than two observations, unknown criterion or degree.

    Notes
    -----
    The scan has steps of a factor 1.3 with one feature, where a minimum that is narrower can be missed. A feature that
    is constant cannot matter, and gets the bandwidth 1. Time: some 60 to 100 evaluations of the criterion, of more
    than 65,536 observations (with two features 8,192, with more 2,048) most of them on a sample.

    References
    ----------
    Hardle and Marron (1985), "Optimal Bandwidth Selection in Nonparametric Regression Function Estimation"; Craven and
    Wahba (1979), "Smoothing Noisy Data with Spline Functions"; Hurvich, Simonoff and Tsai (1998), "Smoothing Parameter
    Selection in Nonparametric Regression Using an Improved Akaike Information Criterion"; Scott (1992), "Multivariate
    Density Estimation".

    Examples
    --------
    >>> import numpy as np, nwfast
    >>> x = np.linspace(0, 10, 200)
    >>> y = np.sin(x) + 0.2 * np.random.default_rng(0).standard_normal(200)
    >>> selection = nwfast.select_bandwidth(x, y)
    >>> 0.1 < float(selection) < 0.5
    True
    """
    if criterion not in (*CRITERIA, *RULES):
        raise ValueError(
            f"criterion must be one of {', '.join(map(repr, (*CRITERIA, *RULES)))}, got {criterion!r}"
        )
    if degree not in (0, 1):
        raise ValueError(f"degree must be 0 or 1, got {degree!r}")
    inputs, outputs, weight = _tensors(x, y, key_weight)
    limits = None if bounds is None else _given_bounds(bounds, inputs.shape[1])
    found = select(sites_of(inputs, outputs, weight), criterion, degree, limits, progress)
    bandwidth: Any = np.asarray(found.bandwidth)
    if isinstance(x, Tensor):
        bandwidth = torch.as_tensor(bandwidth, dtype=inputs.dtype, device=x.device)
    single = (x.ndim if isinstance(x, Tensor) else np.ndim(x)) == 1
    return replace(found, bandwidth=bandwidth[0] if single else bandwidth)


def select(
    sites: Sites,
    criterion: str,
    degree: int,
    bounds: tuple[_Log, _Log] | None = None,
    progress: bool | None = None,
) -> BandwidthSelection:
    """As `select_bandwidth`, of sites; the bandwidth is an array (D,)."""
    lower, upper = data_bounds(sites) if bounds is None else bounds
    varies = (sites.x.amax(0) > sites.x.amin(0)).cpu().numpy()
    nothing = np.zeros((0, sites.x.shape[1])), np.zeros(0)
    if criterion in RULES:
        rule = rule_of_thumb(sites, criterion)
        none = (None,) * len(rule)
        return BandwidthSelection(rule, math.nan, criterion, degree, lower, upper, none, "", 0, nothing)
    if float(sites.copies.sum()) < 2:
        raise ValueError(
            f"criterion {criterion!r} leaves one observation out and needs two at least, got n_samples = 1: "
            "give a bandwidth as a number"
        )
    if not varies.any():
        note = "all observations have the same x: no bandwidth matters"
        ones, none = np.ones(len(varies)), (None,) * len(varies)
        return BandwidthSelection(ones, math.nan, criterion, degree, lower, upper, none, note, 0, nothing)
    search = _Search(sites, criterion, degree, lower, upper, np.flatnonzero(varies), _bar(progress))
    try:
        best, loss = search.run()
    finally:
        search.bar.close()
    at_bound, note = _explain(sites, search, best, loss, degree)
    if note and ("lower" in at_bound or all(side == "upper" for side in np.array(at_bound)[varies])):
        warnings.warn(note, UserWarning, stacklevel=3)
    bandwidth = np.exp(best)
    bandwidth[~varies] = 1.0
    order = np.argsort([value for _, value in search.known], kind="stable")
    path = np.exp([search.known[k][0] for k in order]), np.array([search.known[k][1] for k in order])
    return BandwidthSelection(
        bandwidth, loss, criterion, degree, lower, upper, at_bound, note, search.evaluations, path
    )


def rule_of_thumb(sites: Sites, rule: str) -> _Log:
    """Bandwidths (D,) of a normal reference by the standard deviations of the features."""
    x, mass = sites.x.double(), sites.mass.double()
    share = mass / mass.sum()
    count, features = float(sites.copies.sum()), x.shape[1]
    centred = x - share @ x
    deviation = (share @ centred.square()).mul(count / max(count - 1, 1)).sqrt().cpu().numpy()
    factor = count ** (-1 / (features + 4))
    if rule == "silverman":
        factor *= ((features + 2) / 4) ** (-1 / (features + 4))
    return np.where(deviation > 0, deviation * factor, 1.0)


def data_bounds(sites: Sites) -> tuple[_Log, _Log]:
    """The narrowest bandwidths that can matter and the widest, (D,) each, feature by feature."""
    lower: list[float] = []
    upper: list[float] = []
    for column in sites.x.T:
        values = column if sites.x.shape[1] == 1 else column.sort().values
        gaps = values.diff()
        gaps = gaps[gaps > 0].double().cpu().numpy()
        reach = float(values[-1]) - float(values[0])
        if not len(gaps) or not math.isfinite(reach):
            lower.append(1.0)
            upper.append(1.0)
            continue
        smallest = float(np.finfo(np.float32).eps) * reach / 16
        lower.append(max(float(np.quantile(gaps, 0.1)) / 2, smallest))
        upper.append(_WIDEST * reach)
    return np.array(lower), np.array(upper)


class _Search:
    """The search for one minimum, in logarithms of the bandwidths, over the features that vary."""

    def __init__(
        self, sites: Sites, criterion: str, degree: int, lower: _Log, upper: _Log, features: Any, bar: Any
    ):
        self.sites, self.criterion, self.degree = sites, criterion, degree
        self.lower, self.upper = np.log(lower), np.log(upper)
        self.features, self.bar = features, bar
        reach = (sites.x.amax(0) - sites.x.amin(0)).double().cpu().numpy()
        self.reach = np.log(reach[features])
        self.evaluations = 0
        self.scanned = sites
        self.known: list[tuple[_Log, float]] = []  # values on all observations

    def run(self) -> _End:
        """Logarithms of the best bandwidths, (D,), and the criterion there."""
        count, dims = len(self.sites.x), len(self.features)
        most = _SAMPLE.get(dims, _MOST_SAMPLE)
        small = self.sites if count <= 2 * most else _sample(self.sites, most)
        whole = small is self.sites
        self.scanned = small
        starts = self._scan(small)
        if whole and dims == 1:
            ends = [self._descend(small, start, box) for start, _, box in starts]
        else:
            # In many features a tenth of a thousandth of the loss is not worth as many steps again.
            loose = 1.0 if dims <= 3 else 1e3
            ends = _distinct([self._descend(small, start, box, loose) for start, _, box in starts])
            ends[0] = self._settle(small, ends[0], _FACTORS if dims <= 3 else _FACTORS_OF_MANY, loose)
            ends = ends if whole else self._on_all(small, ends)
        best = min(value for _, value in ends)
        # Of equals the widest: it is the smoother fit, and rounding does not choose.
        equal = [end for end in ends if end[1] <= best + _FLAT * abs(best)]
        return max(equal, key=lambda end: float(end[0].sum()))

    def value(self, sites: Sites, place: _Log, degree: int | None = None) -> float:
        degree = self.degree if degree is None else degree
        with torch.no_grad():
            found = float(criterion_of(self.criterion, sites, self._w(sites, place), degree))
        return self._note(place, found, sites is self.sites and degree == self.degree)

    def slope(self, sites: Sites, place: _Log) -> tuple[float, _Log]:
        """The criterion and its derivatives in the logarithms of the bandwidths."""
        w = self._w(sites, place).requires_grad_()
        with torch.enable_grad():
            found = criterion_of(self.criterion, sites, w, self.degree)
            (grad,) = torch.autograd.grad(found, w) if found.requires_grad else (torch.zeros_like(w),)
        gradient = -(grad * w.detach()).double().cpu().numpy()
        return self._note(place, float(found.detach()), sites is self.sites), np.nan_to_num(
            gradient, posinf=0, neginf=0
        )

    def _w(self, sites: Sites, place: _Log) -> Tensor:
        return torch.from_numpy(np.exp(-place)).to(sites.x)

    def _note(self, place: _Log, found: float, of_all: bool) -> float:
        self.evaluations += 1
        self.bar.update()
        found = found if found == found else math.inf
        if of_all:
            self.known.append((place.copy(), found))
        return found

    def _scan(self, sites: Sites) -> list[tuple[_Log, float, Any]]:
        """The lowest minima of a grid, best first, each with the box that it is the minimum of."""
        lower, upper = self.lower, self.upper
        if sites is not self.sites:
            lower = np.maximum(lower, np.minimum(np.log(data_bounds(sites)[0]), upper))
        low, high = lower[self.features], upper[self.features]
        dims = len(self.features)
        if dims > 1:  # neighbours in all features at once are further apart than in one; in some, less so
            low = np.minimum(np.maximum(low, self.reach - math.log(2 * len(sites.x) ** (1.5 / dims))), high)
        if dims > 3:
            return self._scan_many(sites, low, high)
        levels = _LEVELS.get(dims, 0) + (len(sites.x) <= 1000) * _MORE_LEVELS.get(dims, 0) or max(
            3, 1 + math.ceil(float((high - low)[0]) / math.log(_STEP))
        )
        axes = [np.linspace(a, b, levels) for a, b in zip(low, high, strict=True)]
        places = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, dims)
        self.bar.total = len(places) + 40
        values = np.array([self.value(sites, self._full(place)) for place in places])
        shaped = values.reshape((levels,) * dims)
        around = np.full((levels + 2,) * dims, np.inf)
        around[(slice(1, -1),) * dims] = shaped
        minimum = np.ones_like(shaped, dtype=bool)
        for axis in range(dims):
            for shift in (0, 2):
                cut = [slice(1, -1)] * dims
                cut[axis] = slice(shift, shift + levels)
                minimum &= shaped <= around[tuple(cut)]
        lowest = np.flatnonzero(minimum.ravel())
        lowest = lowest[np.argsort(values[lowest], kind="stable")][:_STARTS]
        best = values[lowest[0]]
        found = [k for k in lowest if values[k] <= best + _LEEWAY * abs(best)]
        step = (high - low) / (levels - 1)
        return [
            (
                self._full(places[k]),
                float(values[k]),
                (
                    self._full(np.maximum(places[k] - step, low)),
                    self._full(np.minimum(places[k] + step, high)),
                )
                if dims == 1
                else None,
            )
            for k in found
        ]

    def _scan_many(self, sites: Sites, low: _Log, high: _Log) -> list[tuple[_Log, float, Any]]:
        from scipy.stats import qmc  # half a second of imports, for many features alone

        dims = len(low)
        line = np.linspace(0, 1, 9)[:, None] * np.ones(dims)
        sobol = qmc.Sobol(dims, scramble=False).random(_SOBOL)
        self.bar.total = len(line) + 2 * dims + len(sobol) + 40 * _STARTS_OF_MANY

        def look(shares: _Log) -> list[tuple[_Log, float, Any]]:
            places = [self._full(low + share * (high - low)) for share in shares]
            # Of local means, which cost a small part of what lines in many features do.
            return [(place, self.value(sites, place, degree=0), None) for place in places]

        found = look(line)
        best = line[int(np.argmin([value for _, value, _ in found]))]
        found += look(np.where(np.eye(dims, dtype=bool), 1.0, best))  # each feature alone left out
        found += look(np.where(np.eye(dims, dtype=bool), best, 1.0))  # each alone
        found += look(sobol)
        return sorted(found, key=lambda start: start[1])[:_STARTS_OF_MANY]

    def _full(self, place: _Log) -> _Log:
        full = self.lower.copy()
        full[self.features] = place
        return full

    def _descend(self, sites: Sites, start: _Log, box: Any, loose: float = 1.0) -> _End:
        """The minimum that is reached from a place, within a box or the bounds."""
        low, high = (self.lower, self.upper) if box is None else box
        low, high = low[self.features], high[self.features]
        scale: float | None = None
        best: list[tuple[float, _Log]] = []

        def function(place: _Log) -> tuple[float, _Log]:
            nonlocal scale
            value, gradient = self.slope(sites, self._full(place))
            if not math.isfinite(value):
                return 1e10, np.zeros_like(place)
            best.append((value, place.copy()))
            if scale is None:  # so that tolerances are relative, but of a logarithm absolute
                scale = 1.0 if self.criterion == "aicc" else 1 / abs(value) if value else 1.0
            return value * scale, gradient[self.features] * scale

        minimize(
            function,
            np.clip(start[self.features], low, high),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(low, high, strict=True)),
            options=dict(ftol=1e-9 * loose, gtol=1e-6 * loose, maxiter=100 if len(low) <= 3 else 50),
        )
        if not best:
            return start, math.inf
        value, place = min(best, key=lambda pair: pair[0])
        return self._full(place), value

    def _settle(self, sites: Sites, end: _End, factors: tuple[float, ...], loose: float) -> _End:
        """From one minimum to a lower one nearby, as long as there is one: bandwidths of few places are judged roughly.

        With several features, outlying observations whose leave-one-out lines hang on two or three others make many
        shallow minima; so does noise of heavy tails among many observations.
        """
        dims = len(self.features)
        moves = (
            np.ones((1, dims))
            if dims == 1 or len(factors) < 3
            else np.concatenate([np.ones((1, dims)), np.eye(dims)])
        )
        for _ in range(_ROUNDS):
            low, high = self.lower[self.features], self.upper[self.features]
            places = [
                self._full(np.clip(end[0][self.features] + math.log(factor) * move, low, high))
                for move in moves
                for factor in factors
            ]
            values = [self.value(sites, place) for place in places]
            k = int(np.argmin(values))
            if not values[k] < end[1] - _LEVEL * abs(end[1]):
                break
            end = min(
                self._descend(sites, places[k], None, loose),
                (places[k], values[k]),
                key=lambda found: found[1],
            )
        return end

    def _on_all(self, small: Sites, starts: list[_End]) -> list[_End]:
        """From minima of the sample to those of all observations."""
        dims = len(self.features)
        rate = math.log(len(small.x) / len(self.sites.x)) / (dims + 4)
        found: list[_End] = []
        for start, value in starts[:2]:
            inner = (start > self.lower + 0.5) & (start < self.upper - 0.5)
            place = np.clip(np.where(inner, start + rate, start), self.lower, self.upper)
            found.append((place, value))
        found += self._narrow(small)
        best = min(value for _, value in found)
        places = [place for place, value in found if value <= best + _NOISE * abs(best)]
        values = [self.value(self.sites, place) for place in places]
        best = min(values)
        taken = [k for k in np.argsort(values, kind="stable")[:2] if values[k] <= best + 0.002 * abs(best)]
        ends = [self._descend(self.sites, places[k], None, loose=1e3) for k in taken]
        return [self._settle(self.sites, min(ends, key=lambda end: end[1]), _FACTORS_OF_MANY, 1e3)]

    def _narrow(self, small: Sites) -> list[_End]:
        """Candidates that are narrower than what a sample with large gaps can judge."""
        dims = len(self.features)
        low, high = (self.reach - math.log(count) / dims for count in (len(self.sites.x), len(small.x) / 4))
        low, high = (
            np.clip(end, self.lower[self.features], self.upper[self.features]) for end in (low, high)
        )
        if np.all(low == high):
            return []
        if dims == 1:  # runs of neighbours are all that a narrow bandwidth looks at
            sites, step = _runs(self.sites, len(small.x)), math.log(_STEP)
        else:
            sites, step = self.sites, math.log(4)
        steps = max(1, round(float((high - low)[0]) / step))
        shares = np.arange(steps) / steps
        places = [self._full(low + share * (high - low)) for share in shares]
        values = [self.value(sites, place) for place in places]
        k = int(np.argmin(values))
        return [(places[k], values[k])]


def _sample(sites: Sites, most: int) -> Sites:
    """A random sample of the places, the same for the same number, in their order."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(sites.x), generator=generator)[:most].sort().values.to(sites.x.device)
    return sites.each(lambda part: part[chosen])


def _runs(sites: Sites, most: int) -> Sites:
    """Runs of neighbouring places, evenly spread."""
    length = 1024
    starts = torch.linspace(0, len(sites.x) - length, most // length, dtype=torch.float64).long()
    chosen = (starts[:, None] + torch.arange(length)).reshape(-1).to(sites.x.device)
    return sites.each(lambda part: part[chosen])


def _distinct(ends: list[_End]) -> list[_End]:
    """Without those that reached the same minimum as a better one, best first."""
    kept: list[_End] = []
    for end in sorted(ends, key=lambda end: end[1]):
        if all(np.abs(end[0] - other[0]).max() > 0.05 for other in kept):
            kept.append(end)
    return kept


def _explain(
    sites: Sites, search: _Search, best: _Log, loss: float, degree: int
) -> tuple[tuple[str | None, ...], str]:
    """On which bounds the minimum lies, and why."""
    sides: list[str | None] = [None] * len(best)
    value = loss if search.scanned is sites else search.value(search.scanned, best)
    for feature in search.features:
        for side, bound in (("lower", search.lower), ("upper", search.upper)):
            place = best.copy()
            place[feature] = bound[feature]
            # A level stretch that reaches to the bound is on it.
            near = abs(best[feature] - bound[feature]) < 1e-3
            level = search.value(search.scanned, place) <= value + _LEVEL * abs(value)
            if level and search.scanned is not sites:
                level = search.value(sites, place) <= loss + _LEVEL * abs(loss)
            if near or level:
                sides[feature] = side
                break
    if not any(sides):
        return tuple(sides), ""
    name = (lambda k: "x") if len(best) == 1 else (lambda k: f"feature {k}")
    parts = []
    for feature in np.flatnonzero([side == "upper" for side in sides]):
        shape = "mean" if degree == 0 else "line"
        parts.append(
            f"the bandwidth of {name(feature)} is as wide as it may be: the criterion is least with one {shape} over "
            "all of it"
        )
    for feature in np.flatnonzero([side == "lower" for side in sides]):
        parts.append(
            f"the bandwidth of {name(feature)} is as narrow as it may be: {_why_narrow(sites, feature)}"
        )
    return tuple(sides), "; ".join(parts)


def _why_narrow(sites: Sites, feature: Any) -> str:
    values = sites.x[:, feature].sort().values.double()
    count, tied = float(sites.copies.sum()), float(sites.copies[sites.copies > 1].sum())
    if tied > count / 10:
        return (
            f"{tied:.0f} of {count:.0f} observations share their x with others (ties; weights that are whole numbers "
            "count as such), and the mean of those predicts best"
        )
    gaps = values.diff()
    gaps = gaps[gaps > 0]
    smallest = gaps.median() if len(gaps) else values.new_tensor(1.0)
    steps = gaps / smallest
    if len(gaps) and bool(((steps - steps.round()).abs() < 1e-3 * steps.clamp_min(1.0)).all()):
        return (
            f"x lies on a lattice of spacing {float(smallest):.4g}, and all bandwidths far below it give the mean of "
            "the nearest neighbours, which predicts best (y has little noise, or oscillates from point to point)"
        )
    return "the nearest neighbours predict best (y has little noise, or observations are repeated with small changes)"


def _tensors(x: Any, y: Any, weight: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """X (n, D), y (n, C) and weights (n,) of one floating dtype, checked."""
    found = []
    for name, given in (("x", x), ("y", y), ("key_weight", weight)):
        if given is None and name == "key_weight":
            break
        tensor = given.detach() if isinstance(given, Tensor) else _from_array(name, given)
        if tensor.is_complex():
            raise TypeError(f"{name} must be real, got {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity (leave such observations out)")
        found.append(tensor)
    double = any(part.dtype not in (torch.float32, torch.float16, torch.bfloat16) for part in found[:2])
    dtype = torch.float64 if double else torch.float32
    inputs, outputs = (part.to(dtype) for part in found[:2])
    weights = found[2].to(dtype) if len(found) == 3 else None
    if inputs.ndim not in (1, 2) or outputs.ndim not in (1, 2):
        raise ValueError(
            "x must have shape (n,) or (n, D) and y (n,) or (n, C), "
            f"got {tuple(inputs.shape)} and {tuple(outputs.shape)}"
        )
    count = len(inputs)
    if len(outputs) != count or (weights is not None and weights.shape != (count,)):
        shapes = [tuple(part.shape) for part in found]
        raise ValueError(f"x, y and key_weight must be of the same n, got {', '.join(map(str, shapes))}")
    if count == 0 or inputs.shape[-1] == 0:
        raise ValueError(f"x must not be empty, got {tuple(inputs.shape)}")
    if weights is not None and not bool((weights >= 0).all() and (weights > 0).any()):
        raise ValueError("key_weight must not be negative, and not all weights zero")
    inputs = inputs.reshape(count, -1)
    return inputs, outputs.reshape(count, -1), weights


def _from_array(name: str, given: Any) -> Tensor:
    array = np.asarray(given)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    return to_tensor(array)


def _given_bounds(bounds: tuple[ArrayLike, ArrayLike], features: int) -> tuple[_Log, _Log]:
    lower, upper = (np.broadcast_to(np.asarray(bound, dtype=np.float64), features).copy() for bound in bounds)
    if not (np.all(lower > 0) and np.all(lower <= upper) and np.all(np.isfinite(upper))):
        raise ValueError(f"bounds must be 0 < lower <= upper, both finite, got {bounds}")
    return lower, upper


def _bar(progress: bool | None) -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        if progress:
            raise
        return _NoBar()
    disable = None if progress is None else not progress  # None: only where there is a terminal
    return tqdm(desc="bandwidth", unit="fit", delay=2.0, leave=False, disable=disable)


class _NoBar:
    """A bar that shows nothing."""

    total = 0
    update: Callable[..., None] = staticmethod(lambda *_: None)
    close = update
