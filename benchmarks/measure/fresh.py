"""What can only be measured in a fresh process: the time of an import and the peak of the resident memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_IMPORT = """
import json, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import nwfast
print(json.dumps({"torch": middle - start, "nwfast": time.perf_counter() - middle}))
"""

# The first call of the op is measured: what it loads or starts counts as much as what it allocates. VmHWM is set back
# to the present size first, since importing may have peaked above what it leaves.
_MEMORY = """
import json, time
import torch
import nwfast

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) / 1000

n = {n}
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
generator = torch.Generator().manual_seed(0)
query, key = (torch.rand(n, generator=generator) * 5 for _ in range(2))
value = 2 * torch.sin(key) + key**0.8
start = time.perf_counter()
out = nwfast.nadaraya_watson(query, key, value, 1.0)
seconds = time.perf_counter() - start
added = status("VmHWM") - before
some = torch.linspace(0, n - 1, 32).long()
scores = -((query.double()[some, None] - key.double()) ** 2) / 2
exact = torch.softmax(scores, 1) @ value.double()
error = (out[some].double() - exact).abs().max() / exact.abs().max()
print(json.dumps({{"added_MB": added, "seconds": seconds, "error": error.item()}}))
"""

# What a peer works with at its second call: the first compiles, loads and starts. Freed blocks go back to the system at
# once (MALLOC_MMAP_THRESHOLD_), so that none is there already when the peak is read.
_WORKING = """
import gc, json, sys
sys.path[:0] = {paths!r}
from benchmarks.problems import several, workloads
from benchmarks.peers import PEERS

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6

given = workloads.data({n}) if {features} == 1 else several.data({n}, {features}, several.W[{features}])
peer = PEERS[{peer!r}]
build = (lambda: peer.gradients(given, {wanted!r})) if {wanted!r} else (lambda: peer.forward(given))
call = build()
first = call()
rows, exact = workloads.some_rows(given)
error = workloads.check([workloads.np.asarray(first[0])[rows]], (exact,), {peer!r}, peer.tolerance)
del first
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
found = call()
print(json.dumps({{"added_MB": max(0.0, status("VmHWM") - before), "error": error}}))
"""


def import_times() -> dict[str, float]:
    """Seconds that `import torch`, and `import nwfast` after it, take."""
    return _run(_IMPORT)


def peak_memory(n: int) -> dict[str, float]:
    """MB (10^6 bytes) that one forward at N = M = n adds to the memory after the imports, inputs and result included.

    Also its seconds, and the largest error in a sample of its rows, relative to the largest entry.
    """
    return _run(_MEMORY.format(n=n))


def working_memory(peer: str, n: int, wanted: str = "", features: int = 1) -> dict[str, float]:
    """MB that a call of a peer adds at N = M = n: the forward pass, or forward and backward to `wanted`."""
    code = _WORKING.format(paths=[str(ROOT)], peer=peer, n=n, wanted=wanted, features=features)
    return _run(code, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")


def _run(code: str, **variables: str) -> dict[str, float]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **variables},
    )
    if process.returncode != 0:
        raise RuntimeError(f"the fresh process failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])
