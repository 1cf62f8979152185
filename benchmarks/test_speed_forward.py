"""How fast is the dense forward pass with one feature and one channel?"""

import pytest
from workloads import COMPETITORS, forward


@pytest.mark.parametrize("competitor", COMPETITORS)
def test_forward(run, points, competitor):
    run(forward(points), competitor)
