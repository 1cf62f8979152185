"""Has the package become slower? Compares a run with the committed one, by ratios to peers and not by seconds.

    python benchmarks/regression.py                 measure the dense questions now, compare with the committed file
    python benchmarks/regression.py RUN.json        compare a run that is there; --baseline FILE for another baseline

For each of our entries and each peer beside it, the time over the peer's is compared with what it was then. What
counts is the median over the peers, so that neither the machine's speed that day nor one peer's noise decides. A peer
whose version differs is left out. More than 20 percent slower fails; what fails is measured a second time before it
counts.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

MOST = 1.2
MEASURED = ("dense_forward", "training_step", "key_gradients", "small_n")


@dataclass(frozen=True)
class Change:
    """How one of our entries did against then: a factor of 2 is twice as slow in comparison with the peers."""

    group: str
    own: str
    factor: float
    peers: tuple[str, ...]

    @property
    def failed(self) -> bool:
        return self.factor > MOST


def _ratios(content: dict) -> dict[tuple[str, str], dict[str, float]]:
    """(group, own) -> peer -> how many times faster we are."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for group in content["groups"]:
        for ratio in group["ratios"]:
            found.setdefault((group["name"], ratio["own"]), {})[ratio["peer"]] = ratio["measured"]
    return found


def _same_version(then: dict, now: dict, packages: dict[str, str]) -> set[str]:
    old, new = then["machine"]["versions"], now["machine"]["versions"]
    return {name for name, package in packages.items() if old.get(package) == new.get(package)}


def changes(then: dict, now: dict, packages: dict[str, str]) -> list[Change]:
    """All entries that both runs have, with at least one peer to compare by. packages: peer -> its package."""
    before, after = _ratios(then), _ratios(now)
    usable = _same_version(then, now, packages)
    found = []
    for key in before.keys() & after.keys():
        peers = sorted(before[key].keys() & after[key].keys() & usable)
        if peers:
            factor = statistics.median(before[key][peer] / after[key][peer] for peer in peers)
            found.append(Change(*key, factor, tuple(peers)))
    return sorted(found, key=lambda change: -change.factor)


def comparable(then: dict, now: dict) -> str:
    """Empty if the runs can be compared, else the reason: ratios to peers differ between processors."""
    for field in ("processor", "cores", "instruction_set"):
        if then["machine"][field] != now["machine"][field]:
            return f"{field} was {then['machine'][field]}, is {now['machine'][field]}"
    if then["points"] != now["points"]:
        return f"N was {then['points']}, is {now['points']}"
    return ""


def packages_of_peers() -> dict[str, str]:
    """Peer -> the package whose version decides whether it is the same peer."""
    from benchmarks.peers import PEERS

    return {name: peer.package or name for name, peer in PEERS.items()}


def committed(name: str) -> dict:
    """The result file of HEAD."""
    shown = subprocess.run(
        ["git", "show", f"HEAD:benchmarks/results/{name}.json"], cwd=ROOT, capture_output=True, text=True
    )
    if shown.returncode != 0:
        raise SystemExit(
            f"no committed results of this machine to compare with: benchmarks/results/{name}.json"
        )
    return json.loads(shown.stdout)


def measured(questions: Iterable[str]) -> dict:
    """A run of some questions."""
    from benchmarks import run

    content = run.apart([HERE / f"test_{question}.py" for question in questions], quick=False, progress=True)
    run.show(content)
    run.warn(content)
    if content["wrong"]:
        raise SystemExit("no comparison of wrong results")
    return content


def as_text(found: list[Change]) -> str:
    """One line an entry, slowest first."""
    return "\n".join(
        f"{'SLOWER' if change.failed else 'ok':7}{change.factor:6.2f} times the time, {change.own}: {change.group} "
        f"(by {', '.join(change.peers)})"
        for change in found
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a run with the committed one by ratios to peers.")
    parser.add_argument("run", type=Path, nargs="?", help="a result file (default: measure now)")
    parser.add_argument("--baseline", type=Path, help="a result file (default: this machine's, as committed)")
    options = parser.parse_args()
    from benchmarks.measure import machine

    name = machine.name(machine.fingerprint())
    then = json.loads(options.baseline.read_text()) if options.baseline else committed(name)
    if "groups" not in then:
        raise SystemExit(
            "the baseline has no groups: it is of an older layout, run make bench and commit its file"
        )
    now = json.loads(options.run.read_text()) if options.run else measured(MEASURED)
    if reason := comparable(then, now):
        raise SystemExit(f"these runs cannot be compared: {reason}")
    packages = packages_of_peers()
    found = changes(then, now, packages)
    if not found:
        raise SystemExit("these runs have no entry and no peer of the same version in common")
    print(as_text(found))
    failed = [change for change in found if change.failed]
    if failed and not options.run:
        print(f"\n{len(failed)} slower: measured once more\n")
        slow = {change.group for change in failed}
        again = changes(then, measured(_files(slow, now)), packages)
        failed = [change for change in again if change.failed and change.group in slow]
        print(as_text([change for change in again if change.group in slow]))
    for change in failed:
        print(f"slower by more than {MOST - 1:.0%}: {change.own}, {change.group}", file=sys.stderr)
    return 1 if failed else 0


def _files(groups: set[str], content: dict) -> list[str]:
    """The files that measure these groups."""
    titles = {"dense forward": "dense_forward", "training step": "training_step"}
    titles |= {"key-side gradients": "key_gradients", "small n": "small_n"}
    return sorted({titles[group["question"]] for group in content["groups"] if group["name"] in groups})


if __name__ == "__main__":
    sys.exit(main())
