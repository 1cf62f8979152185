"""The chapter's own size on a GPU, n = 50: launches and the host's overhead are all there is to time.

What is computed is what the CPU's benchmarks compute: the op against the two lines, here called from Python and
replayed from a CUDA graph.
"""

import torch

from benchmarks.measure.alternate import graphed
from benchmarks.peers import own, textbook
from benchmarks.problems import workloads
from benchmarks.problems.workloads import Call

LINES = "two lines"
N = 50


def calls(kind: str, names: list[str], device: torch.device) -> dict[str, Call]:
    """A call for each of `names`, backends or LINES, and for each of them replayed where the device has graphs."""
    exact = _build(kind, LINES, torch.device("cpu"), torch.float64)()
    found: dict[str, Call] = {}
    for name in names:
        call = _build(kind, name, device, torch.float32)
        workloads.check(call(), exact, f"{kind}, n = {N}, {name}")
        found[name] = call
        if device.type == "cuda":
            # A fresh one: what the warm-up of a capture leaves behind is not to be seen by the eager call.
            replay = graphed(_build(kind, name, device, torch.float32))
            workloads.check(replay(), exact, f"{kind}, n = {N}, {name}, graph")
            found[f"{name}, graph"] = replay
    return found


def _build(kind: str, name: str, device: torch.device, dtype: torch.dtype) -> Call:
    chapter = tuple(tensor.to(device, dtype) for tensor in workloads.chapter(N))
    return textbook.small_call(kind, chapter) if name == LINES else own.small_call(name, kind, chapter)
