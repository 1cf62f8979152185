"""Timing several calls against each other: in one process, in turn, so that what disturbs one disturbs all.

On the CPU the host's clock times them (`Host`), on a GPU events around many calls (`Device`). A call captured in a
graph (`graphed`) is its kernels alone.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

Call = Callable[[], object]
LOOKED_AT = 3  # rounds in which the clocks of the device are looked at


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


class Host:
    """Times by the clock of the host, for calls that are done when they return."""

    SAMPLE = 0.01  # seconds: a shorter call is repeated until a sample takes this long
    WARM = 0.05  # calls shorter than this are made once untimed before each sample: the call before took their caches
    MOST_ROUNDS = 51

    def estimate(self, call: Call) -> float:
        """Seconds of one call, roughly; one that was made before, when its result was checked."""
        seconds = self.sample(call, 1)
        return seconds if seconds > 0.5 else self.sample(call, 1)

    def repeats(self, seconds: float) -> tuple[int, int]:
        """How often a call of so many seconds is made for a sample, and how often before it, untimed."""
        return max(1, math.ceil(self.SAMPLE / max(seconds, 1e-9))), int(seconds < self.WARM)

    def sample(self, call: Call, repeats: int, untimed: int = 0, look: bool = False) -> float:
        """Seconds of one of `repeats` calls in a row; `look`: one of the first samples, for who looks at the device."""
        for _ in range(untimed):
            call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class Device(Host):
    """Times by CUDA events around many calls, which the host only sends on their way.

    `watch` looks at the device's own clocks, while samples that last as long as they should are on their way.
    """

    SAMPLE = 0.004  # unless MOST_CALLS are not enough
    MOST_CALLS = 2000
    MOST_ROUNDS = 25

    def __init__(self, device: torch.device, watch: Callable[[], None] | None = None):
        self.device, self.watch = device, watch

    def estimate(self, call: Call) -> float:
        """Seconds of one call, roughly, once it has compiled, allocated, and filled the caches."""
        for _ in range(3):
            call()
        return min(self.sample(call, 1), self.sample(call, 1))

    def repeats(self, seconds: float) -> tuple[int, int]:
        """As `Host` has it: the call before left its own data in the caches, and its own state in the clocks."""
        repeats = min(self.MOST_CALLS, super().repeats(seconds)[0])
        return repeats, max(1, repeats // 4)

    def sample(self, call: Call, repeats: int, untimed: int = 0, look: bool = False) -> float:
        """Seconds of one of `repeats` calls in a row."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(untimed):
            call()
        torch.cuda.synchronize(self.device)
        first.record()
        for _ in range(repeats):
            call()
        last.record()
        if look and self.watch and repeats < self.MOST_CALLS:
            self.watch()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / repeats


def clock_of(device: torch.device, watch: Callable[[], None] | None = None) -> Host:
    """What times calls on a device; the host's clock on the CPU, where benchmarks of a GPU are rehearsed."""
    return Device(device, watch) if device.type == "cuda" else Host()


def alternate(
    calls: dict[str, Call],
    seconds: float,
    clock: Host | None = None,
    least_rounds: int = 5,
    on_round: Callable[[int, int], None] = lambda done, rounds: None,
) -> dict[str, list[float]]:
    """Seconds of one call, for each round and each of `calls`, in about `seconds` of time altogether.

    Every other round goes through the calls backwards. `on_round` is told the rounds done and the rounds there are.
    """
    if not calls:
        return {}
    clock = clock or Host()
    estimates = {name: clock.estimate(call) for name, call in calls.items()}
    repeats = {name: clock.repeats(own) for name, own in estimates.items()}
    one_round = sum(own * sum(repeats[name]) for name, own in estimates.items())
    rounds = min(clock.MOST_ROUNDS, max(least_rounds, int(seconds / max(one_round, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    try:
        for done in range(rounds):
            gc.collect()
            gc.disable()
            order = list(calls)
            for name in order if done % 2 == 0 else reversed(order):
                times[name].append(clock.sample(calls[name], *repeats[name], look=done < LOOKED_AT))
            gc.enable()
            on_round(done + 1, rounds)
    finally:
        if collecting:
            gc.enable()
        else:
            gc.disable()
    return times


def graphed(call: Call) -> Call:
    """A CUDA graph of the call, as a call: it replays the kernels alone and returns the same result tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> object:
        graph.replay()
        return results

    return replay
