"""What do gradients cost: those of a training step for w, and all of them?"""

import pytest
from workloads import COMPETITORS, gradients


@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("wanted", ["w", "qkvw"])
def test_forward_and_backward(run, points, wanted, competitor):
    run(gradients(points, wanted), competitor)
