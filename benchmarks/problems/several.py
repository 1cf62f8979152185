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
LOSS, LINE = "leave_one_out_loss and its gradient in w", "local_linear"


def gradients(question: str, n: int, features: int, seconds: float) -> Group:
    """Ours alone, at one size: the forward pass, gradients with one w for each feature, leave-one-out, local lines.

    Checked are rows of the result and of the gradient of the queries, and the loss.
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
    for kind, build, verify in (LOSS, _build_loss, _verify_loss), (LINE, _build_line, _verify_line):
        build, verify = functools.partial(build, given), functools.partial(verify, given)
        entries[kind] = Entry("native fgt", f"{kind}: {name}", n * n, build, verify)
    return Group(question, name, n, seconds, entries)


def _build_loss(make: Callable[[], Data]) -> Call:
    given = make()
    w = given.w.repeat(given.features).requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        loss = nwfast.leave_one_out_loss(given.key, given.value, w, method="fgt", backend="native")
        return loss.detach(), *torch.autograd.grad(loss, w)

    return call


def _verify_loss(make: Callable[[], Data], found: tuple) -> float:
    """Against the formula in double, of a forward pass whose rows another entry checks."""
    given = make()
    key, value = given.key.double(), given.value.double()
    w = given.w.repeat(given.features).double().requires_grad_()
    out = nwfast.nadaraya_watson(key, key, value, w, exclude_self=True, method="fgt", backend="native")
    loss = (out - value).square().mean()
    (gradient,) = torch.autograd.grad(loss, w)
    errors = (found[0] - loss).abs() / loss, (found[1] - gradient).abs().max() * given.w / loss
    worst = float(torch.stack(errors).detach().max())
    if not worst <= workloads.TOLERANCE:
        raise workloads.WrongResultError(f"{LOSS}, D = {given.features}: off by {worst:.3g}")
    return worst


def _build_line(make: Callable[[], Data]) -> Call:
    return functools.partial(nwfast.local_linear, *make().inputs, method="fgt", backend="native")


def _verify_line(make: Callable[[], Data], found: Tensor) -> float:
    query, key, value, w = (tensor.double() for tensor in make().inputs)
    rows = torch.linspace(0, len(query) - 1, min(CHECKED, len(query))).long()
    expected = torch.cat(
        [nwfast.local_linear(query[some], key, value, w, backend="reference") for some in rows.split(2)]
    )
    worst = float((found[rows] - expected).abs().max() / expected.abs().max())
    if not worst <= workloads.TOLERANCE:
        raise workloads.WrongResultError(f"{LINE}, D = {key.shape[1]}: off by {worst:.3g}")
    return worst


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
