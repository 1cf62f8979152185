"""What does the part of a training step cost that depends on the op: forward, and backward to w?"""

from collections.abc import Iterator

from benchmarks.measure.scale import Scale
from benchmarks.problems.cases import Group, gradients

QUESTION = "training step"


def groups(scale: Scale) -> Iterator[Group]:
    yield gradients(QUESTION, "w", scale, 45)


def test_forward_and_backward(run, entry):
    run(entry)
