"""One hundred million queries against one hundred million keys: does linear time fit one machine?

    python benchmarks/studies/large.py [--n 100000000] [--w 3] [--out FILE]

Times one forward call by the linear-time method and reads the peak of the resident memory, then checks a sample of the
results against sums over all keys in float64. Inputs are a stratified sample of (0, 5), float32, ascending.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # measure this checkout, wherever called from

import torch
from torch import Tensor
from tqdm import tqdm

import nwfast
from benchmarks.measure import machine

CHUNK = 1 << 22
CHECKED = 24  # queries
TOLERANCE = 2e-6  # of the largest value


def main() -> int:
    """Measure, print, write a JSON file; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=100_000_000, help="queries, and keys")
    parser.add_argument("--w", type=float, default=3.0, help="inverse bandwidth")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls; the median counts")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tqdm(total=5 + options.repeats, unit="step", file=sys.stderr) as bar:
        result = measure(options.n, options.w, options.repeats, bar)
    print(
        f"N = M = {options.n}, w = {options.w:g}: {result['seconds']:.2f} s (median of {options.repeats}), peak "
        f"{result['peak_GB']:.2f} GB with {result['inputs_GB']:.2f} GB of inputs; largest error of {CHECKED} "
        f"results {result['error']:.2g} of max |v|"
    )
    if options.out:
        options.out.write_text(
            json.dumps({**machine.fingerprint(), **machine.commit(), **result}, indent=1) + "\n"
        )
    return 0 if result["error"] <= TOLERANCE else 1


def measure(n: int, w: float, repeats: int, bar: tqdm) -> dict:
    """Seconds of each call, peak memory in 10^9 bytes, and the largest error over max |v|."""
    bar.set_description("keys")
    key = stratified(n, 0)
    bar.update()
    bar.set_description("values")
    value = torch.empty_like(key)
    generator = torch.Generator().manual_seed(1)
    for part in range(0, n, CHUNK):
        x = key[part : part + CHUNK]
        noise = torch.randn(len(x), generator=generator) / 2
        value[part : part + CHUNK] = 2 * torch.sin(x) + x**0.8 + noise
    bar.update()
    bar.set_description("queries")
    query = stratified(n, 2)
    bar.update()
    nwfast.nadaraya_watson(
        query[:1000], key[:1000], value[:1000], w, method="fgt"
    )  # loads what is to be loaded
    seconds = []
    for _ in range(repeats):
        bar.set_description("regression")
        started = time.perf_counter()
        out = nwfast.nadaraya_watson(query, key, value, w, method="fgt")
        seconds.append(time.perf_counter() - started)
        bar.update()
    peak = peak_bytes()
    bar.set_description("checking")
    some = torch.linspace(0, n - 1, CHECKED, dtype=torch.float64).long()
    error = (out[some].double() - direct(query[some], key, value, w)).abs().max() / value.abs().max()
    bar.update(2)
    inputs = sum(tensor.numel() * tensor.element_size() for tensor in (query, key, value))
    return {
        "n": n,
        "w": w,
        "dtype": "float32",
        "seconds": sorted(seconds)[len(seconds) // 2],
        "all_seconds": seconds,
        "peak_GB": peak / 1e9,
        "inputs_GB": inputs / 1e9,
        "error": error.item(),
    }


def stratified(n: int, seed: int) -> Tensor:
    """One point in each of n equal parts of (0, 5), ascending, float32."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.empty(n)
    for part in range(0, n, CHUNK):
        count = min(CHUNK, n - part)
        places = torch.arange(part, part + count, dtype=torch.float64)
        points[part : part + count] = (
            places + torch.rand(count, generator=generator, dtype=torch.float64)
        ) * (5 / n)
    return points


def direct(query: Tensor, key: Tensor, value: Tensor, w: float) -> Tensor:
    """The regression at a few queries by sums over all keys, in float64; every query has a key within one bandwidth."""
    total, weighted = (
        torch.zeros(len(query), dtype=torch.float64),
        torch.zeros(len(query), dtype=torch.float64),
    )
    for part in range(0, len(key), CHUNK):
        weights = torch.exp(-(((query.double()[:, None] - key[part : part + CHUNK].double()) * w) ** 2) / 2)
        total += weights.sum(1)
        weighted += weights @ value[part : part + CHUNK].double()
    return weighted / total


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("the system does not tell the peak of the resident memory")


if __name__ == "__main__":
    sys.exit(main())
