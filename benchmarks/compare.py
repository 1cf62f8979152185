"""The comparison that the README reports: competitors alternate in one process, medians with their spread, bars.

    python benchmarks/compare.py                 about 3 minutes, writes benchmarks/results/<name>.json
    python benchmarks/compare.py --quick         small and short: only shows that it works
    python benchmarks/report.py FILE             puts the table of a result file into the README

Every result is checked against float64 before it is timed. The exit status is 1 if one is wrong or not accurate
enough, whatever the timings; a bar that is missed is printed and does not change it.
"""

import argparse
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # measure this checkout, wherever called from

import accuracy
import fresh
import machine
import workloads
from alternate import alternate, spread
from report import busy_questions, format_time
from tqdm import tqdm
from workloads import Work, forward, gradients, small, why_not

RESULTS = Path(__file__).resolve().parent / "results"
POINTS, QUICK_POINTS = 8192, 512


@dataclass(frozen=True)
class Bar:
    """What a measured number is held against; `measured` is a ratio where no unit is given."""

    what: str
    limit: float
    measured: float
    first_quartile: float
    third_quartile: float
    at_least: bool
    unit: str = "times"

    @property
    def passed(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def as_dict(self) -> dict:
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Ratio:
    """A bar on the time of one competitor over that of another: `at_least` for how many times faster the second is."""

    what: str
    slow: str
    fast: str
    limit: float
    at_least: bool = True


@dataclass(frozen=True)
class Group:
    """Competitors that take turns: label -> (work, who does it), and the bars between their labels."""

    name: str
    entries: dict[str, tuple[Work, str]]
    ratios: tuple[Ratio, ...]
    seconds: float


@dataclass
class Results:
    """Everything measured, as it goes into the file."""

    medians: list[dict] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    accuracy: list[dict] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    cores_used_elsewhere: dict[str, float | None] = field(default_factory=dict)


def groups(points: int) -> list[Group]:
    """The timed questions."""
    one, to_w, to_all = forward(points), gradients(points, "w"), gradients(points, "qkvw")
    scalar, wide = forward(points, features=3), forward(points, features=3, channels=64)
    found = [
        Group(
            "forward",
            {who: (one, who) for who in workloads.COMPETITORS},
            (
                Ratio("forward, against torch.compile", "torch.compile", "native", 5),
                Ratio("forward, against the textbook", "textbook", "native", 60),
                Ratio("Numba forward, against torch.compile", "torch.compile", "numba", 1.5),
            ),
            20,
        ),
        Group(
            "gradients",
            {
                "native forward": (one, "native"),
                **{f"{who} w": (to_w, who) for who in workloads.COMPETITORS},
                **{f"{who} q, k, v, w": (to_all, who) for who in workloads.COMPETITORS if who != "textbook"},
            },
            (
                Ratio("forward + backward to w, against torch.compile", "torch.compile w", "native w", 30),
                Ratio("forward + backward to w, against the textbook", "textbook w", "native w", 150),
                Ratio(
                    "forward + backward to w, over the forward",
                    "native w",
                    "native forward",
                    1.5,
                    at_least=False,
                ),
                Ratio(
                    "forward + backward to q, k, v, w, over the forward",
                    "native q, k, v, w",
                    "native forward",
                    4,
                    at_least=False,
                ),
            ),
            30,
        ),
    ]
    for work, what, limit in (scalar, "D = 3, C = 1", 5), (wide, "D = 3, C = 64", 1):
        ratio = Ratio(f"forward, {what}, against torch.compile", "torch.compile", "native", limit)
        entries = {who: (work, who) for who in ("native", "numba", "torch.compile")}
        found.append(Group(what, entries, (ratio,), 15))
    for kind, limit in zip(workloads.SMALL, (1.2, 2, 2), strict=True):
        work = small(kind)
        ratio = Ratio(f"{work.name}, against the textbook", "textbook", "native", limit)
        found.append(Group(work.name, {who: (work, who) for who in ("native", "textbook")}, (ratio,), 5))
    return found


def time_group(group: Group, share: float, results: Results, progress: tqdm) -> None:
    """Check, let alternate, and add medians and bars; a competitor that is wrong is not timed, nor its ratios."""
    calls = {}
    for label, (work, who) in group.entries.items():
        progress.set_postfix_str(f"{group.name}: {label}")
        if why_not(who):
            continue
        try:
            calls[label] = work.prepare(who)
        except workloads.WrongResultError as error:
            results.wrong.append(str(error))
    with tqdm(desc=group.name, unit="round", leave=False, disable=progress.disable) as rounds_bar:

        def on_round(done: int, rounds: int) -> None:
            rounds_bar.total = rounds
            rounds_bar.update(done - rounds_bar.n)

        times = alternate(calls, group.seconds * share, on_round=on_round)
    for label, own in times.items():
        work, who = group.entries[label]
        found = spread(own)
        rate = work.pairs / found.median
        results.medians.append(
            {"group": group.name, "work": work.name, "competitor": who, "rounds": len(own)}
            | {"seconds": found.as_dict(), "pairs_per_second": rate}
        )
    for ratio in group.ratios:
        if ratio.slow in times and ratio.fast in times:
            results.bars.append(_ratio_bar(ratio, times[ratio.slow], times[ratio.fast]))


def _ratio_bar(ratio: Ratio, slow: list[float], fast: list[float]) -> Bar:
    """The ratio of the medians; the quartiles are those of the ratio in each round."""
    rounds = spread([a / b for a, b in zip(slow, fast, strict=True)])
    measured = statistics.median(slow) / statistics.median(fast)
    return Bar(
        ratio.what, ratio.limit, measured, rounds.first_quartile, rounds.third_quartile, ratio.at_least
    )


def measure_memory(n: int, results: Results) -> None:
    """Peak of the resident memory of one forward in a fresh process."""
    found = fresh.peak_memory(n)
    if not found["error"] <= workloads.TOLERANCE:
        results.wrong.append(f"forward, N = M = {n}: relative error {found['error']:.3g}")
    what = f"forward, N = M = {n}, memory over import"
    results.bars.append(Bar(what, fresh.MOST_ADDED_MB, *[found["added_MB"]] * 3, at_least=False, unit="MB"))
    results.medians.append(
        {"group": "memory", "work": f"forward, N = M = {n}, first call", "competitor": "native", "rounds": 1}
        | {"seconds": spread([found["seconds"]]).as_dict(), "pairs_per_second": n * n / found["seconds"]}
    )


def measure_import(rounds: int, results: Results, progress: tqdm) -> None:
    """Median over fresh processes of what `import nwfast` takes after `import torch`."""
    fresh.import_times()  # files read from disk, bytecode written
    times = []
    for done in range(rounds):
        progress.set_postfix_str(f"import time: {done + 1} of {rounds}")
        times.append(fresh.import_times())
    found = spread([1000 * own["nwfast"] for own in times])
    results.bars.append(
        Bar("import nwfast, over import torch", fresh.MOST_IMPORT_MS, *asdict(found).values(), False, "ms")
    )


def measure_accuracy(n: int, results: Results) -> None:
    """The largest errors, as shares of what is allowed."""
    backends = tuple(name for name in ("native", "numba") if not why_not(name))
    found = accuracy.findings(n, backends)
    results.accuracy = [{**asdict(own), "share": own.share} for own in found]
    for dtype, allowed in ("float32", "2 x textbook's + 4 ulp"), ("float64", "1e-12"):
        worst = max(own.share for own in found if own.dtype == dtype)
        results.bars.append(
            Bar(f"{dtype} error, as a share of {allowed}", 1, *[worst] * 3, at_least=False, unit="of it")
        )
    results.wrong += [
        f"{own.backend}, {own.dtype}, {own.case}, {own.quantity}: error {own.error:.3g}, allowed {own.limit:.3g}"
        for own in found
        if not own.share <= 1
    ]


def measure(points: int, quick: bool, show_progress: bool) -> Results:
    """All questions in turn."""
    results = Results()
    share = 0.02 if quick else 1.0
    with tqdm(unit="question", disable=not show_progress) as progress:
        questions: dict[str, Callable[[], None]] = {
            group.name: functools.partial(time_group, group, share, results, progress)
            for group in groups(points)
        }
        questions["memory"] = lambda: measure_memory(20_000 if quick else 200_000, results)
        questions["import time"] = lambda: measure_import(2 if quick else 9, results, progress)
        questions["accuracy"] = lambda: measure_accuracy(200 if quick else 1000, results)
        progress.total = len(questions)
        for name, question in questions.items():
            progress.set_postfix_str(name)
            neighbours = machine.Neighbours()
            question()
            results.cores_used_elsewhere[name] = neighbours.cores()
            progress.update()
    return results


def as_text(results: Results) -> str:
    """Times and rates, then the bars."""
    lines = [f"{'work':55} {'competitor':14} {'median':>10}  {'quartiles':>21} {'Gpair/s':>8}  rounds"]
    for own in results.medians:
        seconds = own["seconds"]
        quartiles = f"{format_time(seconds['first_quartile'])} to {format_time(seconds['third_quartile'])}"
        lines.append(
            f"{own['work']:55} {own['competitor']:14} {format_time(seconds['median']):>10}  {quartiles:>21} "
            f"{own['pairs_per_second'] / 1e9:8.3g}  {own['rounds']:6}"
        )
    lines += ["", f"{'bar':60} {'':8} {'limit':>6} {'measured':>9}  {'quartiles':>16}  unit"]
    for bar in results.bars:
        quartiles = f"{bar.first_quartile:.3g} to {bar.third_quartile:.3g}"
        lines.append(
            f"{bar.what:60} {'at least' if bar.at_least else 'at most':8} {bar.limit:6g} {bar.measured:9.3g}  "
            f"{quartiles:>16}  {bar.unit:5}  {'pass' if bar.passed else 'MISSED'}"
        )
    return "\n".join(lines)


def default_name(place: dict) -> str:
    """A file name of the device or processor, and its cores."""
    device = place["processor"] if place["device"] == "cpu" else place["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{slug}-{place['cores']}-cores"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare nwfast with torch.compile and the textbook.")
    parser.add_argument("--quick", action="store_true", help="small and short: only shows that it works")
    parser.add_argument("--points", type=int, help=f"N = M ({POINTS}; {QUICK_POINTS} with --quick)")
    parser.add_argument(
        "--name", help="of the file in benchmarks/results/ (default: the processor, or quick)"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    options = parser.parse_args()
    if why_not("native"):
        parser.error(f"what is compared is the C++ backend: {why_not('native')}")
    points = options.points or (QUICK_POINTS if options.quick else POINTS)
    place = machine.fingerprint()
    if not place["extension_is_current"]:
        print("warning: C++ sources are younger than the extension: run make setup first", file=sys.stderr)
    commit = machine.commit()

    results = measure(points, options.quick, not options.no_progress)

    print(as_text(results))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name or ('quick' if options.quick else default_name(place))}.json"
    content = {
        "quick": options.quick,
        "points": points,
        "date": machine.today(),
        "commit": commit,
        "machine": place,
        "bars": [bar.as_dict() for bar in results.bars],
        "medians": results.medians,
        "accuracy": results.accuracy,
        "wrong": results.wrong,
        "cores_used_elsewhere": results.cores_used_elsewhere,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{sum(bar.passed for bar in results.bars)} of {len(results.bars)} bars met; written to {path}")
    if busy := busy_questions(results.cores_used_elsewhere):
        print(f"warning: not to be trusted, other processes ran during: {', '.join(busy)}", file=sys.stderr)
    for line in results.wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if results.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
