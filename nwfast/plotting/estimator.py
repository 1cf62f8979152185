"""Figures of a fitted estimator, on Axes that are given or on those of a figure of their own.

Features and outputs are named by their index or by the names that the estimator knows. Observations that share an x are
drawn as their mean, as the estimator holds them, with an area by how many they are; many places as hexagons.
"""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..functional import attention_weights, nadaraya_watson
from .parts import add_legend, add_observations, limit, mass_along, quantiles, with_margin
from .style import PREDICTION, SCALE, TRUTH, array, new_figure, sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CURVE = (400, 2000)  # points of a curve, least and most
_SURFACE = 140  # of a side of a map
_FACTORS = np.geomspace(1 / 16, 16, 25)
_CELLS = 200  # columns of a heatmap
_FAR = 2.5  # bandwidths from the nearest place: no data
_CRITERIA = {
    "loo": "leave-one-out squared error",
    "gcv": "generalised cross-validation",
    "aicc": "corrected Akaike criterion",
}
_Array = NDArray[np.float64]


def fit(
    model: Any,
    *,
    ax: "Axes | None" = None,
    feature: int | str = 0,
    output: int | str = 0,
    level: float | None = 0.95,
    data: bool = True,
) -> "Axes":
    """The fit over one feature, with its pointwise band and the data; all other features at their median.

    Parameters
    ----------
    model : estimator
        Fitted.
    ax : matplotlib.axes.Axes, optional
        To draw on; without, a figure is made, ``ax.figure``.
    feature, output : int or str
        Which.
    level : float, optional
        Of the band, None for none.
    data : bool
        Draw the observations; of 1000 and more the outermost 0.2 percent may lie outside of the axes.

    Returns
    -------
    matplotlib.axes.Axes
    """
    k, c = _feature(model, feature), _output(model, output)
    x_name, y_name = _features(model)[k], model.output_names_[c]
    ax = _axes(ax)
    rows, grid = _slice(model, k)
    mean = _column(_ask(model.predict, rows), c)
    curves = [mean]
    ends: list[float] = []
    if level is not None:
        lower, upper = (_column(end, c) for end in _ask(model.confidence_band, rows, level))
        ax.fill_between(
            grid, lower, upper, color=PREDICTION, alpha=0.25, linewidth=0, zorder=2.5, label=_percent(level)
        )
        curves += [lower, upper]
    if data:
        sites = model._state.sites
        places, means, mass = array(sites.x[:, k]), array(sites.y[:, c]), array(sites.mass)
        ends += add_observations(ax, model, places, means, mass, x_name)
    others = ", other features at their median" if len(_features(model)) > 1 else ""
    kind = "local linear fit" if model.report_["degree"] else "Nadaraya-Watson fit"
    ax.plot(grid, mean, color=PREDICTION, linewidth=_width(grid), zorder=3, label=f"{kind}{others}")
    ax.set(xlabel=x_name, ylabel=y_name)
    ax.set_xlim(*with_margin(grid[0], grid[-1]))
    limit(ax, curves, mass_along(model, k, grid), *ends)
    add_legend(ax)
    return ax


def slope(
    model: Any,
    *,
    ax: "Axes | None" = None,
    feature: int | str = 0,
    output: int | str = 0,
    level: float | None = 0.95,
) -> "Axes":
    """The slope of the fit along one feature, with its pointwise band, and its mean over the data.

    All other features are at their median; parameters as those of `fit`.
    """
    k, c = _feature(model, feature), _output(model, output)
    x_name, y_name = _features(model)[k], model.output_names_[c]
    ax = _axes(ax)
    rows, grid = _slice(model, k)
    found = {name: np.asarray(part) for name, part in _ask(model.marginal_effects, rows).items()}
    along, error = (
        found[name].reshape(len(grid), -1, len(_features(model)))[:, c, k] for name in ("slope", "std")
    )
    curves = [along]
    if level is not None:
        from ..estimators.inference import student_quantile

        freedom = max(model.n_observations_ - model.effective_dof_, 1.0)
        reach = student_quantile(freedom, (1 + level) / 2) * error
        ax.fill_between(
            grid, along - reach, along + reach, color=TRUTH, alpha=0.25, linewidth=0, label=_percent(level)
        )
        curves += [along - reach, along + reach]
    average = found["mean"].reshape(-1, len(_features(model)))[c, k]
    ax.axhline(0.0, color="0.6", linewidth=1)
    ax.axhline(
        average, color=PREDICTION, linewidth=1.5, linestyle="--", label=f"mean over the data: {average:.3g}"
    )
    ax.plot(grid, along, color=TRUTH, linewidth=_width(grid), label="slope")
    ax.set(xlabel=x_name, ylabel=f"slope of {y_name} in {x_name}")
    ax.set_xlim(*with_margin(grid[0], grid[-1]))
    limit(ax, curves, mass_along(model, k, grid), average)
    add_legend(ax)
    return ax


