"""What is timed against what: groups of entries that take turns, each with the float64 result it has to give."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.measure.scale import Scale
from benchmarks.peers import OWN, PEERS, Peer
from benchmarks.peers.peer import missing
from benchmarks.problems import workloads
from benchmarks.problems.workloads import Call, Data


@dataclass(frozen=True)
class Entry:
    """A peer at a computation."""

    peer: str
    work: str  # what is computed, in words
    pairs: float  # (i, j) that the computation is about, whether or not they are visited one by one
    build: Callable[[], Call]
    verify: Callable[
        [tuple], float
    ]  # the largest relative error of what the call returned, or WrongResultError
    left_out: str = ""  # the reason why it is not run at this size

    def why_not(self) -> str:
        """Empty if it can run here, else the reason."""
        return (PEERS[self.peer].why_not() if self.peer in PEERS else "") or self.left_out


@dataclass(frozen=True)
class Group:
    """Entries that take turns, by label, and about how many seconds their rounds may take together."""

    question: str
    name: str
    n: int
    seconds: float
    entries: dict[str, Entry] = field(default_factory=dict)

    def ratio_pairs(self) -> Iterable[tuple[str, str]]:
        """(own, other) labels whose ratio is reported: each of ours to each peer at the same work."""
        for own, ours in self.entries.items():
            for other, theirs in self.entries.items():
                if ours.peer in OWN and theirs.peer not in OWN and ours.work == theirs.work:
                    yield own, other


def _limits(peer: Peer, scale: Scale, given_pairs: float, points: float, times: float = 1.0) -> str:
    """The reason why a peer is left out; `times` the work of a forward pass is to be done."""
    if peer.compiles and not scale.compiled_everywhere:
        return "it takes seconds to compile, and is checked in the first question at this scale"
    return peer.too_much(given_pairs * times, points * times, scale.longest, scale.memory_limit)


def _shape(given: Data) -> str:
    if given.features == given.channels == 1:
        return "one feature, one channel"
    return f"D = {given.features}, C = {given.channels}{given.where}"


def forward(
    question: str,
    make: Callable[[], Data],
    scale: Scale,
    seconds: float,
    names: Iterable[str],
    compiled: bool = False,
) -> Group:
    """The forward pass alone, nothing requires a gradient; `compiled`: also what compiles, at any scale."""
    if compiled:
        scale = replace(scale, compiled_everywhere=True)
    given = make()
    n, features = given.query.shape[0], given.features
    bandwidth = "" if float(given.w) == 1 else f", w = {float(given.w):g}"
    work = f"forward, N = M = {n}, {_shape(given)}{bandwidth}"
    exact = functools.cache(lambda: workloads.oracle(make())[0])
    sampled = functools.cache(lambda: workloads.some_rows(make()))

    def verify(tolerance: float, found: tuple) -> float:
        if n <= 10_000:
            return workloads.check(found, (exact(),), work, tolerance)
        rows, expected = sampled()
        return workloads.check([np.asarray(found[0])[rows]], (expected,), work, tolerance)

    entries = {
        name: Entry(
            name,
            work,
            given.pairs,
            lambda peer=PEERS[name]: peer.forward(make()),
            functools.partial(verify, PEERS[name].allowed(features)),
            # A point costs what only depends on points some four times as much in each further feature.
            _limits(PEERS[name], scale, given.pairs * features, n * 4 ** min(features - 1, 2)),
        )
        for name in names
        if PEERS[name].takes(features, given.channels)
    }
    return Group(question, work, n, seconds, entries)


def gradients(question: str, wanted: str, scale: Scale, seconds: float) -> Group:
    """Forward and backward: to w (`wanted` = "w") or to query, key, value and w ("qkvw"); beside our forward alone."""
    n = scale.points
    make = functools.partial(workloads.data, n)
    work = f"forward + backward to {', '.join(wanted)}, N = M = {n}"

    @functools.cache
    def exact() -> tuple:
        out, *found = workloads.oracle(make(), gradients=True)
        return out, *(gradient for gradient, letter in zip(found, "qkvw", strict=True) if letter in wanted)

    names = [name for name, peer in PEERS.items() if peer.gradients]
    alone = forward(question, make, scale, seconds, ["native"])
    entries = {"native forward": alone.entries["native"]}
    for name in names:
        peer = PEERS[name]
        entries[name] = Entry(
            name,
            work,
            n * n,
            lambda peer=peer: peer.gradients(make(), wanted),
            lambda found, peer=peer: workloads.check(found, exact(), work, peer.tolerance),
            _limits(peer, scale, n * n, n, 3),
        )
    return Group(question, work, n, seconds, entries)


def small(question: str, kind: str, scale: Scale, seconds: float) -> Group:
    """The chapter's own size, where the op's overhead matters more than its arithmetic; a kind of `workloads.SMALL`."""
    n = scale.chapter
    work = f"{kind}, n = {n}, keys ({n}, {n - 1})"

    @functools.cache
    def exact() -> tuple:
        chapter = tuple(tensor.double() for tensor in workloads.chapter(n))
        return workloads.small(kind, workloads.per_query_lines, workloads.TextbookModule, chapter)()

    entries = {
        name: Entry(
            name,
            work,
            n * (n - 1),
            lambda peer=peer: peer.small(kind, workloads.chapter(n)),
            lambda found, peer=peer: workloads.check(found, exact(), work, peer.tolerance),
            _limits(peer, scale, n * n, n),
        )
        for name, peer in PEERS.items()
        if peer.small
    }
    return Group(question, work, n, seconds, entries)


# How much larger than the least the leave-one-out loss may be at the w that a peer selects. hessband minimises
# another criterion, the error over five folds.
LOSS_TOLERANCE = {"hessband": 1e-2}
EVALUATIONS = 25  # of loss and gradient, about, each some three forward passes' worth


def _selection_error(n: int, w: float) -> float:
    """How far w is from the best: by the loss where it can be had, else by the bandwidth that fewer points want."""
    if n > 10_000:  # the loss would take minutes
        return abs(w / (workloads.best(2000)[0] * (n / 2000) ** 0.2) - 1)
    x, y = workloads.examples(n)
    if n <= 2000:
        least = workloads.best(n)[1]
    else:  # at least it is a minimum
        least = min(workloads.leave_one_out_loss(x, y, w * factor) for factor in (0.97, 1.03))
    return workloads.leave_one_out_loss(x, y, w) / least - 1


def selection(question: str, n: int, scale: Scale, seconds: float) -> Group:
    """One full bandwidth selection: the w that minimises the mean squared leave-one-out error."""
    work = f"bandwidth selection, n = {n}"

    def verify(name: str, found: tuple) -> float:
        (w,) = found
        error, limit = _selection_error(n, w), LOSS_TOLERANCE.get(name, 1e-4) if n <= 10_000 else 0.5
        if not error <= limit:
            raise workloads.WrongResultError(
                f"{work}, {name}: w = {w:.4g} is off by {error:.3g}, more than {limit:g}"
            )
        return max(error, 0.0)

    entries = {
        name: Entry(
            name,
            work,
            n * n,
            lambda peer=peer: peer.select(*workloads.examples(n)),
            functools.partial(verify, name),
            (missing(peer.minimised_by) if peer.minimised_by else "")
            or _limits(peer, scale, n * n, n, EVALUATIONS),
        )
        for name, peer in PEERS.items()
        if peer.select
    }
    return Group(question, work, n, seconds, entries)


def sorting(n: int) -> Entry:
    """np.sort of n float32: the measure of linear time, that everyone has."""
    array = workloads.data(n).key.numpy()
    work = f"np.sort, N = {n}"

    def verify(found: tuple) -> float:
        if not (np.diff(found[0]) >= 0).all():
            raise workloads.WrongResultError(f"{work}: not sorted")
        return 0.0

    return Entry("np.sort", work, 0, lambda: lambda: (np.sort(array),), verify)
