"""How much memory does a call need beyond its inputs? Each case in a fresh process."""

import sys

import pytest

from benchmarks.measure import fresh
from benchmarks.measure.scale import Scale
from benchmarks.peers import PEERS
from benchmarks.problems.workloads import TOLERANCE

LONGEST = 3.0  # seconds of one call, of which a case makes two

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc/self")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        from benchmarks.conftest import scale_of

        scale: Scale = scale_of(metafunc.config)
        cases = [(name, n, "") for n in scale.memory for name, peer in PEERS.items() if peer.takes(1, 1)]
        cases += [(name, scale.points, "w") for name, peer in PEERS.items() if peer.gradients]
        ids = [f"{name}-{n}{'-w' if wanted else ''}" for name, n, wanted in cases]
        metafunc.parametrize("case", cases, ids=ids)


def test_working_memory(benchmark, session, scale, case):
    name, n, wanted = case
    peer = PEERS[name]
    if scale.name == "smoke" and not (name == "native" and wanted):
        pytest.skip("each case starts a process: too many for a smoke run")
    reason = peer.why_not() or peer.too_much(
        n * n * (3 if wanted else 1), n, min(LONGEST, scale.longest), scale.memory_limit
    )
    if reason:
        pytest.skip(reason)
    found = benchmark.pedantic(fresh.working_memory, (name, n, wanted), rounds=1)
    benchmark.extra_info.update(found)
    session.records["memory"].append({"peer": name, "n": n, "wanted": wanted, **found})


def test_first_call(benchmark, session, scale):
    """What the first forward adds to the memory after the imports, the inputs included."""
    reason = PEERS["native"].why_not()
    if reason and benchmark.enabled:
        pytest.skip(reason)  # 4e10 pairs
    n = scale.memory_peak
    found = benchmark.pedantic(fresh.peak_memory, (n,), rounds=1)
    benchmark.extra_info.update(found)
    assert found["error"] <= TOLERANCE
    if not reason:
        session.records["first call"] = [{"n": n, **found}]
        assert found["added_MB"] <= 1000, "far from O(M + N)"
