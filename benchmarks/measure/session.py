"""One run of the benchmarks: checks and times groups, and keeps everything that goes into the result file."""

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.measure import machine
from benchmarks.measure.alternate import alternate, spread
from benchmarks.measure.scale import Scale
from benchmarks.peers import PEERS
from benchmarks.problems import workloads
from benchmarks.problems.cases import Group

Progress = Callable[[str, int, int], None]  # what, rounds done, rounds there are


@dataclass
class Outcome:
    """What came of one entry: its times if `seconds` is not empty, the reason why not in `absent` or `wrong`."""

    seconds: list[float] = field(default_factory=list)
    error: float = 0.0
    absent: str = ""
    wrong: str = ""


class Session:
    """Groups are timed when the first of their entries is asked for, all entries in turn."""

    def __init__(self, scale: Scale, progress: Progress = lambda what, done, rounds: None):
        self.scale = scale
        self.progress = progress
        self.outcomes: dict[str, dict[str, Outcome]] = {}
        self.groups: dict[str, Group] = {}
        self.records: dict[str, list] = {
            "memory": [],
            "accuracy": [],
            "distance": [],
            "imports": [],
            "ceiling": [],
        }
        self.wrong: list[str] = []
        self.cores_used_elsewhere: dict[str, float | None] = {}

    def check(self, group: Group, label: str) -> Callable[[], tuple]:
        """The call of an entry, its result found right. Raises WrongResultError otherwise."""
        return self._prepared(group, label)[0]

    @staticmethod
    def _prepared(group: Group, label: str) -> tuple[Callable[[], tuple], float]:
        entry = group.entries[label]
        call = entry.build()
        return call, entry.verify(call())

    def time(self, group: Group) -> dict[str, Outcome]:
        """The outcomes of a group, by label."""
        if group.name not in self.outcomes:
            neighbours = machine.Neighbours()
            self.groups[group.name] = group
            self.outcomes[group.name] = self._time(group)
            self.cores_used_elsewhere[group.name] = neighbours.cores()
        return self.outcomes[group.name]

    def _time(self, group: Group) -> dict[str, Outcome]:
        outcomes = {label: Outcome(absent=entry.why_not()) for label, entry in group.entries.items()}
        calls = {}
        for label, outcome in outcomes.items():
            if outcome.absent:
                continue
            self.progress(f"{group.name}: checking {label}", 0, 0)
            try:
                calls[label], outcome.error = self._prepared(group, label)
            except workloads.WrongResultError as error:
                outcome.wrong = str(error)
            except Exception as error:  # a peer that fails is reported, and the others are timed
                outcome.wrong = f"{group.name}, {label}: {type(error).__name__}: {error}"
            if outcome.wrong:
                self.wrong.append(outcome.wrong)
        times = alternate(
            calls,
            group.seconds * self.scale.share,
            least_rounds=5 if group.seconds > 1 else 3,
            on_round=functools.partial(self.progress, group.name),
        )
        for label, seconds in times.items():
            outcomes[label].seconds = seconds
        calls.clear()
        gc.collect()
        return outcomes

    def absent(self) -> dict[str, str]:
        """The peers that cannot run here, with the reasons."""
        return {name: reason for name, peer in PEERS.items() if (reason := peer.why_not())}

    def as_dict(self) -> list[dict]:
        """The groups as they go into the file."""
        return [group_as_dict(group, self.outcomes[name]) for name, group in self.groups.items()]


def group_as_dict(group: Group, outcomes: dict[str, Outcome]) -> dict:
    """Times with their spread, rates, errors, ratios to the named peers, and what is missing."""
    entries, missing = [], {}
    for label, outcome in outcomes.items():
        if not outcome.seconds:
            missing[label] = outcome.wrong or outcome.absent
            continue
        entry = group.entries[label]
        found = spread(outcome.seconds)
        entries.append(
            {
                "label": label,
                "peer": entry.peer,
                "work": entry.work,
                "rounds": len(outcome.seconds),
                "seconds": found.as_dict(),
                "pairs_per_second": entry.pairs / found.median,
                "error": outcome.error,
            }
        )
    ratios = [
        {"own": own, "peer": other, **ratio(outcomes[other].seconds, outcomes[own].seconds)}
        for own, other in group.ratio_pairs()
        if outcomes[own].seconds and outcomes[other].seconds
    ]
    return {
        "question": group.question,
        "name": group.name,
        "n": group.n,
        "entries": entries,
        "ratios": ratios,
        "missing": missing,
    }


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster: the ratio of the medians, and the quartiles of the ratio in each round."""
    rounds = spread([a / b for a, b in zip(slow, fast, strict=True)])
    return {
        "measured": spread(slow).median / spread(fast).median,
        "first_quartile": rounds.first_quartile,
        "third_quartile": rounds.third_quartile,
    }
