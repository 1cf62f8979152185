"""Are results as accurate as the textbook's in the same precision?"""

import accuracy
import pytest
from workloads import why_not


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_accuracy(benchmark, points, backend):
    if why_not(backend):
        pytest.skip(why_not(backend))
    found = benchmark.pedantic(accuracy.findings, (min(points, 1000), (backend,)), rounds=1)
    worst = max(found, key=lambda finding: finding.share)
    benchmark.extra_info["worst"] = {**vars(worst), "share_of_limit": worst.share}
    assert worst.share <= 1, worst
