"""What does the op cost beside its arithmetic, at the chapter's n = 50?"""

import pytest
from workloads import SMALL, small


@pytest.mark.parametrize("competitor", ["native", "numba", "textbook"])
@pytest.mark.parametrize("kind", SMALL)
def test_small(run, kind, competitor):
    run(small(kind), competitor)
