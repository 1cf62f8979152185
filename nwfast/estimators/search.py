"""The search for the bandwidth of least criterion: a scan, and descents from its lowest minima.

The scan looks at a grid of bandwidths, spaced evenly in their logarithm between bounds that the data give: of one to
three features the full grid, of more a line (all features in proportion), each feature alone left out or kept, and a
Sobol sequence. The lowest minima are followed down with exact derivatives: in one feature, between neighbours of
the grid, by secants, else by L-BFGS-B. Of many observations the scan takes a sample, whose best bandwidths, brought to
the full number by the rate n^(-1/(D + 4)), start the descent on all. What is narrower than a sample can judge is
scanned on runs of neighbours, with several features on all observations.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .criteria import criterion_of
from .sites import Sites

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
_STEPS = 40  # of a descent in one feature, of which some five are taken
_LEEWAY = 0.15  # of the best, above which a minimum of the scan may lie to be followed
_NOISE = 0.05  # by which the criterion of a sample may be off
LEVEL = 1e-7  # by which a criterion may vary over a level stretch
_FLAT = 1e-9  # relative differences of a criterion that say nothing
_Log = NDArray[np.float64]
_End = tuple[_Log, float]  # logarithms of bandwidths, (D,), and the criterion there


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


class Search:
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
        """The criterion at a place."""
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
        """The minimum that is reached from a place, within a box (of one feature) or the bounds."""
        if box is not None:
            return self._descend_in(sites, start, box)
        from scipy.optimize import (
            minimize,  # half a second of imports, which few bandwidths of one feature need
        )

        low, high = self.lower[self.features], self.upper[self.features]
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

    def _descend_in(self, sites: Sites, start: _Log, box: tuple[_Log, _Log]) -> _End:
        """The minimum in a box around the lowest of three neighbours, of one feature.

        A zero of the derivative, by secants, and by halves where a secant leaves what is known to hold the minimum.
        """
        (feature,) = self.features
        place, ends = float(start[feature]), [float(end[feature]) for end in box]
        best = start, math.inf
        last: tuple[float, float] | None = None
        for _ in range(_STEPS):
            at = start.copy()
            at[feature] = place
            value, gradient = self.slope(sites, at)
            slope, gain = float(gradient[feature]), best[1] - value
            level = 0.0
            if gain >= 0:
                ends[int(slope > 0)] = place
                best, level = (at, value), 1e-6
            elif math.isfinite(best[1]):
                ends[int(place > best[0][feature])] = place
            else:  # not finite where it starts
                break
            size = 1.0 if self.criterion == "aicc" else abs(best[1])
            if abs(gain) <= 1e-9 * size or abs(slope) <= level * size or ends[1] - ends[0] < 1e-9:
                break
            step = ends[0] + (ends[1] - ends[0]) / 2
            if last is not None and slope != last[1]:
                secant = place - slope * (place - last[0]) / (slope - last[1])
                step = secant if ends[0] < secant < ends[1] else step
            last = place, slope
            place = step
        return best

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
            if not values[k] < end[1] - LEVEL * abs(end[1]):
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
    chosen = np.random.default_rng(0).choice(len(sites.x), most, replace=False, shuffle=False)
    places = torch.from_numpy(np.sort(chosen)).to(sites.x.device)
    return sites.each(lambda part: part[places])


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
