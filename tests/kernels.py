"""The table of the GPU kernels: registers, shared memory and spills for each target, each held against its budget.

    python tests/kernels.py          `make kernels`: exit status 1 over a budget, with a spill, or with nothing to show

The rows come from `backends/triton/resources.py` and `backends/cuda/resources.py`, which compile the kernels without a
GPU. Kernels whose compiler is missing are left out, and it is said; kernels that do not compile are an error.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the kernels of this checkout

from gpu_resources import Resource

HEADER = "kernel", "target", "registers", "shared memory", "spills", "budget", ""


def complaint(row: Resource) -> str:
    """What is wrong with a row; empty if nothing is."""
    found = []
    if row.registers > row.register_budget:
        found.append("OVER BUDGET")
    if row.spill_bytes > 0:
        found.append("SPILLS")
    return ", ".join(found)


def table(rows: Sequence[Resource]) -> str:
    """The rows in aligned columns below a header."""
    cells = [HEADER]
    for row in rows:
        numbers = row.registers, row.shared_bytes, row.spill_bytes, row.register_budget
        cells.append((row.kernel, row.target, *map(str, numbers), complaint(row)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 2 <= place <= 5 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


@dataclass(frozen=True)
class Source:
    """Kernels of one kind: a function that compiles them, and why it cannot (empty if it can)."""

    rows: Callable[[], Iterable[Resource]]
    why_not: str = ""


def report(sources: dict[str, Source]) -> int:
    """Print a table for each of `sources` and return the exit status."""
    bad, seen = 0, 0
    for name, source in sources.items():
        if source.why_not:
            print(f"{name}: left out, {source.why_not}\n")
            continue
        found = list(source.rows())
        seen += len(found)
        bad += sum(bool(complaint(row)) for row in found)
        print(f"{name}: {len(found)} kernels\n{table(found)}\n")
    if bad:
        print(f"{bad} of {seen} kernels take more than they may")
    elif not seen:
        print("no kernel could be compiled here")
    return 1 if bad or not seen else 0


def main() -> int:
    from backends.cuda import resources

    if importlib.util.find_spec("triton"):
        from backends.triton import resources as triton_resources

        triton = Source(triton_resources.rows)
    else:
        triton = Source(list, "the package triton is not installed")
    return report({"Triton": triton, "CUDA": Source(resources.rows, resources.why_not())})


if __name__ == "__main__":
    sys.exit(main())
