"""What a compiled GPU kernel takes of a multiprocessor, read from what NVIDIA's tools print. No GPU is needed.

`backends/cuda/resources.py` and `backends/triton/resources.py` compile the kernels and know their budgets; `kernels.py`
shows both in one table.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Resource:
    """One kernel compiled for one target: 32-bit registers and bytes a thread, bytes of shared memory a block."""

    kernel: str
    target: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    register_budget: int


def from_ptxas(
    report: str, name_of: Callable[[str], str], budget_of: Callable[[str], int]
) -> Iterator[Resource]:
    """All kernels of what `ptxas -v` says: `name_of` a symbol, `budget_of` a name."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)"
    )
    for symbol, target, stores, loads, registers, rest in re.findall(pattern, report, re.DOTALL):
        kernel = name_of(symbol)
        shared = re.search(r"(\d+) bytes smem", rest)
        yield Resource(
            kernel=kernel,
            target=target,
            registers=int(registers),
            shared_bytes=int(shared[1]) if shared else 0,
            spill_bytes=int(stores) + int(loads),
            register_budget=budget_of(kernel),
        )


def from_cuobjdump(report: str, kernel: str, target: str, shared_bytes: int, budget: int) -> Resource:
    """The one kernel of what `cuobjdump --dump-resource-usage` says; shared memory given at launch is not in there."""
    sizes = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Resource(kernel, target, sizes["REG"], shared_bytes, sizes["STACK"] + sizes["LOCAL"], budget)
