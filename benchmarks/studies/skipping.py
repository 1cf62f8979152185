"""What skipping pairs that cannot matter saves the dense kernels with several features, and what it costs.

    python benchmarks/studies/skipping.py [--points 65536] [--share 0.01]

Clustered points in D features, at the w at which the given share of all pairs matters (their weight is more than
2^-27 / N of its row's total); uniform ones with a bandwidth so wide that all matter. Times are those of the processor
with one thread, in seconds, with skipping and without (NWFAST_CPU_SKIPPING=never), the better of alternating runs. The
exit status is 1 if the bar is missed: five times faster with five clustered features, forward and with gradients, and
nowhere more than 5 percent slower where nothing can be skipped.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # measure this checkout, wherever called from

import torch

import nwfast

FASTER, SLOWER = 5.0, 1.05
SHARE = 0.01
FIVE = {"features": 5, "clusters": 5, "gradients": False}
CASES = [
    {"features": features, "clusters": clusters, "gradients": gradients}
    for features, clusters in ((2, 5), (3, 5), (5, 5), (5, 20), (17, 20), (2, 0), (5, 0))
    for gradients in (False, True)
]


def points(case: dict, n: int) -> torch.Tensor:
    """Of Gaussian clusters of width 0.1 in the unit cube, in no order; uniform ones without clusters."""
    generator = torch.Generator().manual_seed(case["features"])
    d, clusters = case["features"], case["clusters"]
    if clusters == 0:
        return torch.rand(n, d, generator=generator)
    centres = torch.rand(clusters, d, generator=generator)
    chosen = torch.randint(clusters, (n,), generator=generator)
    return centres[chosen] + 0.1 * torch.randn(n, d, generator=generator)


def share_that_matters(query: torch.Tensor, key: torch.Tensor, w: float) -> float:
    """Of the pairs of some queries with all keys."""
    some = query[:: max(1, len(query) // 128)]
    score = -(torch.cdist(some.double(), key.double()) * w).square() / 2
    return float((torch.softmax(score, 1) > 2.0**-27 / len(key)).double().mean())


def inverse_bandwidth(query: torch.Tensor, key: torch.Tensor, share: float) -> float:
    """The w at which so many pairs matter, by bisection."""
    low, high = 1e-2, 1e4
    for _ in range(20):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if share_that_matters(query, key, middle) > share else (low, middle)
    return (low * high) ** 0.5


def seconds(case: dict, n: int, w: float) -> float:
    """Of one call on the processor."""
    both = points(case, 2 * n)
    query, key = both[:n].clone(), both[n:].clone()
    leaves = [query, key, torch.sin(key.sum(1, keepdim=True)), torch.tensor(w)]
    for leaf in leaves:
        leaf.requires_grad_(case["gradients"])
    start = time.process_time()
    out = nwfast.nadaraya_watson(*leaves, backend="native", method="dense")
    if case["gradients"]:
        out.sum().backward()
    return time.process_time() - start


def in_process(case: dict, n: int, w: float, skipping: str) -> float:
    """The same in a process of its own, which reads how to skip from its environment."""
    arguments = [
        sys.executable,
        __file__,
        "--points",
        str(n),
        "--measure",
        json.dumps({"case": case, "w": w}),
    ]
    reply = subprocess.run(
        arguments,
        env=os.environ | {"NWFAST_CPU_SKIPPING": skipping},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return float(reply.stdout)


def compare(case: dict, n: int, runs: int, share: float = SHARE) -> dict:
    """The case with its w, and the better of alternating runs without skipping and with it."""
    both = points(case, 2 * n)
    w = inverse_bandwidth(both[:n], both[n:], share) if case["clusters"] else 1.0
    times: dict[str, float] = {}
    for _ in range(runs):
        for skipping in ("never", "auto"):
            taken = in_process(case, n, w, skipping)
            times[skipping] = min(taken, times.get(skipping, taken))
    return {**case, "n": n, "w": w, **times, "ratio": times["never"] / times["auto"]}


def main() -> int:
    """Print a line a case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=65536, help="queries, and keys")
    parser.add_argument("--share", type=float, default=SHARE, help="of the pairs that matter")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        job = json.loads(options.measure)
        torch.set_num_threads(1)  # another would wait for work at the same expense
        seconds(job["case"], 4096, job["w"])  # reads the code
        print(seconds(job["case"], options.points, job["w"]))
        return 0
    missed = False
    for case in CASES:
        found = compare(case, options.points, options.runs, options.share)
        least = 1 / SLOWER if case["clusters"] == 0 else FASTER if case["features"] == 5 else 1
        missed |= found["ratio"] < least
        print(
            f"D = {case['features']}, {case['clusters'] or 'no'} clusters, w = {found['w']:.4g}, "
            f"{'with all gradients' if case['gradients'] else 'forward'}: {found['never']:.3f} s without skipping, "
            f"{found['auto']:.3f} s with it, {found['ratio']:.2f} times faster (bar {least:.2f})",
            flush=True,
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
