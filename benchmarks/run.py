"""All benchmarks in one run, with a progress bar and a result file.

    python benchmarks/run.py                     under 20 minutes on 2 cores, writes benchmarks/results/<machine>.json
    python benchmarks/run.py --quick             small and short: only shows that it works, writes quick.json
    python benchmarks/run.py --only dense        files whose name contains the word; to the terminal only, unless named

Each file runs in a process of its own. The exit status is 1 if a result is wrong or not accurate enough, whatever the
timings; a bar that is missed is printed and does not change it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # measure this checkout, wherever called from
# All peers have as many threads: set before anything starts them.
os.environ.update(dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS"], str(len(os.sched_getaffinity(0)))))

import pytest
from tqdm import tqdm

from benchmarks.measure.bar import Bar
from benchmarks.measure.session import Session
from benchmarks.pages.bars import bars
from benchmarks.pages.tables import busy, format_time

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


class Progress:
    """A bar over the tests in place of pytest's dots, and the session that they fill."""

    def __init__(self, show: bool):
        self.bar = tqdm(unit="test", disable=not show, smoothing=0)
        self.rounds = tqdm(unit="round", leave=False, disable=not show, position=1)
        self.session: Session | None = None
        self.failed: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        from benchmarks.conftest import session_of

        self.session = session_of(session.config)
        self.session.progress = self._round
        self.bar.total = len(session.items)

    def _round(self, what: str, done: int, rounds: int) -> None:
        self.rounds.set_description_str(what[:60], refresh=False)
        if done < self.rounds.n or done == 0:
            self.rounds.reset()
        self.rounds.total = rounds
        self.rounds.n = done
        self.rounds.refresh()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.bar.set_postfix_str(nodeid.partition("::")[0].rpartition("/")[2])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(f"{report.nodeid}: {str(report.longrepr).splitlines()[-1]}")
        if report.when == "teardown":
            self.bar.update()

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return (report.outcome if report.when == "call" or not report.passed else "", "", "")

    def close(self) -> None:
        self.rounds.close()
        self.bar.close()


def files_of(only: str) -> list[Path]:
    """The files whose names contain a word."""
    files = sorted(path for path in HERE.glob("test_*.py") if only in path.stem)
    if not files:
        raise SystemExit(f"no file test_*{only}*.py in {HERE}")
    return files


