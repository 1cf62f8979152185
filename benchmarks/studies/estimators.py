"""What people with data wait for: bandwidths, fits, and a figure from the command line, beside their peers.

    python benchmarks/studies/estimators.py [--quick] [--out FILE]

Times are medians of three calls with everything in them, after one call on few observations that imports what is to be
imported; of the command line a fresh process. A peer's row stands beside ours on the same data in the same process.
Beside each time how good the result is: a selection's loss over the least of a fine grid, a fit's difference.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # measure this checkout, wherever called from

import numpy as np
import torch

import nwfast
from benchmarks.measure import machine
from benchmarks.peers.peer import missing
from nwfast.datasets import why_no_flights

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Measure, print, write a JSON file; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a hundredth of the observations, no peers")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    million = 10_000 if options.quick else 1_000_000
    nwfast.NadarayaWatsonRegressor().fit(*data(100, 1)).predict(data(100, 1)[0])
    rows = [
        *selection_of_many(million, 1),
        *selection_of_many(million, 2),
        *small_selection(300 if options.quick else 2000, options.quick),
        *statsmodels_fits(options.quick),
        *command_line(),
    ]
    for row in rows:
        print(f"{row['work']:<58} {row['who']:<22} {row['seconds']:9.4f} s   {row['quality']}")
    if options.out:
        content = {**machine.fingerprint(), **machine.commit(), "rows": rows}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(row["right"] for row in rows) else 1


def data(n: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy observations of sin(20 x_1) x_D, float64."""
    random = np.random.default_rng(0)
    x = random.random((n, features))
    return x, np.sin(20 * x[:, 0]) * (x[:, -1] if features > 1 else 1) + 0.3 * random.standard_normal(n)


def timed(call: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """The median of the seconds, and what came out."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[times // 2], found


def row(work: str, who: str, seconds: float, quality: str, right: bool = True) -> dict:
    """One line of the table."""
    return {"work": work, "who": who, "seconds": seconds, "quality": quality, "right": bool(right)}


def loss(x: np.ndarray, y: np.ndarray, bandwidth: np.ndarray) -> float:
    """The leave-one-out loss."""
    inputs = torch.from_numpy(x[:, 0] if x.shape[1] == 1 else x)
    w = torch.from_numpy(1 / np.asarray(bandwidth))
    return float(nwfast.leave_one_out_loss(inputs, torch.from_numpy(y), w if len(w) > 1 else w[0]))


def selection_of_many(n: int, features: int) -> list[dict]:
    """An estimator's fit with its selection, and how far it is above the least of a fine grid."""
    x, y = data(n, features)
    seconds, model = timed(lambda: nwfast.NadarayaWatsonRegressor().fit(x, y))
    factors = np.exp(np.linspace(-1, 1, 41 if features == 1 else 7))
    grid = np.stack(np.meshgrid(*[factors] * features), -1).reshape(-1, features) * model.bandwidth_
    least = min(loss(x, y, bandwidth) for bandwidth in grid)
    excess = model.loss_ / least - 1
    work = f"fit with LOO bandwidth, {features} feature{'s' * (features > 1)}, n = {n:,}"
    return [row(work, "nwfast", seconds, f"loss {excess:+.1e} of a grid's least", excess < 5e-4)]


def small_selection(n: int, quick: bool) -> list[dict]:
    """Selectors of all peers that are here."""
    from benchmarks.problems.cases import PEERS

    x, y = data(n, 1)
    work = f"LOO bandwidth, 1 feature, n = {n:,}"
    seconds, found = timed(lambda: nwfast.select_bandwidth(x, y), 9)
    rows = [row(work, "nwfast", seconds, f"h = {found.bandwidth[0]:.5g}")]
    inputs, outputs = torch.from_numpy(x[:, 0]), torch.from_numpy(y)
    for name, peer in PEERS.items():
        if peer.select is None or peer.why_not() or quick or name.split()[0] in ("native", "numba"):
            continue
        try:
            spent, (w,) = timed(peer.select(inputs, outputs), 1)
        except Exception as error:
            rows.append(row(work, name, float("nan"), f"fails: {error}"))
            continue
        off = loss(x, y, np.array([1 / w])) / found.loss - 1
        rows.append(
            row(work, name, spent, f"h = {1 / w:.5g}, loss {off:+.1e}, {spent / seconds:.0f} times ours")
        )
    return rows


def statsmodels_fits(quick: bool) -> list[dict]:
    """Fit and prediction at a bandwidth that is given, of both degrees, against statsmodels."""
    if missing("statsmodels") or quick:
        return []
    from statsmodels.nonparametric.kernel_regression import KernelReg

    x, y = data(2000, 1)
    query, rows = np.linspace(0, 1, 500)[:, None], []
    for kind, estimator in (("lc", nwfast.NadarayaWatsonRegressor), ("ll", nwfast.LocalLinearRegressor)):
        seconds, ours = timed(lambda estimator=estimator: estimator(bandwidth=0.02).fit(x, y).predict(query))
        theirs, (fit, _) = timed(
            lambda kind=kind: KernelReg(y, x, "c", reg_type=kind, bw=[0.02]).fit(query), 1
        )
        off = np.abs(fit - ours).max()
        work = f"fit and predict, degree {int(kind == 'll')}, n = 2,000, 500 new"
        rows.append(row(work, "nwfast", seconds, ""))
        rows.append(row(work, "statsmodels", theirs, f"differs by {off:.1e}", off < 1e-6))
    return rows


def command_line() -> list[dict]:
    """The flights, from a CSV to a model and a figure with its band, in a fresh process."""
    if why_no_flights() or missing("pandas", "matplotlib"):
        return []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "nwfast"]
        subprocess.run([*run, "data", "flights", "-o", f"{folder}/flights.csv"], check=True, cwd=ROOT)
        for degree in (0, 1):
            given = ["--x", "hour", "--y", "delay", "--degree", str(degree), "-o", f"{folder}/model"]
            command = [*run, "fit", f"{folder}/flights.csv", *given, "--plot", f"{folder}/fit.png", "--quiet"]
            seconds, _ = timed(lambda command=command: subprocess.run(command, check=True, cwd=ROOT))
            work = f"flights from the command line, degree {degree}: fit, select, band, plot"
            rows.append(row(work, "nwfast", seconds, "327,346 rows"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
