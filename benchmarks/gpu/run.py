"""The comparison on a GPU: both backends against who else computes the same, with the bars, in a few minutes.

    python benchmarks/gpu/run.py                 writes benchmarks/results/<device>.json, prints Markdown
    python benchmarks/gpu/run.py --only forward,small
    python benchmarks/gpu/run.py --quick --device cpu --backends native  a rehearsal: small, on any machine

Every result is checked against float64 before it is timed; the exit status is 1 if one is wrong, whatever the timings.
A bar that is missed is reported and does not change it. The file is written after every question, so that a run that
is cut short leaves what it had. Where there is no .git, NWFAST_COMMIT names the commit.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # measure this checkout, wherever called from

import torch

from benchmarks.gpu import machine as gpu_machine
from benchmarks.gpu import problems
from benchmarks.gpu import small as gpu_small
from benchmarks.gpu.problems import Competitor, Problem, problem
from benchmarks.measure import machine
from benchmarks.measure.alternate import alternate, clock_of, spread
from benchmarks.measure.bar import Bar
from benchmarks.problems.workloads import SMALL, WrongResultError

RESULTS = Path(__file__).resolve().parent.parent / "results"
LARGE, MIDDLE = 131072, 32768  # the textbook's matrix takes 64 GiB at the first, 4 GiB at the second


@dataclass
class Results:
    """Everything measured, as it goes into the file."""

    device: torch.device
    backends: list[str]
    share: float  # of the usual time for a question
    medians: list[dict] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    clocks: dict[str, dict] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def rate(self, work: str, competitor: str) -> float | None:
        """Pairs per second; None where it was not measured."""
        return next(
            (
                m["pairs_per_second"]
                for m in self.medians
                if (m["work"], m["competitor"]) == (work, competitor)
            ),
            None,
        )

    def add_bar(self, what: str, limit: float, measured: float | None, unit: str = "times") -> None:
        if measured is not None:
            self.bars.append(Bar(what, limit, measured, unit=unit))

    def add_ratio(self, what: str, limit: float, fast: float | None, slow: float | None) -> None:
        if fast is not None and slow is not None:
            self.add_bar(what, limit, fast / slow)


@contextmanager
def question(name: str, results: Results) -> Iterator[gpu_machine.Clocks]:
    """Clocks that look at the device during one question; its rates then get their share of the ceiling."""
    print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
    clocks, before = gpu_machine.Clocks(results.device), len(results.medians)
    yield clocks
    results.clocks[name] = clocks.as_dict()
    seen, highest = clocks.ceiling()
    for own in results.medians[before:]:
        own["question"] = name
        own["share_of_ceiling_at_work"] = own["pairs_per_second"] / seen if seen else None
        own["share_of_ceiling"] = own["pairs_per_second"] / highest if highest else None


def time_problem(
    given: Problem,
    competitors: list[Competitor],
    results: Results,
    clocks: gpu_machine.Clocks,
    seconds: float = 5,
) -> None:
    """Check, let alternate, add medians. Who cannot run, has not the memory or is wrong is left out, and it is said."""
    calls, errors = {}, {}
    for competitor in competitors:
        where = f"{given.name}: {competitor.name}"
        try:
            if competitor.why_not:
                results.left_out[where] = competitor.why_not
                continue
            calls[competitor.name], errors[competitor.name] = competitor.prepare(given)
        except WrongResultError as error:
            results.wrong.append(str(error))
        except Exception as error:  # a competitor may fail in ways of its own: it must not end the run
            # One of ours that fails is wrong; so is one whose device is lost, which nobody survives.
            reason = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[
                    :200
                ]
            )
            if competitor.name in results.backends:
                results.wrong.append(f"{where}: {reason}")
            results.left_out[where] = reason
        if results.device.type == "cuda":
            torch.cuda.empty_cache()
    try:
        times = alternate(calls, seconds * results.share, clock_of(results.device, clocks.look))
    except torch.OutOfMemoryError:  # each had the memory alone, not beside what the others keep
        others = [name for name in calls if name not in results.backends]
        results.left_out |= {
            f"{given.name}: {name}": "not enough memory beside the others" for name in others
        }
        ours = {name: call for name, call in calls.items() if name in results.backends}
        del calls
        torch.cuda.empty_cache()
        times = alternate(ours, seconds * results.share, clock_of(results.device, clocks.look))
    for name, own in times.items():
        add_median(results, given.name, name, own, given.pairs, errors[name])


def add_median(
    results: Results, work: str, competitor: str, seconds: list[float], pairs: int, error: float | None = None
) -> None:
    median = statistics.median(seconds)
    results.medians.append(
        {"work": work, "competitor": competitor, "rounds": len(seconds), "seconds": spread(seconds).as_dict()}
        | {"pairs_per_second": pairs / median, "error": error}
    )
    print(
        f"    {work:58} {competitor:30} {format_seconds(median):>10} {pairs / median / 1e12:8.3g} Tpair/s",
        flush=True,
    )


def forward(results: Results, size: Callable[[int], int]) -> None:
    """One feature, one channel: the headline, and the two lines where their matrix fits."""
    ours = [problems.backend(name) for name in results.backends]
    compiled = problems.compiled(), problems.compiled(column=True)
    large, middle = (problem(results.device, size(n)) for n in (LARGE, MIDDLE))
    with question("forward", results) as clocks:
        others = *compiled, problems.attention(), problems.flex_attention(), problems.keops()
        time_problem(large, [*ours, *others], results, clocks)
        time_problem(middle, [*ours, problems.lines(), *compiled], results, clocks)
    best = [
        rate for own in compiled for given in (large, middle) if (rate := results.rate(given.name, own.name))
    ]
    for name in results.backends:
        own = results.rate(large.name, name)
        results.add_bar(f"{name}, {large.name}", 2.5, own and own / 1e12, "Tpair/s")
        slow = results.rate(middle.name, "two lines")
        results.add_ratio(
            f"{name}, {large.name}, against the two lines at {middle.n}, by pairs/s", 20, own, slow
        )
        results.add_ratio(
            f"{name}, {large.name}, against torch.compile at its best size, by pairs/s",
            3,
            own,
            max(best, default=None),
        )


def gradients(results: Results, size: Callable[[int], int]) -> None:
    """Forward + backward, to all four and to w alone."""
    ours = [problems.backend(name) for name in results.backends]
    large, large_w, middle = (
        problem(results.device, size(n), wanted=wanted)
        for n, wanted in ((LARGE, "qkvw"), (LARGE, "w"), (MIDDLE, "qkvw"))
    )
    with question("forward + backward", results) as clocks:
        time_problem(large, ours, results, clocks)
        time_problem(large_w, ours, results, clocks, 2)
        time_problem(middle, [*ours, problems.lines(), problems.compiled()], results, clocks)
    for name in results.backends:
        own = results.rate(large.name, name)
        results.add_bar(f"{name}, {large.name}", 1, own and own / 1e12, "Tpair/s")


def features(results: Results, size: Callable[[int], int]) -> None:
    """Several features and channels, where the work is a matrix product's."""
    ours = [problems.backend(name) for name in results.backends]
    wide = problem(results.device, size(MIDDLE), 3, 64, torch.float16)
    one_channel = problem(results.device, size(MIDDLE), 3, 1)
    with question("several features", results) as clocks:
        time_problem(wide, [*ours, problems.attention(), problems.flex_attention()], results, clocks)
        time_problem(one_channel, [*ours, problems.attention(), problems.keops()], results, clocks, 3)
    for name in results.backends:
        results.add_ratio(
            f"{name}, {wide.name}, against SDPA", 1, results.rate(wide.name, name),
            results.rate(wide.name, "SDPA on [k, k^2]"),
        )  # fmt: skip


