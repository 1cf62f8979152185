"""Fixtures of the benchmarks: sizes, the check before the timing, alternating runs, and where it was measured.

    python benchmarks/run.py                             all of it, with a progress bar and a result file
    pytest benchmarks --benchmark-only -k dense          some of it, as pytest-benchmark reports it
    pytest benchmarks --benchmark-disable                each once, small: checks results, times nothing

A test is one peer at one computation. The first test of a group lets all peers of the group take turns;
pytest-benchmark is then given the seconds of each as they were measured, by a clock that shows them.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # measure this checkout, wherever called from

import pytest

from benchmarks.measure import machine
from benchmarks.measure.scale import SCALES, Scale
from benchmarks.measure.session import Session
from benchmarks.peers import PEERS
from benchmarks.problems.cases import Group


class Clock:
    """Shows measured seconds: `advance` moves it on by the next of them."""

    def __init__(self):
        self.now, self.left = 0.0, []

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += self.left.pop(0)


CLOCK = Clock()
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small and short: only shows that it works")


def scale_of(config: pytest.Config) -> Scale:
    if config.getoption("benchmark_disable", False):
        return SCALES["smoke"]
    return SCALES["quick" if config.getoption("quick", False) else "full"]


def session_of(config: pytest.Config) -> Session:
    if SESSION not in config.stash:
        config.stash[SESSION] = Session(scale_of(config))
    return config.stash[SESSION]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["nwfast"] = machine.fingerprint({peer.package for peer in PEERS.values() if peer.package})


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit_info["checkout"] = machine.commit()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each entry of each group of the file."""
    if "entry" in metafunc.fixturenames:
        entries = [
            pytest.param((group, label), id=f"{group.name}-{label}", marks=pytest.mark.benchmark(timer=CLOCK))
            for group in metafunc.module.groups(scale_of(metafunc.config))
            for label in group.entries
        ]
        metafunc.parametrize("entry", entries)


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    return session_of(pytestconfig)


@pytest.fixture
def scale(session: Session) -> Scale:
    return session.scale


@pytest.fixture
def run(benchmark, session: Session) -> Callable[[tuple[Group, str]], None]:
    """Check an entry, and report the times that it had in turn with the others of its group."""

    def run(entry: tuple[Group, str]) -> None:
        group, label = entry
        reason = group.entries[label].why_not()
        if reason:
            pytest.skip(reason)
        benchmark.group = f"{group.question}: {group.name}"
        if benchmark.disabled:
            call = session.check(group, label)
            benchmark(call)
            return
        outcomes = session.time(group)
        outcome = outcomes[label]
        assert not outcome.wrong, outcome.wrong
        CLOCK.left = list(outcome.seconds)
        benchmark.pedantic(CLOCK.advance, rounds=len(outcome.seconds))
        benchmark.extra_info["pairs_per_second"] = group.entries[label].pairs / benchmark.stats.stats.median
        benchmark.extra_info["error"] = outcome.error
        for own, other in group.ratio_pairs():
            if own == label and outcomes[other].seconds:
                median = sorted(outcomes[other].seconds)[len(outcomes[other].seconds) // 2]
                benchmark.extra_info[f"times faster than {other}"] = median / benchmark.stats.stats.median

    return run
