"""The figures of the chapter and of the demo.

Each function returns a `matplotlib.figure.Figure` outside of pyplot's registry: nothing to close, no global state.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .style import DATA, LAND, PREDICTION, TRUTH, array, legend, new_figure, points, sample, thin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CELLS = 200


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
    figure, axes = new_figure(6.0, 4.0, title)
    shown = sample(len(x_train))
    label = (
        "training data" if len(shown) == len(x_train) else f"training data ({len(shown)} of {len(x_train)})"
    )
    x_points, y_points = x_train[shown], y_train[shown]
    alpha, size = (0.5, 36.0) if len(shown) <= 200 else (0.25, 9.0)
    axes.scatter(*points(x_points, y_points), s=size, color=DATA, alpha=alpha, linewidths=0, label=label)
    axes.plot(*points(x_test, y_truth), color=TRUTH, linewidth=2, label="truth")
    if prediction is not None:
        axes.plot(
            *points(x_test, prediction), color=PREDICTION, linewidth=2, linestyle="--", label="prediction"
        )
    axes.set(xlabel="x", ylabel="y", xlim=(0, 5), ylim=(-1, 5))
    legend(axes, "upper right")
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
    figure, axes = new_figure(5.6, 4.6, title)
    image = axes.imshow(
        array(weights), cmap="Reds", aspect="auto", interpolation="nearest", vmin=0.0, origin="upper"
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
    figure, axes = new_figure(5.0, 3.4, title)
    epochs = range(1, len(losses) + 1)
    axes.plot(epochs, losses, color=PREDICTION, linewidth=2, marker="o", markersize=5)
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
    figure, axes = new_figure(7.6, 4.4, title)
    half_hours = (2 * hour).floor().long()
    count = torch.bincount(half_hours).double()
    mean = torch.bincount(half_hours, weights=delay.double()) / count
    full = count >= 30
    centres = (torch.arange(len(count)) + 0.5) / 2
    axes.axhline(0.0, color="0.6", linewidth=1)
    for index, (label, curve) in enumerate(curves.items()):
        colour, width, alpha = (TRUTH, 0.7, 0.6) if index == 0 else (PREDICTION, 2.0, 1.0)
        axes.plot(*points(grid, curve), color=colour, linewidth=width, alpha=alpha, label=label)
    axes.scatter(
        *points(centres[full], mean[full]),
        s=array(6 + count[full] / 250),
        color=DATA,
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
    legend(axes, "upper left")
    return figure


def bandwidth(bandwidths: Sequence[float], errors: Sequence[float], title: str) -> "Figure":
    """Leave-one-out error (minutes) over the bandwidth (minutes, log scale), the smallest marked."""
    figure, axes = new_figure(5.0, 3.4, title)
    axes.plot(bandwidths, errors, color=TRUTH, linewidth=2, marker="o", markersize=5)
    best = min(range(len(errors)), key=errors.__getitem__)
    axes.plot([bandwidths[best]], [errors[best]], "o", color=PREDICTION, markersize=9)
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

    figure, left = new_figure(12.0, 3.9, "Data: the altitude of each airport", columns=2)
    right = figure.axes[1]
    right.set_title(title, fontsize=11)
    # From lowland to mountains, without white and blue, which say that there is nothing and water.
    colours = LinearSegmentedColormap.from_list("land", LAND)
    norm = PowerNorm(0.6, vmin=0.0, vmax=altitude.max().item())  # most of the country is low
    x, y = points(*place.unbind(1))
    shown = array(altitude)
    left.scatter(x, y, c=shown, s=14, edgecolors="0.3", linewidths=0.25, cmap=colours, norm=norm)
    (west, east), (south, north) = ((axis[0].item(), axis[-1].item()) for axis in (longitude, latitude))
    image = right.imshow(
        array(surface),
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
