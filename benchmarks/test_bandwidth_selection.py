"""How long does one full bandwidth selection take?

Ours: `nwfast.select_bandwidth` (native fgt); else the leave-one-out loss and its gradient through the op, minimised
over log w by scipy's L-BFGS-B.
"""

from collections.abc import Iterator

from benchmarks.measure.scale import Scale
from benchmarks.problems.cases import Group, selection

QUESTION = "bandwidth selection"


def groups(scale: Scale) -> Iterator[Group]:
    for n in scale.selection:
        yield selection(QUESTION, n, scale, 20 if n < 1000 else 1)


def test_selection(run, entry):
    run(entry)
