"""The demo's map: altitude over longitude and latitude, from a thousand airports, with a bandwidth for each feature."""

import math
import time

import torch
from torch import Tensor

from .. import datasets, plotting
from ..functional import nadaraya_watson
from .report import Figure, Section, Table

STEPS = 3  # of the progress bar
_KILOMETRES = 111.2  # a degree of latitude
_CELLS = 20  # of the map, a degree
_START = 1.0  # w of both features, in 1/degrees
_REACH = 4.0  # bandwidths: the map is white where no airport is nearer
_MOST_EVALUATIONS = 40


def airports_section(dtype: torch.dtype, backend: str, bar) -> Section:
    """Learn one bandwidth for both features and one for each by leave-one-out, and draw the surface of the latter.

    Parameters
    ----------
    dtype, backend
        To compute in and with.
    bar : tqdm
        Advanced by `STEPS`.
    """
    bar.set_description("learning bandwidths of the map")
    place, altitude = datasets.airports(dtype)
    east = _KILOMETRES * math.cos(math.radians(place[:, 1].double().mean().item()))
    rows = []

    def learn(name: str, start: Tensor) -> Tensor:
        started = time.perf_counter()
        w, error = _learn(place, altitude, start, backend)
        seconds = time.perf_counter() - started
        across, along = w.expand(2).tolist()
        lengths = (f"{east / across:.0f}", f"{_KILOMETRES / along:.0f}")
        rows.append((name, f"{across:.3f}", f"{along:.3f}", *lengths, f"{error:.1f}", f"{seconds:.2f}"))
        bar.update()
        return w

    shared = learn("one w for both", torch.tensor([_START]))
    w = learn("one w for each", shared.expand(2))

    bar.set_description("drawing the map")
    longitude, latitude = (
        torch.linspace(low, high, round((high - low) * _CELLS) + 1, dtype=torch.float64).to(dtype)
        for low, high in datasets.CONTIGUOUS
    )
    started = time.perf_counter()
    surface = _surface(place, altitude, w.to(dtype), longitude, latitude, backend)
    seconds = time.perf_counter() - started
    title = "Fit: a bandwidth for each axis, learned by leave-one-out"
    drawn = plotting.airports(place, altitude, longitude, latitude, surface, title)
    bar.update()
    return Section(
        "Airports",
        [
            f"{len(place)} airports of the contiguous United States: altitude in metres against longitude and "
            "latitude in degrees. Every airport is predicted from all others, and the gradient of the squared error "
            "trains w (L-BFGS on its logarithm). A w for each feature finds bandwidths of its own for each axis.",
            f"The map has {surface.numel()} points, predicted in {seconds:.2f} s; it is white where the log of the "
            f"density (lse) says that no airport is within {_REACH:g} bandwidths.",
        ],
        [
            Table(
                (
                    "trained",
                    "w (1/degree east)",
                    "w (1/degree north)",
                    "bandwidth east (km)",
                    "north (km)",
                    "leave-one-out error (m)",
                    "seconds",
                ),
                rows,
            )
        ],
        [
            Figure(
                "airports.png", plotting.png(drawn), "Altitudes of airports, and the surface fitted to them."
            )
        ],
    )


def _learn(place: Tensor, altitude: Tensor, start: Tensor, backend: str) -> tuple[Tensor, float]:
    """The w of least leave-one-out error, and the root of its mean square."""
    log_w = start.double().log().requires_grad_()
    search = torch.optim.LBFGS(
        [log_w], max_iter=_MOST_EVALUATIONS, max_eval=_MOST_EVALUATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        fitted = nadaraya_watson(
            place, place, altitude, log_w.exp().to(place.dtype), exclude_self=True, backend=backend
        )
        error = (fitted - altitude).square().mean()
        error.backward()
        return error

    search.step(loss)
    return log_w.detach().exp(), loss().sqrt().item()


def _surface(
    place: Tensor, altitude: Tensor, w: Tensor, longitude: Tensor, latitude: Tensor, backend: str
) -> Tensor:
    """(latitudes, longitudes); NaN where no airport is near."""
    points = torch.cartesian_prod(latitude, longitude).flip(1)
    fitted, lse = nadaraya_watson(points, place, altitude, w, backend=backend, return_lse=True)
    fitted[lse < -(_REACH**2) / 2] = torch.nan
    return fitted.reshape(len(latitude), len(longitude))
