"""A bandwidth for sites: by the search or a rule of thumb, with the reasons why it lies on a bound."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import RULES
from .criteria import in_own_unit, in_unit_of, value_of
from .search import LEVEL, Search, data_bounds
from .sites import Sites

MOST_WIDENED = (
    1 << 15
)  # sites in float32 that are judged in float64, where the criterion has no noise to descend through
_Log = NDArray[np.float64]


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

    def unsearched(bandwidth: _Log, loss: float, note: str) -> BandwidthSelection:
        nothing = np.zeros((0, len(varies))), np.zeros(0)
        at_bound = (None,) * len(varies)
        return BandwidthSelection(
            bandwidth, loss, criterion, degree, lower, upper, at_bound, note, 0, nothing
        )

    if criterion in RULES:
        return unsearched(rule_of_thumb(sites, criterion), math.nan, "")
    if float(sites.copies.sum()) < 2:
        raise ValueError(
            f"criterion {criterion!r} leaves one observation out and needs two at least, got n_samples = 1: "
            "give a bandwidth as a number"
        )
    if not varies.any():
        note = "all observations have the same x: no bandwidth matters"
        return unsearched(np.ones(len(varies)), math.nan, note)
    if bool((sites.y == sites.y[0]).all()) and not bool(sites.within.count_nonzero()):
        loss = value_of(criterion, sites, torch.from_numpy(1 / upper).to(sites.x), degree)
        return unsearched(upper, loss, "all observations have the same y: every bandwidth fits it")
    if len(sites.x) <= MOST_WIDENED:
        sites = sites.double()
    observed = sites
    sites, unit = in_own_unit(sites)
    search = Search(sites, criterion, degree, lower, upper, np.flatnonzero(varies), _bar(progress))
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
    values = np.array([in_unit_of(criterion, search.known[k][1], unit) for k in order])
    path = np.exp([search.known[k][0] for k in order]), values
    # Of the bandwidth as it is given back: where a row of a local line hangs on one key, the next number has another.
    loss = value_of(criterion, observed, torch.from_numpy(1 / bandwidth).to(sites.x), degree)
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


def _explain(
    sites: Sites, search: Search, best: _Log, loss: float, degree: int
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
            level = search.value(search.scanned, place) <= value + LEVEL * abs(value)
            if level and search.scanned is not sites:
                level = search.value(sites, place) <= loss + LEVEL * abs(loss)
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