def small(results: Results, size: Callable[[int], int]) -> None:
    """n = 50, called and replayed from a graph."""
    with question("small", results) as clocks:
        for kind in SMALL:
            work = f"{kind}, n = {gpu_small.N}, keys ({gpu_small.N}, {gpu_small.N - 1})"
            names = [*results.backends, gpu_small.LINES]
            try:
                calls = gpu_small.calls(kind, names, results.device)
            except WrongResultError as error:
                results.wrong.append(str(error))
                continue
            for name, own in alternate(
                calls, 3 * results.share, clock_of(results.device, clocks.look)
            ).items():
                add_median(results, work, name, own, gpu_small.N * (gpu_small.N - 1))
            for name in results.backends:
                for how in "", ", graph":
                    own, slow = (results.rate(work, who + how) for who in (name, gpu_small.LINES))
                    results.add_ratio(f"{name}{how}, {work}, against the two lines{how}", 1, own, slow)


def scaling(results: Results, size: Callable[[int], int]) -> None:
    """The forward pass over N."""
    ours = [problems.backend(name) for name in results.backends]
    with question("scaling", results) as clocks:
        for exponent in range(10, 21, 2):
            time_problem(problem(results.device, size(2**exponent)), ours, results, clocks, 1)


QUESTIONS = {
    "forward": forward,
    "gradients": gradients,
    "features": features,
    "small": small,
    "scaling": scaling,
}


