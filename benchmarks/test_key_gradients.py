"""What do all gradients cost, those of keys and values included, which need a second pass over the pairs?"""

from collections.abc import Iterator

from benchmarks.measure.scale import Scale
from benchmarks.problems.cases import Group, gradients

QUESTION = "key-side gradients"


def groups(scale: Scale) -> Iterator[Group]:
    yield gradients(QUESTION, "qkvw", scale, 45)


def test_forward_and_backward(run, entry):
    run(entry)
