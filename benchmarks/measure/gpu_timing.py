"""Timing on a GPU: CUDA events around many calls, competitors in turn, and calls captured in a graph.

On the CPU, where the benchmarks are rehearsed, the clock of the host takes the place of the events.
"""

import math
import time
from collections.abc import Callable

import torch

SAMPLE = 0.004  # seconds that a sample lasts at least, unless MOST_CALLS are not enough
MOST_CALLS = 2000
LONG = 0.002  # samples of so many seconds are long enough to look at the clocks meanwhile


def sample(
    call: Callable[[], object], calls: int, device: torch.device, look: Callable[[], None] | None = None
) -> float:
    """Seconds of one of `calls` calls in a row; `look` is called when all are on their way and none is waited for."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    for _ in range(calls):
        call()
    last.record()
    if look:
        look()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / calls


def alternate(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    device: torch.device,
    look: Callable[[], None] | None = None,
    least_rounds: int = 5,
    most_rounds: int = 25,
) -> dict[str, list[float]]:
    """Seconds of one call, for each round and each of `calls`, in about `seconds` of time altogether.

    Every other round goes through the calls backwards. `look` looks at the clocks, twice a round at most.
    """
    estimates = {}
    for name, call in calls.items():
        for _ in range(3):  # compiles, allocates, and fills the caches
            call()
        estimates[name] = sample(call, 1, device)
        estimates[name] = min(estimates[name], sample(call, 1, device))
    repeats = {
        name: min(MOST_CALLS, max(1, math.ceil(SAMPLE / max(own, 1e-7)))) for name, own in estimates.items()
    }
    one_round = sum(own * repeats[name] for name, own in estimates.items())
    rounds = min(most_rounds, max(least_rounds, int(seconds / max(one_round, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        order = list(calls) if done % 2 == 0 else list(reversed(calls))
        for name in order:
            # The call before left its own data in the caches, and its own state in the clocks.
            sample(calls[name], max(1, repeats[name] // 4), device)
            long = estimates[name] * repeats[name] >= LONG
            times[name].append(
                sample(calls[name], repeats[name], device, look if long and done < 3 else None)
            )
    return times


def graphed(call: Callable[[], object]) -> Callable[[], object]:
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
