"""The demo's second half: arrival delay over departure time, smoothed from all 327 thousand flights."""

import sys
import time
from collections.abc import Sequence

import torch

from .. import datasets, plotting
from ..functional import nadaraya_watson
from .report import Figure, Section, Table


def flights_section(
    dtype: torch.dtype, backend: str, bandwidths: Sequence[float], readable: float, bar
) -> Section:
    """Choose the bandwidth by leave-one-out over all flights, and draw the curve with it and with a readable one.

    Parameters
    ----------
    dtype, backend
        To compute in and with.
    bandwidths : sequence of float
        Candidates, in minutes.
    readable : float
        A bandwidth in minutes whose curve is drawn beside the chosen one.
    bar : tqdm
        Advanced by ``2 + len(bandwidths)``.
    """
    bar.set_description("reading flights")
    hour, delay = datasets.flights(dtype)
    order = (
        hour.argsort()
    )  # kernels skip the keys that are too far away to matter where they find them sorted
    hour, delay = hour[order], delay[order]
    bar.update()

    errors, seconds = [], []
    for minutes in bandwidths:
        bar.set_description(f"leave-one-out, {minutes:g} min")
        started = time.perf_counter()
        left_out = nadaraya_watson(hour, hour, delay, 60 / minutes, exclude_self=True, backend=backend)
        errors.append((left_out - delay).double().square().mean().sqrt().item())
        seconds.append(time.perf_counter() - started)
        bar.update()
    chosen = bandwidths[min(range(len(errors)), key=errors.__getitem__)]

    bar.set_description("drawing flights")
    grid = torch.arange(5 * 60, 24 * 60, dtype=torch.float64).div(60).to(dtype)
    curves = {
        label: nadaraya_watson(grid, hour, delay, 60 / minutes, backend=backend)
        for label, minutes in (
            (f"bandwidth {chosen:g} min (leave-one-out)", chosen),
            (f"bandwidth {readable:g} min", readable),
        )
    }
    smoothed = plotting.flights(
        hour, delay, grid, curves, f"Arrival delay of {len(hour):,} flights from New York, 2013"
    )
    selection = plotting.bandwidth(bandwidths, errors, "Leave-one-out error of each bandwidth")
    bar.update()

    rows = [
        (f"{minutes:g}", f"{60 / minutes:.4g}", f"{error:.4f}", f"{took:.2f}")
        for minutes, error, took in zip(bandwidths, errors, seconds, strict=True)
    ]
    matrix = len(hour) ** 2 * hour.element_size() / 1e9
    peak = _peak_memory()
    used = f"; this whole process has used {peak / 1e9:.2f} GB at most" if peak else ""
    return Section(
        "Flights",
        [
            f"{len(hour)} flights that left New York City in 2013 and arrived: arrival delay in minutes against "
            "scheduled departure in hours. Every flight is predicted from all others, once for each bandwidth.",
            f"The textbook's matrix of all pairs would take {matrix:.0f} GB, more than once{used}.",
            "The bandwidth matters little, since most of the spread has other causes than the hour. The narrowest is "
            "best because most flights recur at the same minute every day, with much the same delays.",
        ],
        [Table(("bandwidth (minutes)", "w (1/hours)", "leave-one-out error (minutes)", "seconds"), rows)],
        [
            Figure("flights.png", plotting.png(smoothed), "Mean arrival delay over the hour of departure."),
            Figure(
                "flights-bandwidth.png", plotting.png(selection), "Root mean squared leave-one-out error."
            ),
        ],
    )


def _peak_memory() -> int:
    """Most resident memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
