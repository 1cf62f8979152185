"""How does the time grow with N? Sorted queries and keys, w = 3, N = M; then narrow bandwidths in linear time."""

import functools
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.measure.scale import Scale
from benchmarks.peers import PEERS
from benchmarks.problems.cases import Group, forward, sorting
from benchmarks.problems.workloads import data

QUESTION = "scaling in N"
W = 3.0
LINEAR = ("native fgt", "numba fgt", "FINUFFT ratio", "KDEpy binned")


def groups(scale: Scale) -> Iterator[Group]:
    for n in scale.scaling:
        make = functools.partial(data, n, w=W, ordered=True)
        group = forward(QUESTION, make, scale, 1 if n > 50_000 else 30, PEERS)
        yield replace(group, entries={**group.entries, "np.sort": sorting(n)})
    for n, w in scale.narrow:
        group = forward(QUESTION, functools.partial(data, n, w=w, ordered=True), scale, 5, LINEAR)
        yield replace(group, entries={**group.entries, "np.sort": sorting(n)})


def test_forward(run, entry):
    run(entry)
