"""What does the op cost beside its arithmetic, at the chapter's n = 50?"""

from collections.abc import Iterator

from benchmarks.measure.scale import Scale
from benchmarks.problems.cases import Group, small
from benchmarks.problems.workloads import SMALL

QUESTION = "small n"


def groups(scale: Scale) -> Iterator[Group]:
    for kind in SMALL:
        yield small(QUESTION, kind, scale, 8)


def test_small(run, entry):
    run(entry)
