"""What can only be measured in a fresh process: the time of an import and the peak of the resident memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_ADDED_MB = 100.0
MOST_IMPORT_MS = 50.0

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


def import_times() -> dict[str, float]:
    """Seconds that `import torch`, and `import nwfast` after it, take."""
    return _run(_IMPORT)


def peak_memory(n: int) -> dict[str, float]:
    """MB (10^6 bytes) that one forward at N = M = n adds to the memory after the imports, inputs and result included.

    Also its seconds, and the largest error in a sample of its rows, relative to the largest entry.
    """
    return _run(_MEMORY.format(n=n))


def _run(code: str) -> dict[str, float]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if process.returncode != 0:
        raise RuntimeError(f"the fresh process failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])
