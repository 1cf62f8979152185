"""How fast is the forward pass with several features and channels? The textbook, with its (M, N, D), is left out."""

import pytest
from workloads import forward


@pytest.mark.parametrize("competitor", ["native", "numba", "torch.compile"])
@pytest.mark.parametrize("channels", [1, 64])
def test_forward(run, points, channels, competitor):
    run(forward(points, features=3, channels=channels), competitor)
