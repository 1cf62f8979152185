"""What the CUDA kernels take of a GPU: registers, shared memory and spills, as ptxas reports them for each target.

No GPU is needed, nor a torch with CUDA. Kernels and budgets are those of csrc/cuda.
"""

import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_resources import Resource, from_ptxas

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_90", "sm_100")

# Registers a thread may take, by kernel: with 128 threads a block, 128 leave 16 warps to a multiprocessor, 168 leave
# 12, and 255 leave 8. The float32 sums over pairs of one feature and channel need the first; those in double are small
# or rare; a lane of the tiled backward pass holds 32 pairs, twice, beside 32 sums: work enough to hide its waits; so
# does one of the tiled forward pass over more features than are staged at once (its last template argument).
BUDGETS = {"sum_rows": 128, "sum_keys": 128, "sum_grads": 255, "sum_tiles<true>": 255}
DEFAULT_BUDGET = 168


def why_not() -> str:
    """Why nothing can be compiled here; empty if it can."""
    return "" if _nvcc() else "no nvcc is found"


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (home and shutil.which("nvcc", path=os.path.join(home, "bin")))


def sources() -> list[Path]:
    """The files that hold kernels; register.cu holds the operators, and needs torch's headers."""
    return [path for path in sorted(SOURCES.rglob("*.cu")) if path.name != "register.cu"]


def compile_kernels(source: Path, targets: tuple[str, ...] = TARGETS) -> list[Resource]:
    """Compile one file in one go to the native code of every target, and read what ptxas says of its kernels."""
    nvcc = _nvcc()
    assert nvcc, why_not()
    options = ["-std=c++17", "-O3", "-Xptxas", "-v"]
    options += [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in targets]
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "kernels.fatbin")
        process = subprocess.run(
            [nvcc, *options, "-fatbin", str(source), "-o", target], capture_output=True, text=True
        )
    if process.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{process.stderr}")
    return list(from_ptxas(process.stderr, _demangle, _budget))


def _budget(name: str) -> int:
    kernel, *arguments = re.split("<|, |>", name)
    last = f"{kernel}<{arguments[-2]}>" if arguments else kernel
    return BUDGETS.get(last, BUDGETS.get(kernel, DEFAULT_BUDGET))


def _demangle(symbol: str) -> str:
    """The kernel's name and template arguments, such as "sum_rows<2, false>"."""
    if not shutil.which("c++filt"):
        return symbol
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+)(<[^>]*>)?\(nwfast::Problem", text)
    return found[1] + re.sub(r"\([\w:]+\)", "", found[2] or "") if found else symbol


def rows(targets: tuple[str, ...] = TARGETS, files: list[Path] | None = None) -> list[Resource]:
    """Every kernel (of the files, if given) for every target, compiled two files at a time."""
    with ThreadPoolExecutor(2) as pool:
        groups = pool.map(lambda source: compile_kernels(source, targets), files or sources())
        found = [resource for group in groups for resource in group]
    return sorted(found, key=lambda row: (row.kernel, TARGETS.index(row.target)))
