"""How fast is the dense forward pass: one feature and one channel, three and many features, 64 channels?"""

import functools
from collections.abc import Iterator

from benchmarks.measure.scale import Scale
from benchmarks.peers import PEERS
from benchmarks.problems.cases import Group, forward
from benchmarks.problems.workloads import data

QUESTION = "dense forward"
# The textbook is left out, with its (M, N, D), and the trees, which have nothing to skip at so wide a bandwidth.
SEVERAL = [name for name in PEERS if name not in ("textbook", "KernelDensity", "RadiusNeighbors")]
MANY = (16, 64, 256)  # features: matrix products


def groups(scale: Scale) -> Iterator[Group]:
    one_feature = [name for name in PEERS if name != "statsmodels"]  # which takes 7 s
    yield forward(QUESTION, functools.partial(data, scale.points), scale, 40, one_feature, compiled=True)
    for channels, seconds in (1, 25), (64, 25):
        make = functools.partial(data, scale.points, 3, channels)
        yield forward(QUESTION, make, scale, seconds, SEVERAL)
    for features in MANY:
        w = round(0.7 * features**-0.5, 3)  # two points are about a bandwidth apart
        make = functools.partial(data, scale.points // 2, features, 64, w)
        yield forward(QUESTION, make, scale, 5, ("native", "sdpa"))


def test_forward(run, entry):
    run(entry)