def run(file: Path, quick: bool, progress: bool) -> tuple[Session | None, list[str]]:
    """The session and the failures; the session is None if pytest could not start."""
    plugin = Progress(progress)
    options = ["-q", "-q", "-s", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-W", "ignore"]
    options += ["--benchmark-only", "--benchmark-quiet", "--rootdir", str(HERE.parent)]
    try:
        pytest.main([str(file), *options, *(["--quick"] if quick else [])], plugins=[plugin])
    finally:
        plugin.close()
    return plugin.session, plugin.failed


def content(session: Session, found: list[Bar], failed: list[str], place: dict) -> dict:
    """What goes into the file."""
    from benchmarks.measure import machine

    return {
        "quick": session.scale.name != "full",
        "points": session.scale.points,
        "date": machine.today(),
        "commit": machine.commit(),
        "machine": place,
        "bars": [bar.as_dict() for bar in found],
        "groups": session.as_dict(),
        **session.records,
        "absent": session.absent(),
        "wrong": list(dict.fromkeys(session.wrong + failed)),
        "cores_used_elsewhere": session.cores_used_elsewhere,
    }


def one_file(file: Path, quick: bool, progress: bool) -> dict:
    """The content of a result of one file of benchmarks, measured in this process."""
    from benchmarks.measure import machine
    from benchmarks.peers import PEERS

    session, failed = run(file, quick, progress)
    if session is None:
        raise SystemExit("\n".join(failed) or "pytest did not get to run")
    place = machine.fingerprint({peer.package for peer in PEERS.values() if peer.package})
    return content(session, bars(session), failed, place)


def apart(files: list[Path], quick: bool, progress: bool) -> dict:
    """The content of a result, each file in a process of its own: what peers keep in memory is gone after it."""
    from benchmarks.measure import machine

    if not machine.extension_is_current():
        print("warning: C++ sources are younger than the extension: run make setup first", file=sys.stderr)
    merged: dict = {}
    for file in files:
        with tempfile.NamedTemporaryFile(suffix=".json") as written:
            command = [sys.executable, __file__, "--file", file.name, "--to", written.name]
            command += ["--quick"] * quick + ["--no-progress"] * (not progress)
            done = subprocess.run(command)
            if done.returncode != 0:
                raise SystemExit(f"{file.name} ended with status {done.returncode}")
            merged = add(merged, json.loads(Path(written.name).read_text()))
    return merged


def add(file: dict, more: dict) -> dict:
    """Two results as one: what both list is listed once, groups by their names and bars by what they are of."""
    joined = {**file, **more}
    for name in file.keys() & more.keys():
        if isinstance(file[name], list):
            listed = [*file[name], *more[name]]
            key = {"groups": "name", "bars": "what"}.get(name)
            joined[name] = list({one[key]: one for one in reversed(listed)}.values())[::-1] if key else listed
        elif name == "cores_used_elsewhere":
            joined[name] = {**file[name], **more[name]}
    return joined


def renew(file: dict, newer: dict) -> dict:
    """A result whose groups and bars are those of a later run where that has them, of the same commit and machine.

    For a long run during which something else took processor time.
    """
    for same in "commit", "machine", "quick":
        if file[same] != newer[same]:
            raise SystemExit(f"not of the same {same}: {file[same]} and {newer[same]}")
    groups = {group["name"]: group for group in newer["groups"]}
    bars = {bar["what"]: bar for bar in newer["bars"]}
    measured = {name: own for name, own in newer.items() if isinstance(own, list) and own}
    return {
        **file,
        **measured,
        "groups": [groups.get(group["name"], group) for group in file["groups"]],
        "bars": [bars.get(bar["what"], bar) for bar in file["bars"]],
        "wrong": list(dict.fromkeys(file["wrong"] + newer["wrong"])),
        "cores_used_elsewhere": {**file["cores_used_elsewhere"], **newer["cores_used_elsewhere"]},
    }


def as_text(groups: list[dict], found: list[Bar]) -> str:
    """Times, rates and ratios by group, then the bars."""
    lines = []
    for group in groups:
        lines += ["", f"{group['question']}: {group['name']}"]
        ratios = {(own["own"], own["peer"]): own["measured"] for own in group["ratios"]}
        for entry in group["entries"]:
            seconds = entry["seconds"]
            quartiles = (
                f"{format_time(seconds['first_quartile'])} to {format_time(seconds['third_quartile'])}"
            )
            factor = ratios.get(("native", entry["label"])) or ratios.get(("native fgt", entry["label"]))
            lines.append(
                f"  {entry['label']:18}{format_time(seconds['median']):>10}  {quartiles:>22} "
                f"{entry['pairs_per_second'] / 1e9:9.3g} Gpair/s  {entry['rounds']:3} rounds  "
                f"error {entry['error']:.1e}" + (f"  ours {factor:.3g} times faster" if factor else "")
            )
        lines += [f"  {label:18}absent: {reason[:90]}" for label, reason in group["missing"].items()]
    lines += ["", f"{'bar':60} {'':8} {'limit':>6} {'measured':>9}  {'quartiles':>16}  unit"]
    for bar in found:
        quartiles = f"{bar.first_quartile:.3g} to {bar.third_quartile:.3g}"
        lines.append(
            f"{bar.what:60} {'at least' if bar.at_least else 'at most':8} {bar.limit:6g} {bar.measured:9.3g}  "
            f"{quartiles:>16}  {bar.unit:5}  {'pass' if bar.passed else 'MISSED'}"
        )
    return "\n".join(lines)


def show(file: dict) -> list[Bar]:
    """Print a result; returns its bars."""
    found = [Bar(**{name: own for name, own in bar.items() if name != "passed"}) for bar in file["bars"]]
    print(as_text(file["groups"], found))
    for name, reason in file["absent"].items():
        print(f"absent: {name}: {reason}")
    return found


def warn(file: dict) -> None:
    """Say what speaks against a result."""
    if names := busy(file["cores_used_elsewhere"]):
        print(f"warning: not to be trusted, other processes ran during: {'; '.join(names)}", file=sys.stderr)
    for line in file["wrong"]:
        print(f"WRONG: {line}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the benchmarks.")
    parser.add_argument("--quick", action="store_true", help="small and short: only shows that it works")
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--name", help="of the file in benchmarks/results/ (default: the machine, or quick)")
    parser.add_argument("--to", type=Path, help="write to this file instead")
    parser.add_argument(
        "--renew", type=Path, help="put what is run in its place in this result of the same commit"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    parser.add_argument("--file", help=argparse.SUPPRESS)  # the one that a process is for
    options = parser.parse_args()
    how = options.quick, not options.no_progress
    if options.file:
        options.to.write_text(json.dumps(one_file(HERE / options.file, *how)))
        return 0

    from benchmarks.measure import ceiling, machine

    peak = ceiling.measure()
    file = apart(files_of(options.only), *how) | {"ceiling": [peak]}
    found = show(file)

    name = options.name or (
        "quick" if options.quick else "" if options.only else machine.name(file["machine"])
    )
    path = options.to or options.renew or (RESULTS / f"{name}.json" if name else None)
    if path:
        if options.renew:
            file = renew(json.loads(options.renew.read_text()), file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(file, indent=1) + "\n")
        print(f"\nwritten to {path}")
    print(f"{sum(bar.passed for bar in found)} of {len(found)} bars met")
    warn(file)
    return 1 if file["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
