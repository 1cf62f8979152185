"""Fixtures of the benchmarks: sizes, the check before the timing, and where it was measured.

    pytest benchmarks --benchmark-only                 timed, at N = M = 8192
    pytest benchmarks --benchmark-only --points 2048
    pytest benchmarks --benchmark-disable              each once, small: checks results, times nothing

Comparisons between competitors come from compare.py, which lets them alternate; here each runs on its own.
"""

from collections.abc import Callable

import machine
import pytest
from workloads import Work, why_not


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--points", type=int, help="N = M of the dense benchmarks (8192; 256 if disabled)")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["nwfast"] = machine.fingerprint()


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit_info["checkout"] = machine.commit()


@pytest.fixture
def points(benchmark, request: pytest.FixtureRequest) -> int:
    """N = M of the dense benchmarks."""
    return request.config.getoption("--points", None) or (256 if benchmark.disabled else 8192)


@pytest.fixture
def run(benchmark) -> Callable[[Work, str], None]:
    """Time a competitor at a work, once its result is found right."""

    def run(work: Work, competitor: str) -> None:
        reason = why_not(competitor)
        if reason:
            pytest.skip(reason)
        call = work.prepare(competitor)
        benchmark.group = work.name
        benchmark(call)
        if benchmark.enabled:
            benchmark.extra_info["pairs_per_second"] = work.pairs / benchmark.stats.stats.median

    return run
