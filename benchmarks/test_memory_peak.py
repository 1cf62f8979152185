"""How much memory does a forward pass need beyond what importing takes?"""

import sys

import fresh
import pytest
from workloads import TOLERANCE, why_not


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc/self")
def test_peak_memory(benchmark):
    if why_not("native") and benchmark.enabled:
        pytest.skip(why_not("native"))  # 4e10 pairs
    n = 10_000 if benchmark.disabled else 200_000
    found = benchmark.pedantic(fresh.peak_memory, (n,), rounds=1)
    benchmark.extra_info.update(found)
    assert found["error"] <= TOLERANCE
    if not why_not("native"):
        assert found["added_MB"] <= fresh.MOST_ADDED_MB
