"""Timing several calls against each other: in one process, in turn, so that what disturbs one disturbs all."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

SAMPLE = 0.01  # seconds: a shorter call is repeated until a sample takes this long
WARM = 0.05  # calls shorter than this are made once untimed before each sample: the call before took their caches


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    first_quartile: float
    third_quartile: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def spread(numbers: list[float]) -> Spread:
    """Median and quartiles of at least one number.

    >>> spread([3.0, 1.0, 2.0, 5.0, 4.0])
    Spread(median=3.0, first_quartile=2.0, third_quartile=4.0)
    """
    if len(numbers) == 1:
        return Spread(*numbers * 3)
    first, median, third = statistics.quantiles(numbers, n=4, method="inclusive")
    return Spread(median, first, third)


def estimate(call: Callable[[], object]) -> float:
    """Seconds of one call, roughly; one that was made before, when its result was checked."""
    seconds = _sample(call, 1, False)
    return seconds if seconds > 0.5 else _sample(call, 1, False)


def alternate(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    most_rounds: int = 51,
    least_rounds: int = 5,
    on_round: Callable[[int, int], None] = lambda done, rounds: None,
) -> dict[str, list[float]]:
    """Seconds of one call, for each round and each of `calls`, in about `seconds` of time altogether.

    Every other round goes through the calls backwards. `on_round` is told the rounds done and the rounds there are.
    """
    if not calls:
        return {}
    estimates = {name: estimate(call) for name, call in calls.items()}
    repeats = {name: max(1, math.ceil(SAMPLE / own)) for name, own in estimates.items()}
    warm = {name: own < WARM for name, own in estimates.items()}
    one_round = sum(own * (repeats[name] + warm[name]) for name, own in estimates.items())
    rounds = min(most_rounds, max(least_rounds, int(seconds / one_round)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    try:
        for done in range(rounds):
            gc.collect()
            gc.disable()
            order = list(calls)
            for name in order if done % 2 == 0 else reversed(order):
                times[name].append(_sample(calls[name], repeats[name], warm[name]))
            gc.enable()
            on_round(done + 1, rounds)
    finally:
        if collecting:
            gc.enable()
        else:
            gc.disable()
    return times


def _sample(call: Callable[[], object], repeats: int, warm: bool) -> float:
    if warm:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