def bandwidth_curve(model: Any, ax: "Axes | None" = None) -> "Axes":
    """The criterion of the selection over the bandwidth (log scale), the one that was chosen marked.

    That is leave-one-out error where the bandwidth was given. Of several features all bandwidths change in proportion.
    """
    name = model.bandwidth if isinstance(model.bandwidth, str) and model.bandwidth in _CRITERIA else "loo"
    report = model.report_
    low = np.min(np.asarray(report["search_lower"]) / model.bandwidth_)
    high = np.max(np.asarray(report["search_upper"]) / model.bandwidth_)
    factors = np.unique(np.append(_FACTORS[(low <= _FACTORS) & (high >= _FACTORS)], 1.0))
    bandwidths, values = model.bandwidth_curve(factors, name)
    (chosen,) = np.flatnonzero(factors == 1.0)
    single = bandwidths.shape[1] == 1
    across = bandwidths[:, 0] if single else factors
    kept = np.isfinite(values)
    ax = _axes(ax)
    ax.plot(across[kept], values[kept], color=TRUTH, linewidth=2, marker="o", markersize=3)
    ax.plot([across[chosen]], [values[chosen]], "o", color=PREDICTION, markersize=9)
    text = ", ".join(f"{value:.4g}" for value in bandwidths[chosen])
    ax.annotate(
        text,
        (across[chosen], values[chosen]),
        (0, -9),
        textcoords="offset points",
        ha="center",
        va="top",
        color=PREDICTION,
    )
    ax.set_xscale("log")
    ax.set(xlabel=f"bandwidth ({_features(model)[0]})" if single else "factor of all bandwidths")
    ax.set(ylabel=_CRITERIA[name])
    ax.ticklabel_format(axis="y", useOffset=False)
    if kept.any():
        # Very narrow bandwidths may be worse than any wide one by far: the curve then leaves the axes.
        least, widest = values[kept].min(), values[kept][-1]
        top = (
            min(values[kept].max(), least + 1.5 * (widest - least)) if widest > least else values[kept].max()
        )
        rise = (top - least) or abs(top) or 1.0
        ax.set_ylim(least - 0.2 * rise, top + 0.05 * rise)
        seen = np.flatnonzero(kept & (values <= top))
        ends = max(seen[0] - 1, 0), min(seen[-1] + 1, len(across) - 1)
        ax.set_xlim(float(across[ends[0]]) / 1.2, float(across[ends[1]]) * 1.2)
    return ax


def surface(
    model: Any,
    ax: "Axes | None" = None,
    features: tuple[int | str, int | str] = (0, 1),
    output: int | str = 0,
) -> "Axes":
    """A map of the fit over two features, all others at their median, with the places of the data.

    White is where the nearest observation is further away than 2.5 bandwidths.
    """
    from matplotlib.colors import LinearSegmentedColormap

    if len(_features(model)) < 2:
        raise ValueError("surface needs a model of two features at least, this one has 1")
    (a, b), c = (_feature(model, feature) for feature in features), _output(model, output)
    if a == b:
        raise ValueError(f"features must be two, got {_features(model)[a]!r} twice")
    sites = model._state.sites
    rows = torch.from_numpy(_medians(model)).to(sites.x).repeat(_SURFACE * _SURFACE, 1)
    sides = [np.linspace(*_ends(sites.x[:, feature]), _SURFACE) for feature in (a, b)]
    across, up = np.meshgrid(*sides)
    rows[:, a], rows[:, b] = (torch.from_numpy(side.ravel()).to(rows) for side in (across, up))
    heights = _fit_at(model, rows, c)
    heights[_distance(model, rows, [a, b]) > _FAR] = np.nan

    ax = _axes(ax)
    image = ax.pcolormesh(
        *sides,
        heights.reshape(across.shape),
        cmap=LinearSegmentedColormap.from_list("nwfast", SCALE),
        shading="nearest",
        rasterized=True,
    )
    shown = sample(len(sites.x))
    few = len(shown) <= 300
    part = "" if len(shown) == len(sites.x) else f" ({len(shown):,} of {len(sites.x):,})"
    ax.scatter(
        array(sites.x[shown, a]),
        array(sites.x[shown, b]),
        s=6 if few else 1.5,
        color="black",
        alpha=0.6 if few else 0.3,
        linewidths=0,
        label=f"places of the data{part}",
    )
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label(model.output_names_[c])
    bar.outline.set_visible(False)
    ax.grid(visible=False)
    ax.set(xlabel=_features(model)[a], ylabel=_features(model)[b])
    if len(_features(model)) > 2:
        ax.set_title("other features at their median", fontsize=9)
    return ax


def residuals(model: Any, ax: "Axes | None" = None, output: int | str = 0) -> "Axes":
    """What the fit leaves of each observation, y - fit, over the fit."""
    c = _output(model, output)
    sites = model._state.sites
    fitted = _fit_at(model, sites.x, c)
    rest = array(sites.y[:, c]) - fitted
    ax = _axes(ax)
    ends = add_observations(ax, model, fitted, rest, array(sites.mass), "place")
    ax.axhline(0.0, color=PREDICTION, linewidth=1.5, zorder=3)
    name = model.output_names_[c]
    ax.set(xlabel=f"fit of {name}", ylabel=f"residual of {name}")
    ax.set_ylim(*with_margin(*ends))
    add_legend(ax)
    return ax


def weights(model: Any, X: ArrayLike | Tensor, ax: "Axes | None" = None) -> "Axes":
    """The weights p of the observations in the fit at a few rows X (M, D), as a heatmap.

    Columns are the observations in the order of the first feature, of more than 200 sums over neighbours. A local line
    tilts these weights.
    """
    sites = model._state.sites
    given = np.array(X.detach().cpu() if isinstance(X, Tensor) else X, dtype=np.float64)
    rows = torch.from_numpy(given).reshape(-1, sites.x.shape[1]).to(sites.x)
    found = array(attention_weights(rows, sites.x, model._state.w, key_weight=sites.key_weight))
    starts = np.arange(0, len(sites.x), -(-len(sites.x) // _CELLS))
    cells = np.add.reduceat(found, starts, axis=1)
    ax = _axes(ax)
    image = ax.imshow(cells, cmap="Reds", aspect="auto", interpolation="nearest", vmin=0.0)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label("weight" if len(starts) == len(sites.x) else "weight, summed over neighbours")
    bar.outline.set_visible(False)
    first = array(sites.x[starts, 0])
    ticks = np.unique(np.linspace(0, len(starts) - 1, 5).round().astype(int))
    ax.set_xticks(ticks, [f"{value:.3g}" for value in first[ticks]])
    ticks = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 8)).round().astype(int))
    ax.set_yticks(ticks, [", ".join(f"{value:.4g}" for value in row) for row in array(rows[ticks])])
    names = _features(model)
    ax.set(xlabel=f"observations, by {names[0]}", ylabel=", ".join(names) if len(names) < 5 else "row")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return ax


def _axes(ax: "Axes | None") -> "Axes":
    return new_figure(6.4, 4.2, "")[1] if ax is None else ax


def _features(model: Any) -> list[str]:
    return list(model.report_["features"])


def _feature(model: Any, which: int | str) -> int:
    return _index("feature", which, _features(model))


def _output(model: Any, which: int | str) -> int:
    return _index("output", which, list(model.output_names_))


def _index(what: str, which: int | str, names: list[str]) -> int:
    if isinstance(which, str):
        if which in names:
            return names.index(which)
    elif 0 <= which < len(names):
        return int(which)
    raise ValueError(
        f"{what} must be one of {', '.join(names)}, or an index below {len(names)}, got {which!r}"
    )


def _ends(column: Tensor) -> tuple[float, float]:
    return float(column.min()), float(column.max())


def _medians(model: Any) -> _Array:
    """Of each feature, over the observations."""
    sites = model._state.sites
    return np.array([quantiles(array(column), array(sites.mass), [0.5])[0] for column in sites.x.T])


def _slice(model: Any, feature: int) -> tuple[_Array, _Array]:
    """Rows along a feature between the ends of the data, and its values."""
    sites = model._state.sites
    low, high = _ends(sites.x[:, feature])
    # Twice a bandwidth, as far as a figure can show it.
    number = int(np.clip(2 * (high - low) / model.bandwidth_[feature], *_CURVE))
    grid = np.linspace(low, high, number)
    rows = np.tile(_medians(model), (len(grid), 1))
    rows[:, feature] = grid
    return rows, grid


def _width(grid: _Array) -> float:
    """Of a curve: one with much detail is drawn thin."""
    return 2.0 if len(grid) < 1000 else 1.0


def _ask(method: Any, rows: _Array, *arguments: Any) -> Any:
    """What a method of the estimator says of rows, which are in its own order and need no names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "X does not have valid feature names")
        return method(rows, *arguments)


def _fit_at(model: Any, rows: Tensor, output: int) -> _Array:
    with torch.no_grad():
        return array(model._state.fit_at(rows)[:, output])


def _column(found: Any, output: int) -> _Array:
    found = np.asarray(found, dtype=np.float64)
    return found if found.ndim == 1 else found[:, output]


def _distance(model: Any, rows: Tensor, features: list[int]) -> _Array:
    """How many bandwidths the nearest place is away, in these features, to some percent."""
    # log sum exp(-(k d)^2 / 2) is that of the nearest alone but for log S, which k makes small.
    sharp = 8.0
    state = model._state
    rows, places = (part[:, features].double() for part in (rows, state.sites.x))
    with torch.no_grad():
        value = torch.zeros_like(places[:, 0])
        w = sharp * state.w[features].double()
        _, lse = nadaraya_watson(rows, places, value, w, return_lse=True)
    return np.sqrt(np.maximum(-2 * array(lse), 0.0)) / sharp


def _percent(level: float) -> str:
    return f"{100 * level:g}% band, pointwise"
