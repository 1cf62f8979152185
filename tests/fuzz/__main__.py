"""Puts the whole public function against an oracle in longer precision, on inputs drawn at random: `make fuzz`.

Every failure found is made small and printed as a program; the exit status is 1 if there was one. The seed is that of
the day unless given: what it found once, `--seed` finds again (a case does not depend on those before it; `--case` runs
one alone).
"""

import argparse
import datetime
import functools
import os
import pickle
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # tests/exact.py

from cases import Case, draw  # noqa: E402
from judge import Failure, as_python, judge, shrink  # noqa: E402
from torch import Tensor  # noqa: E402

# Seconds of the processor that a case may take: Numba compiles in its first ones, Triton is interpreted. On a machine
# that does other things besides, or for a process that waits, so many times as many seconds.
PATIENCE = {"numba": 240.0, "triton": 240.0}
BUSY = 6
BACKENDS = ("native", "numba", "reference", "triton")


class Worker:
    """A process that computes cases, started anew where it crashed or hung."""

    def __init__(self, interpreted: bool):
        self._environment = {**os.environ, "PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{HERE}"}
        if interpreted:
            self._environment |= {"TRITON_INTERPRET": "1"}
        self._process: subprocess.Popen | None = None

    def compute(self, case: Case) -> dict[str, Tensor] | str:
        """The results by name, or what went wrong."""
        patience = PATIENCE.get(case.backend, 40.0)
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
            )
            patience += 120
        process = self._process
        data = pickle.dumps(case)
        try:
            process.stdin.write(struct.pack("<q", len(data)) + data)
            process.stdin.flush()
            limits = _processor_seconds(process.pid) + patience, time.monotonic() + BUSY * patience
            size = self._read(8, limits)
            return pickle.loads(self._read(struct.unpack("<q", size)[0], limits))
        except TimeoutError:
            return self._ended("does not return")
        except (BrokenPipeError, EOFError):
            return self._ended("the process died")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ended(self, what: str) -> str:
        self.close()
        return what

    def _read(self, size: int, limits: tuple[float, float]) -> bytes:
        data = b""
        while len(data) < size:
            while not select.select([self._process.stdout], [], [], 1.0)[0]:
                if _processor_seconds(self._process.pid) > limits[0] or time.monotonic() > limits[1]:
                    raise TimeoutError
            piece = os.read(self._process.stdout.fileno(), size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


def _processor_seconds(process: int) -> float:
    """What a process has used; where there is no /proc, the seconds of the clock."""
    try:
        user, system = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    except OSError:
        return time.monotonic()
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="how long; default 2")
    parser.add_argument("--seed", type=int, default=int(datetime.date.today().strftime("%Y%m%d")))
    parser.add_argument(
        "--backend", default="native,numba,reference,triton", help="names with commas between"
    )
    parser.add_argument("--method", default="auto,dense,fgt", help="names with commas between")
    parser.add_argument("--entry", default="function,index,module", help="names with commas between")
    parser.add_argument(
        "--without",
        default="",
        help="situations to leave out, with semicolons between, as 'masked broken;subnormal'",
    )
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many kinds of failures")
    parser.add_argument("--shrink", type=float, default=30.0, help="seconds to make a failing case small")
    options = parser.parse_args()
    for name in (options.backend or "").split(","):
        if name not in BACKENDS:
            parser.error(f"--backend takes {', '.join(BACKENDS)}, got {name!r}")
    return options


def main() -> int:
    options = arguments()
    backends, methods, entries = (x.split(",") for x in (options.backend, options.method, options.entry))
    if len(backends) > 1 and "triton" in backends:  # the interpreter takes its time
        backends = [name for name in backends for _ in range(1 if name == "triton" else 5)]
    without = [word for word in options.without.split(";") if word]
    workers = {False: Worker(False), True: Worker(True)}
    print(f"make fuzz: seed {options.seed}, {options.minutes:g} minutes, {options.backend}, {options.method}")
    end = time.monotonic() + 60 * options.minutes
    found: dict[tuple, tuple[Case, Failure, int]] = {}
    number, seen = options.case or 0, 0
    while time.monotonic() < end and len(found) < options.failures:
        case = draw(np.random.default_rng([options.seed, number]), backends, methods, entries)
        if any(word in case.situation for word in without):
            number += 1
            continue
        worker = workers[case.backend == "triton"]
        small = None  # one failure of each case is made small; others that come with it are mostly the same
        for failure in judge(case, worker.compute(case)):
            kind = (
                case.backend,
                case.method,
                case.query.ndim > 1 and case.query.shape[-1] > 1,
                *_kind(failure),
            )
            seen += 1
            if kind in found or small is not None:
                continue

            fails = functools.partial(_fails, worker, _kind(failure))
            again = fails(case)
            if again is None:
                print(f"case {number}: {failure}, but not when run again", flush=True)
                if "return" not in str(failure):  # that is what a busy machine does
                    found[kind] = small = case, failure, number
                continue
            found[kind] = small = (*shrink(case, again, fails, options.shrink), number)
            print(f"\n# case {number} of seed {options.seed}\n{as_python(*small[:2])}", flush=True)
        number += 1
        if options.case is not None:
            break
    for worker in workers.values():
        worker.close()
    tried = 1 if options.case is not None else number
    if not found:
        print(f"{tried} cases, no failure")
        return 0
    case, failure, place = min(found.values(), key=lambda item: item[0].key.numel() + item[0].query.numel())
    print(f"\n{tried} cases, {seen} failures of {len(found)} kinds. The smallest (case {place}):\n")
    print(as_python(case, failure))
    return 1


def _fails(worker: Worker, kind: tuple[str, str], case: Case) -> Failure | None:
    """The failure of this kind that the case shows."""
    return next((f for f in judge(case, worker.compute(case)) if _kind(f) == kind), None)


def _kind(failure: Failure) -> tuple[str, str]:
    return failure.result, failure.kind


if __name__ == "__main__":
    raise SystemExit(main())
