"""Does method="auto" take the faster method? Times both over a grid of sizes, bandwidths and kinds of data.

    python benchmarks/studies/method_cost.py [--backend native] [--features 2] [--out FILE]

A row is a case: the medians of alternating runs of "dense", "fgt" and "auto", and the time of "auto" over that of the
faster one. Dense runs that would take longer than a second are not made: there the linear method has to be taken. The
exit status is 1 if a case exceeds the bar, by more than the noise that its own quartiles show.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # measure this checkout, wherever called from

import torch
from tqdm import tqdm

import nwfast
from benchmarks.measure import machine

BAR = 1.3
MOST_PAIRS = 4e9
SIZES = (
    (300, 300),
    (1000, 1000),
    (3000, 3000),
    (10_000, 10_000),
    (40_000, 40_000),
    (100_000, 100_000),
    (10_000, 200),
    (200, 10_000),
    (1000, 300_000),
)
BANDWIDTHS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0)


def forward(queries: int, keys: int, w: float, ordered: bool = False) -> dict:
    """The plainest case."""
    return dict(queries=queries, keys=keys, w=w, ordered=ordered, dtype="float32", channels=0, gradient=False)


def cases(features: int) -> Iterator[dict]:
    """All combinations that are measured; points of several features have no order."""
    orders = (True, False) if features == 1 else (False,)
    for (queries, keys), w in itertools.product(SIZES, BANDWIDTHS):
        yield forward(queries, keys, w, orders[0])
    for w, ordered, dtype, channels, gradient in itertools.product(
        BANDWIDTHS, orders, ("float32", "float64"), (0, 4), (False, True)
    ):
        yield dict(
            queries=5000, keys=5000, w=w, ordered=ordered, dtype=dtype, channels=channels, gradient=gradient
        )


def build(case: dict, backend: str, features: int) -> dict[str, Callable[[], object]]:
    """A call for each method that can be afforded."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case["dtype"])

    def points(n: int) -> torch.Tensor:
        if features > 1:
            return torch.rand(n, features, generator=generator, dtype=torch.float64).to(dtype)
        x = torch.rand(n, generator=generator, dtype=torch.float64) * 5
        return (x.sort().values if case["ordered"] else x).to(dtype)

    query, key = points(case["queries"]), points(case["keys"])
    shape = (case["keys"], case["channels"]) if case["channels"] else (case["keys"],)
    value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    leaves = [query, key, value, torch.full((features,), case["w"], dtype=dtype)]
    for leaf in leaves:
        leaf.requires_grad_(case["gradient"])

    def call(method: str) -> Callable[[], object]:
        def run() -> object:
            out = nwfast.nadaraya_watson(*leaves, method=method, backend=backend)
            return torch.autograd.grad(out.sum(), leaves) if case["gradient"] else out

        return run

    cost = case["queries"] * case["keys"] * (features + case["channels"]) * (3 if case["gradient"] else 1)
    methods = ("dense", "fgt", "auto") if cost < MOST_PAIRS else ("fgt", "auto")
    return {method: call(method) for method in methods}


def measure(case: dict, backend: str, features: int, seconds: float) -> dict:
    """Quartiles of each method in seconds, in turns until the time is spent."""
    calls = build(case, backend, features)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {method: [] for method in calls}
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times["auto"]) < 5:
        for method, call in calls.items():
            started = time.perf_counter()
            call()
            times[method].append(time.perf_counter() - started)
    result = {method: statistics.quantiles(found, n=4) for method, found in times.items()}
    best = min((method for method in result if method != "auto"), key=lambda method: result[method][1])
    low, median, _ = result["auto"]
    return {
        **case,
        "seconds": result,
        "best": best,
        "ratio": median / result[best][1],
        "missed": low / result[best][2] > BAR,
    }


def main() -> int:
    """Measure, print the worst cases, write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="native")
    parser.add_argument("--features", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each case")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows = [
        measure(case, options.backend, options.features, options.seconds)
        for case in tqdm(list(cases(options.features)), file=sys.stderr)
    ]
    rows.sort(key=lambda row: -row["ratio"])
    print(
        "   M       N        w  order    dtype  C  grad |   dense     fgt    auto (us) | auto over the faster"
    )
    for row in rows:
        shown = [
            f"{1e6 * row['seconds'][name][1]:8.0f}" if name in row["seconds"] else "       -"
            for name in ("dense", "fgt", "auto")
        ]
        kind = f"{'sorted' if row['ordered'] else 'random'} {row['dtype']} {row['channels']:2d} {row['gradient']!s:5}"
        sizes = f"{row['queries']:7d} {row['keys']:7d} {row['w']:8g}"
        print(f"{sizes} {kind} | {' '.join(shown)} | {row['ratio']:.2f}{' MISSED' if row['missed'] else ''}")
    if options.out:
        report = {
            **machine.fingerprint(),
            **machine.commit(),
            "backend": options.backend,
            "bar": BAR,
            "cases": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any(row["missed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
