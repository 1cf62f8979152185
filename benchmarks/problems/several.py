"""Two and three features in linear time: the data, our own gradients, and the search for the slowest bandwidth.

Points lie unordered in the unit square or cube, uniformly or in five narrow clusters with gaps between them.
"""

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch
from torch import Tensor

import nwfast
from benchmarks.measure.alternate import spread
from benchmarks.problems import workloads
from benchmarks.problems.cases import Entry, Group
from benchmarks.problems.workloads import Call, Data

CROSSOVER = 2048  # N = M from which on linear time is to be the faster method
W = {2: 50.0, 3: 30.0}  # of the comparisons with others, by features
CENTRES = torch.tensor([[-1, -1, 1], [-1, 1, -1], [1, -1, -1], [1, 1, 1], [0, 0, 0]]) * 0.4 + 0.5
WIDTH = 0.02  # standard deviation of a cluster
CHECKED = 64  # rows


@functools.lru_cache(maxsize=2)
def data(n: int, features: int, w: float, clustered: bool = False) -> Data:
    """N = M = n points of one channel."""
    generator = torch.Generator().manual_seed(features)

    def points() -> Tensor:
        if not clustered:
            return torch.rand(n, features, generator=generator)
        centre = CENTRES[torch.randint(len(CENTRES), (n,), generator=generator), :features]
        return centre + WIDTH * torch.randn(n, features, generator=generator)

    query, key = points(), points()
    value = torch.sin(6 * key.sum(1)) + 0.5 * torch.randn(n, generator=generator)
    cotangent = torch.randn(n, generator=generator)
    where = ", five clusters" if clustered else ", unit square" if features == 2 else ", unit cube"
    return Data(query, key, value, torch.tensor(w), cotangent, where)


KINDS = {"forward": "", "to w, q": "qw", "to q, k, v, w": "qkvw", "leave-one-out step in w": "w"}


def gradients(question: str, n: int, features: int, seconds: float) -> Group:
    """Ours alone, at one size: the forward pass, gradients with one w for each feature, and a leave-one-out step in w.

    Checked are rows of the result and of the gradient of the queries.
    """
    given = functools.partial(data, n, features, W[features])
    name = f"gradients, N = M = {n}, D = {features}, w = {W[features]:g}"
    entries = {
        kind: Entry(
            "native fgt",
            f"{kind}: {name}",
            n * n,
            functools.partial(_build, given, kind),
            functools.partial(_verify, given, kind),
        )
        for kind in KINDS
    }
    return Group(question, name, n, seconds, entries)


def _build(make: Callable[[], Data], kind: str) -> Call:
    given, alone = make(), kind.startswith("leave-one-out")
    query = given.key if alone else given.query
    inputs = (query, given.key, given.value, given.w.repeat(given.features))
    leaves = [
        tensor.clone().requires_grad_(letter in KINDS[kind])
        for tensor, letter in zip(inputs, "qkvw", strict=True)
    ]
    if alone:
        leaves[0] = leaves[1]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def call() -> tuple[Tensor, ...]:
        out = nwfast.nadaraya_watson(*leaves, exclude_self=alone, method="fgt", backend="native")
        found = torch.autograd.grad(out, wanted, given.cotangent) if wanted else ()
        return out.detach(), *found

    return call


def _verify(make: Callable[[], Data], kind: str, found: tuple) -> float:
    given, alone = make(), kind.startswith("leave-one-out")
    query = given.key if alone else given.query
    rows = torch.linspace(0, len(query) - 1, min(CHECKED, len(query))).long()
    worst = 0.0
    for row in rows.split(4):
        q = query[row].double().requires_grad_()
        scores = -(((q[:, None] - given.key.double()) * given.w).square()).sum(-1) / 2
        if alone:
            scores = scores.scatter(1, row[:, None], -torch.inf)
        out = torch.softmax(scores, 1) @ given.value.double()
        expected = [out.detach()]
        if "q" in KINDS[kind]:
            (gradient,) = torch.autograd.grad(out, q, given.cotangent[row].double())
            expected.append(gradient)
        for actual, exact in zip(found, expected, strict=False):  # that of w is a sum over all rows
            error = float((actual[row] - exact).abs().max() / actual.abs().max())
            if not error <= workloads.TOLERANCE:
                raise workloads.WrongResultError(f"{kind}, D = {given.features}: off by {error:.3g}")
            worst = max(worst, error)
    return worst


def growth(question: str, n: int, features: int, seconds: float) -> Group:
    """The forward pass at n and at 4 n."""
    name = f"growth, N = M = {n} and {4 * n}, D = {features}, w = {W[features]:g}"
    entries = {}
    for size in (n, 4 * n):
        given = functools.partial(data, size, features, W[features])
        entries[f"N = M = {size}"] = Entry(
            "native fgt",
            f"forward, N = M = {size}, D = {features}",
            size * size,
            functools.partial(_build, given, "forward"),
            functools.partial(_verify, given, "forward"),
        )
    return Group(question, name, n, seconds, entries)


SLOW = 1.0  # seconds: from here on one call is timed, else three


def bandwidths(n: int, features: int, clustered: bool, wanted: Iterable[float]) -> list[dict]:
    """The time of the forward pass at each w, and at the slowest between them that a search finds.

    The search halves, on the scale of log w, the steps to both neighbours of the slowest w so far, twice.
    """
    found: dict[float, dict] = {}

    def measure(w: float) -> None:
        given = data(n, features, w, clustered)
        make = functools.partial(data, n, features, w, clustered)
        call = _build(make, "forward")
        error = _verify(make, "forward", call())
        seconds: list[float] = []
        while not seconds or (len(seconds) < 3 and seconds[0] < SLOW):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        found[w] = {
            "n": n,
            "features": features,
            "where": given.where.removeprefix(", "),
            "w": w,
            "seconds": asdict(spread(seconds)),
            "error": error,
        }

    for w in wanted:
        measure(w)
    for _ in range(2):
        ws = sorted(found)
        slowest = ws.index(max(ws, key=lambda w: found[w]["seconds"]["median"]))
        for neighbour in (slowest - 1, slowest + 1):
            if 0 <= neighbour < len(ws):
                measure(float(f"{(ws[slowest] * ws[neighbour]) ** 0.5:.3g}"))
    return [found[w] for w in sorted(found)]


def dense_rate(n: int, features: int) -> float:
    """Pairs a second of our dense kernel where no pair can be skipped: w = 1, in the unit square or cube."""
    given = data(n, features, 1.0)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        nwfast.nadaraya_watson(*given.inputs, method="dense", backend="native")
        times.append(time.perf_counter() - start)
    return n * n / spread(times[1:]).median