def format_seconds(seconds: float) -> str:
    """Three digits in a fitting unit."""
    for unit, size in ("s", 1.0), ("ms", 1e-3), ("us", 1e-6):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def as_markdown(content: dict) -> str:
    """The summary: what was measured where, and the bars."""
    place, versions = content["machine"], content["machine"]["versions"]
    lines = [
        f"{place['device']}, torch {versions['torch']}, triton {versions['triton']}, Python {versions['python']}, "
        f"driver {place.get('driver', 'none')}; commit {content['commit']['commit'][:10]}, {content['date']}.",
        "",
        "| work | who | median | quartiles | Tpair/s | of the ceiling, at work / at most | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for own in content["medians"]:
        seconds = own["seconds"]
        shares = own["share_of_ceiling_at_work"], own["share_of_ceiling"]
        ceiling = " / ".join("-" if share is None else f"{100 * share:.0f} %" for share in shares)
        error = "" if own["error"] is None else f"{own['error']:.2g}"
        lines.append(
            f"| {own['work']} | {own['competitor']} | {format_seconds(seconds['median'])} | "
            f"{format_seconds(seconds['first_quartile'])} to {format_seconds(seconds['third_quartile'])} | "
            f"{own['pairs_per_second'] / 1e12:.3g} | {ceiling} | {error} |"
        )
    lines += ["", "| bar | at least | measured | |", "| --- | --- | --- | --- |"]
    for bar in content["bars"]:
        verdict = "met" if bar["passed"] else "**missed**"
        lines.append(
            f"| {bar['what']} | {bar['limit']:g} {bar['unit']} | {bar['measured']:.3g} | {verdict} |"
        )
    lines += [""] + [f"Left out: {where}: {reason}" for where, reason in content["left_out"].items()]
    return "\n".join(lines)


def as_content(results: Results, options: argparse.Namespace) -> dict:
    return {
        "quick": options.quick,
        "date": machine.today(),
        "commit": gpu_machine.commit(),
        "machine": gpu_machine.fingerprint(results.device),
        "clocks": results.clocks,
        "bars": [bar.as_dict() for bar in results.bars],
        "medians": results.medians,
        "left_out": results.left_out,
        "wrong": results.wrong,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the GPU backends with who else computes the same.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu for a rehearsal")
    parser.add_argument("--backends", default="cuda,triton", help="which of nwfast to time")
    parser.add_argument("--only", default=",".join(QUESTIONS), help=f"questions, of {', '.join(QUESTIONS)}")
    parser.add_argument("--quick", action="store_true", help="small and short: only shows that it works")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the result file")
    parser.add_argument("--name", help="of the result file (default: the device's, or gpu-quick)")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(QUESTIONS):
        parser.error(f"unknown questions: {', '.join(sorted(unknown))}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --quick --backends native rehearses this without one")
    return options


def main() -> int:
    options = parse()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    results = Results(device, options.backends.split(","), 0.02 if options.quick else 1.0)
    options.output.mkdir(parents=True, exist_ok=True)
    device_name = gpu_machine.fingerprint(device)["device"]
    name = options.name or ("gpu-quick" if options.quick else device_name)
    path = options.output / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"

    start = time.monotonic()
    for asked in options.only.split(","):
        QUESTIONS[asked](results, lambda n: min(n, 1024) if options.quick else n)
        content = as_content(results, options)
        path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{as_markdown(content)}")
    met = sum(bar.passed for bar in results.bars)
    print(
        f"\n{met} of {len(results.bars)} bars met; {time.monotonic() - start:.0f} s; written to {path}",
        flush=True,
    )
    for line in results.wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if results.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
