"""What figures of an estimator are made of: its observations, the range of an axis, a legend that hides nothing."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .style import DATA, array, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_PLACES = 5000  # as points
_CENTRE = [0.005, 0.995]  # of the observations, where curves are in sight
_TAIL = 0.002  # of the observations, on either side, that many of them may leave out of sight
_Array = NDArray[np.float64]


def quantiles(values: _Array, mass: _Array, shares: list[float]) -> _Array:
    """Of values with masses: the least whose share of the mass, with all below, is that large."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(mass[order])
    places = np.searchsorted(total, np.asarray(shares) * total[-1])
    return values[order][np.minimum(places, len(values) - 1)]


def add_legend(ax: "Axes") -> None:
    """In a part of the axes of its own, above all that is drawn."""
    _, labels = ax.get_legend_handles_labels()
    if not labels:
        return
    height = 72 * ax.get_window_extent().height / ax.figure.dpi
    share = min((13 * len(labels) + 8) / height, 0.5)
    low, high = ax.get_ylim()
    ax.set_ylim(low, low + (high - low) / (1 - share))
    legend(ax, "upper left", fontsize=8, borderaxespad=0.2)


def add_observations(
    ax: "Axes", model: Any, x: _Array, y: _Array, mass: _Array, name: str
) -> tuple[float, float]:
    """Draw them, at x and y with their masses, and return the ends of y that are to be seen."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    means = not model._state.sites.plain and model.n_observations_ > len(x)
    low, high = float(y.min()), float(y.max())
    if model.n_observations_ >= 1000:
        low, high = quantiles(y, mass, [_TAIL, 1 - _TAIL])
        outside = mass[(y < low) | (y > high)].sum() / mass.sum()
        if outside > 0:
            ax.annotate(
                f"{outside:.1%} of the observations out of sight",
                (1, 1),
                (0, 3),
                xycoords="axes fraction",
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color="0.45",
            )
    what = f"means at each {name} (area: number)" if means else "observations"
    if len(x) > _MOST_PLACES and high > low:
        cells = ax.hexbin(
            x,
            y,
            C=mass,
            reduce_C_function=np.sum,
            gridsize=(60, 34),
            extent=(x.min(), x.max(), low, high),
            norm=LogNorm(),
            cmap=LinearSegmentedColormap.from_list("nwfast-data", ("#fdf1dd", DATA, "#7a3d00")),
            linewidths=0.1,
            zorder=1,
        )
        bar = ax.figure.colorbar(cells, ax=ax)
        bar.set_label("observations in a cell")
        bar.outline.set_visible(False)
    else:
        few = len(x) <= 200
        size: Any = 36.0 if few else 9.0
        if means:
            size = np.clip(60 * mass / np.quantile(mass, 0.95), 3, 90)
        ax.scatter(x, y, s=size, color=DATA, alpha=0.5 if few else 0.3, linewidths=0, zorder=2, label=what)
    return low, high


def limit(ax: "Axes", curves: list[_Array], mass: _Array, *ends: float) -> None:
    """The range of y: these ends, and of curves all but what is far off where one observation in a hundred is."""
    for values in curves:
        kept = np.isfinite(values) & (mass > 0)
        if kept.any():
            ends += (*quantiles(values[kept], mass[kept], _CENTRE),)
    if ends:
        ax.set_ylim(*with_margin(min(ends), max(ends)))


def mass_along(model: Any, feature: int, grid: _Array) -> _Array:
    """The masses of the observations nearest to each point of a grid."""
    sites = model._state.sites
    step = (grid[-1] - grid[0]) / (len(grid) - 1) or 1.0
    nearest = np.rint((array(sites.x[:, feature]) - grid[0]) / step).astype(int)
    return np.bincount(nearest, array(sites.mass), len(grid)).astype(np.float64)


def with_margin(low: float, high: float) -> tuple[float, float]:
    """A range and four percent of it on either side."""
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin
