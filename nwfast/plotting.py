"""The chapter's figures. matplotlib is imported where first used, and drawn to memory without a display.

Each function returns a `matplotlib.figure.Figure` outside of pyplot's registry: nothing to close, no global state.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRUTH, _PREDICTION, _DATA = "#1f6fb4", "#c2255c", "#e8890c"
_LAND = ("#2e7d4f", "#a5cd8b", "#f6efbf", "#dcab6a", "#a3653c", "#54301f")
_MOST_POINTS = 2000
_MOST_CELLS = 200


def thin(n: int, most: int) -> Tensor:
    """Indices of at most `most` of n points, evenly spread over their order, both ends included.

    Examples
    --------
    >>> thin(9, 3)
    tensor([0, 4, 8])
    """
    return (
        torch.arange(n) if n <= most else torch.linspace(0, n - 1, most, dtype=torch.float64).round().long()
    )


def regression(
    x_train: Tensor, y_train: Tensor, x_test: Tensor, y_truth: Tensor, prediction: Tensor | None, title: str
) -> "Figure":
    """Truth and prediction as lines, training data as half-transparent circles, x in [0, 5] and y in [-1, 5].

    Parameters
    ----------
    x_train, y_train : Tensor
        (n,) each; of more than 2000 points a sample is drawn.
    x_test, y_truth : Tensor
        (m,) each, x_test ascending.
    prediction : Tensor, optional
        (m,); None draws the data alone.
    title : str
        Of the figure.
    """
    figure, axes = _figure(6.0, 4.0, title)
    shown = _sample(len(x_train))
    label = (
        "training data" if len(shown) == len(x_train) else f"training data ({len(shown)} of {len(x_train)})"
    )
    x_points, y_points = x_train[shown], y_train[shown]
    alpha, size = (0.5, 36.0) if len(shown) <= 200 else (0.25, 9.0)
    axes.scatter(*_points(x_points, y_points), s=size, color=_DATA, alpha=alpha, linewidths=0, label=label)
    axes.plot(*_points(x_test, y_truth), color=_TRUTH, linewidth=2, label="truth")
    if prediction is not None:
        axes.plot(
            *_points(x_test, prediction), color=_PREDICTION, linewidth=2, linestyle="--", label="prediction"
        )
    axes.set(xlabel="x", ylabel="y", xlim=(0, 5), ylim=(-1, 5))
    _legend(axes, "upper right")
    return figure


def heatmap(weights: Tensor, x_train: Tensor, x_test: Tensor, title: str) -> "Figure":
    """Attention weights as a red heatmap: a row for each test input, a column for each training input.

    Parameters
    ----------
    weights : Tensor
        (m, n), rows and columns in ascending order of the inputs.
    x_train, x_test : Tensor
        (n,) and (m,), which label the ticks.
    title : str
        Of the figure.
    """
    figure, axes = _figure(5.6, 4.6, title)
    image = axes.imshow(
        _array(weights), cmap="Reds", aspect="auto", interpolation="nearest", vmin=0.0, origin="upper"
    )
    colour_bar = figure.colorbar(image, ax=axes, shrink=0.9)
    colour_bar.set_label("weight")
    colour_bar.outline.set_visible(False)
    for ticks, inputs in ((axes.set_xticks, x_train), (axes.set_yticks, x_test)):
        places = thin(len(inputs), 6)
        ticks(places.tolist(), [f"{value:.1f}" for value in inputs[places].tolist()])
    axes.set(xlabel="sorted training inputs x", ylabel="sorted test inputs x")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


def heatmap_inputs(x_train: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    """Training and test inputs thinned to at most 200 each, evenly over their order: what a heatmap can show."""
    return x_train[thin(len(x_train), _MOST_CELLS)], x_test[thin(len(x_test), _MOST_CELLS)]


def loss(losses: Sequence[float], title: str, ylabel: str = "loss") -> "Figure":
    """Loss for each epoch, counted from 1; values that are not finite leave a gap."""
    figure, axes = _figure(5.0, 3.4, title)
    epochs = range(1, len(losses) + 1)
    axes.plot(epochs, losses, color=_PREDICTION, linewidth=2, marker="o", markersize=5)
    axes.set(xlabel="epoch", ylabel=ylabel)
    if any(map(math.isfinite, losses)):
        axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    return figure


def flights(hour: Tensor, delay: Tensor, grid: Tensor, curves: Mapping[str, Tensor], title: str) -> "Figure":
    """Smoothed arrival delay over the hour of departure, with the mean of each half hour as circles.

    Parameters
    ----------
    hour, delay : Tensor
        (n,) each: scheduled departure in hours, arrival delay in minutes.
    grid : Tensor
        (m,), the hours at which the curves are given.
    curves : mapping of str to Tensor
        (m,) each, by label; the first is drawn thin, all later ones bold.
    title : str
        Of the figure.
    """
    figure, axes = _figure(7.6, 4.4, title)
    half_hours = (2 * hour).floor().long()
    count = torch.bincount(half_hours).double()
    mean = torch.bincount(half_hours, weights=delay.double()) / count
    full = count >= 30
    centres = (torch.arange(len(count)) + 0.5) / 2
    axes.axhline(0.0, color="0.6", linewidth=1)
    for index, (label, curve) in enumerate(curves.items()):
        colour, width, alpha = (_TRUTH, 0.7, 0.6) if index == 0 else (_PREDICTION, 2.0, 1.0)
        axes.plot(*_points(grid, curve), color=colour, linewidth=width, alpha=alpha, label=label)
    axes.scatter(
        *_points(centres[full], mean[full]),
        s=_array(6 + count[full] / 250),
        color=_DATA,
        edgecolors="white",
        linewidths=0.6,
        label="mean of each half hour (area: flights)",
        zorder=3,
    )
    # The bold curves set the range: at its sparse ends the thin one follows single flights.
    bold = torch.cat([mean[full], *list(curves.values())[1:]])
    axes.set(xlabel="scheduled departure (hour of the day)", ylabel="arrival delay (minutes)", xlim=(5, 24))
    axes.set_ylim(bold.min().item() - 5, bold.max().item() + 12)
    axes.set_xticks(range(6, 25, 3))
    _legend(axes, "upper left")
    return figure


def bandwidth(bandwidths: Sequence[float], errors: Sequence[float], title: str) -> "Figure":
    """Leave-one-out error (minutes) over the bandwidth (minutes, log scale), the smallest marked."""
    figure, axes = _figure(5.0, 3.4, title)
    axes.plot(bandwidths, errors, color=_TRUTH, linewidth=2, marker="o", markersize=5)
    best = min(range(len(errors)), key=errors.__getitem__)
    axes.plot([bandwidths[best]], [errors[best]], "o", color=_PREDICTION, markersize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(bandwidths), [f"{value:g}" for value in bandwidths])
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set(xlabel="bandwidth 1/w (minutes)", ylabel="leave-one-out error (minutes)")
    return figure


def airports(
    place: Tensor,
    altitude: Tensor,
    longitude: Tensor,
    latitude: Tensor,
    surface: Tensor,
    title: str,
) -> "Figure":
    """Two maps in one scale of colours: airports with their altitudes, and the surface fitted to them.

    Parameters
    ----------
    place, altitude : Tensor
        (n, 2), longitude and latitude in degrees, and (n,), metres.
    longitude, latitude : Tensor
        (a,) and (b,), evenly spaced and ascending: the places of the surface.
    surface : Tensor
        (b, a), metres; NaN is left white.
    title : str
        Of the second map.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    figure, left = _figure(12.0, 3.9, "Data: the altitude of each airport", columns=2)
    right = figure.axes[1]
    right.set_title(title, fontsize=11)
    # From lowland to mountains, without white and blue, which say that there is nothing and water.
    colours = LinearSegmentedColormap.from_list("land", _LAND)
    norm = PowerNorm(0.6, vmin=0.0, vmax=altitude.max().item())  # most of the country is low
    x, y = _points(*place.unbind(1))
    shown = _array(altitude)
    left.scatter(x, y, c=shown, s=14, edgecolors="0.3", linewidths=0.25, cmap=colours, norm=norm)
    (west, east), (south, north) = ((axis[0].item(), axis[-1].item()) for axis in (longitude, latitude))
    image = right.imshow(
        _array(surface),
        origin="lower",
        extent=(west, east, south, north),
        interpolation="nearest",
        cmap=colours,
        norm=norm,
    )
    right.scatter(x, y, s=1.2, color="black", alpha=0.5, linewidths=0)
    stretch = 1 / math.cos(math.radians((south + north) / 2))  # a degree of latitude is the longer one
    for axes in (left, right):
        axes.set(xlabel="longitude (degrees)", xlim=(west, east), ylim=(south, north), aspect=stretch)
        axes.grid(visible=False)
    left.set_ylabel("latitude (degrees)")
    bar = figure.colorbar(image, ax=[left, right], shrink=0.85, pad=0.01)
    bar.set_label("altitude (m)")
    bar.outline.set_visible(False)
    return figure


def png(figure: "Figure") -> bytes:
    """The figure as the bytes of a PNG file, without a date in it: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _figure(width: float, height: float, title: str, columns: int = 1) -> "tuple[Figure, Axes]":
    """An empty figure with axes side by side, and the first of them, which gets the title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    for column in range(columns):
        axes = figure.add_subplot(1, columns, column + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.axes[0].set_title(title, fontsize=11)
    return figure, figure.axes[0]


def _legend(axes: "Axes", where: Literal["upper left", "upper right"]) -> None:
    legend = axes.legend(loc=where, framealpha=0.85, edgecolor="none")
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(0.9)  # a faint point among thousands would not be seen alone


def _sample(n: int) -> Tensor:
    """As `thin`, but at random: even steps through sorted data hide how dense they are."""
    if n <= _MOST_POINTS:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:_MOST_POINTS]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().double().numpy()


def _points(x: Tensor, y: Tensor) -> tuple[Any, Any]:
    return _array(x), _array(y)
