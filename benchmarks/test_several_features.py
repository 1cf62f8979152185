"""How fast are two and three features in linear time, against what else there is, and in every bandwidth?

Unordered points in the unit square or cube, uniform and in five clusters with gaps. The peers that visit all pairs
whatever the data are timed on the uniform ones alone.
"""

import functools
from collections.abc import Iterator

import pytest

from benchmarks.measure import fresh, machine
from benchmarks.measure.scale import Scale
from benchmarks.peers import PEERS
from benchmarks.problems import several
from benchmarks.problems.cases import Group, forward
from benchmarks.studies import method_cost, skipping

QUESTION = "two and three features"
FEATURES = (2, 3)
WHERE = (
    "native",
    "native fgt",
    "FINUFFT ratio",
    "KDEpy binned",
    "RadiusNeighbors",
)  # where points are matters
CHOICE = (300, 1000, 3000, 10_000, 100_000)  # N = M at which "auto" has to choose


def groups(scale: Scale) -> Iterator[Group]:
    for features in FEATURES:
        w = several.W[features]
        for n in scale.several:
            for clustered in (False, True):
                make = functools.partial(several.data, n, features, w, clustered)
                names = WHERE if clustered else [name for name in PEERS if name != "textbook"]
                yield forward(QUESTION, make, scale, 1, names)
        yield several.gradients(QUESTION, scale.several[-1], features, 1)
    own = ("native", "native fgt")
    yield forward(
        QUESTION, functools.partial(several.data, several.CROSSOVER, 2, several.W[2]), scale, 2, own
    )
    yield several.growth(QUESTION, scale.several[-1], 2, 1)


def test_forward(run, entry):
    run(entry)


needs_native = pytest.mark.skipif(bool(PEERS["native fgt"].why_not()), reason="needs the C++ kernels")


@needs_native
@pytest.mark.parametrize("clustered", [False, True], ids=["uniform", "clusters"])
@pytest.mark.parametrize("features", FEATURES)
def test_bandwidths(benchmark, session, scale, features, clustered):
    n, ws = scale.several[-1], scale.several_narrow[features]
    neighbours = machine.Neighbours()
    found = benchmark.pedantic(several.bandwidths, (n, features, clustered, ws), rounds=1)
    session.records.setdefault("bandwidths", []).extend(found)
    if not clustered:
        rate = several.dense_rate(scale.points, features)
        session.records.setdefault("dense rate", []).append({"features": features, "pairs_per_second": rate})
    where = f"all bandwidths, D = {features}, {found[0]['where']}"
    session.cores_used_elsewhere[where] = neighbours.cores()


@needs_native
@pytest.mark.parametrize("features", FEATURES)
def test_memory(benchmark, session, scale, features):
    if scale.name == "smoke" and features > 2:
        pytest.skip("each case starts a process: one is enough for a smoke run")
    n = scale.several[-1]
    found = benchmark.pedantic(fresh.working_memory, ("native fgt", n, "", features), rounds=1)
    session.records.setdefault("memory of several", []).append({"features": features, "n": n, **found})


@needs_native
def test_skipping(benchmark, session, scale):
    """Five features: dense kernels, once without skipping what cannot matter."""
    n = max(n for n in scale.several if n < 100_000)
    found = benchmark.pedantic(skipping.compare, (skipping.FIVE, n, 2 if scale.share == 1 else 1), rounds=1)
    session.records["skipping"] = [found]


@needs_native
@pytest.mark.parametrize("features", FEATURES)
def test_choice(benchmark, session, scale, features):
    """Does method="auto" take the faster method?"""
    sizes = [n for n in CHOICE if n <= max(300, scale.several[-1] / 10)]
    cases = [method_cost.forward(n, n, w) for n in sizes for w in method_cost.BANDWIDTHS[1:]]
    seconds = 0.15 * scale.share
    found = benchmark.pedantic(
        lambda: [method_cost.measure(case, "native", features, seconds) for case in cases], rounds=1
    )
    worst = max(found, key=lambda row: row["ratio"])
    session.records.setdefault("choice", []).append({"features": features, "cases": len(found), **worst})
