"""Observations by the place x that they share: what all sums over a data set need of it.

Observations at one x enter a fit by their mean and their weight alone, and a residual by their sum of squares about
that mean. So data of few distinct places (minutes of a day, ages, a lattice) are as small as their places, and data in
which rows repeat give to the bit what the same data give with counts as weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Sites(NamedTuple):
    """S places with the observations there; places in lexicographic order."""

    x: Tensor  # (S, D)
    y: Tensor  # (S, C), means of the observations
    mass: Tensor  # (S,), sums of their weights
    unit: Tensor  # (S,), the weight of one of them
    within: Tensor  # (S, C), sums of squares of the observations about y, in float64
    plain: bool  # each place has one observation, of weight 1

    @property
    def copies(self) -> Tensor:
        """How many observations a place has, (S,)."""
        return self.mass / self.unit

    @property
    def key_weight(self) -> Tensor | None:
        """The masses, or None where they are all 1."""
        return None if self.plain else self.mass

    def each(self, change: Callable[[Tensor], Tensor]) -> "Sites":
        """With every tensor changed."""
        x, y, mass, unit, within = (change(part) for part in self[:5])
        return Sites(x, y, mass, unit, within, self.plain)

    def double(self) -> "Sites":
        """The same in float64."""
        return self.each(Tensor.double)


def sites_of(x: Tensor, y: Tensor, weight: Tensor | None) -> Sites:
    """The sites of x (n, D), y (n, C) and weights (n,), all finite, weights of 0 left out.

    Numbers whose squares are none in float64 are refused.

    Weights that are whole numbers are counts, as scikit-learn takes weights: one of 3 is three equal observations.
    Others say how precise an observation is, and each stays a place of its own.
    """
    _refuse_extremes("x", (x.amax(0) / 2 - x.amin(0) / 2).max())
    _refuse_extremes("y", y.abs().max())
    counts = True
    if weight is not None:
        kept = weight > 0
        if not bool(kept.all()):
            x, y, weight = x[kept], y[kept], weight[kept]
        counts = bool((weight == weight.floor()).all())
    x, order = _lexicographic(x)
    y = y[:, 0].index_select(0, order).unsqueeze(1) if y.shape[1] == 1 else y.index_select(0, order)
    mass = torch.ones_like(x[:, 0]) if weight is None else weight[order].to(x.dtype)
    if not counts:
        return Sites(x, y, mass, mass, torch.zeros_like(y, dtype=torch.float64), False)
    first = torch.ones(len(x), dtype=torch.bool, device=x.device)
    first[1:] = (x[1:] != x[:-1]).any(-1)
    if bool(first.all()):
        plain = weight is None or bool((mass == 1).all())
        return Sites(x, y, mass, torch.ones_like(mass), torch.zeros_like(y, dtype=torch.float64), plain)
    place = first.cumsum(0) - 1
    total = _sums(place, mass.unsqueeze(-1)).squeeze(-1)
    # About the first of each place: equal observations then have their own value as mean, to the bit.
    start = y[first]
    offset = (y - start[place]).double()
    step = _sums(place, mass.unsqueeze(-1) * offset) / total.unsqueeze(-1)
    within = _sums(place, mass.unsqueeze(-1) * (offset - step[place]).square())
    mean = (start + step).to(y.dtype)
    return Sites(x[first], mean, total.to(x.dtype), torch.ones_like(mean[:, 0]), within, False)


def _refuse_extremes(name: str, size: Tensor) -> None:
    if not (float(size) == 0 or 1e-145 < float(size) < 1e145):
        raise ValueError(
            f"{name} is of size {float(size):.1e}, and squares of that are no numbers: give it in another unit"
        )


def _lexicographic(x: Tensor) -> tuple[Tensor, Tensor]:
    """X in that order, and which rows these are."""
    values, order = x[:, -1].sort(stable=True)
    if x.shape[1] == 1:
        return values.unsqueeze(1), order
    for feature in range(x.shape[1] - 2, -1, -1):
        order = order[x[order, feature].argsort(stable=True)]
    return x[order], order


def _sums(place: Tensor, values: Tensor) -> Tensor:
    """Sums (S, C) in float64 of values (n, C) by ascending place (n,), added in their order."""
    sums = torch.zeros(int(place[-1]) + 1, values.shape[1], dtype=torch.float64)
    return sums.index_add_(0, place.cpu(), values.double().cpu()).to(values.device)
