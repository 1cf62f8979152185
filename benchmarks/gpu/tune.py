"""Which constants of the kernels are best on this GPU: the forward pass, and forward + backward, for each choice.

    python benchmarks/gpu/tune.py                                     the constants that are worth a look
    python benchmarks/gpu/tune.py --set kPolynomialShare=4,8,16       those of csrc/cuda: "constexpr int NAME = ..."
    python benchmarks/gpu/tune.py --list                              their names and present values

A constant of csrc/cuda is tried in a copy of the sources that is compiled for this GPU, and timed in a process of its
own; the copies compile side by side. Block sizes of the Triton kernels need no compiler and are tried in one process.
What is printed is for a person to read: nothing is written, and no choice is made.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # measure this checkout, wherever called from

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
POINTS = 131072
CONSTANT = re.compile(r"\bconstexpr (?:int|int64_t|size_t) (k\w+) = (\d+);")
# Tried unless told. What a kernel cannot do without is asserted in csrc/cuda: such a choice does not compile.
WORTH_A_LOOK = {"kPolynomialShare": [2, 4, 8, 16], "kKeys": [4, 8]}
# Rows and columns of a program's tile and its warps, for one feature and one channel.
BLOCKS = [
    (rows, columns, warps) for rows in (32, 64, 128) for columns in (32, 64, 128) for warps in (2, 4, 8)
]

# What a process of its own measures: milliseconds of the forward pass, and of forward + backward to q, k, v, w.
MEASURE = """
import torch, nwfast
from benchmarks.measure.alternate import alternate, clock_of
from benchmarks.gpu.problems import backend, problem
device = torch.device("cuda", 0)
works = [problem(device, POINTS, wanted=wanted) for wanted in ("", "qkvw")]
times = alternate({work.wanted: backend("cuda").prepare(work)[0] for work in works}, 2, clock_of(device))
print("times", *[1000 * sorted(own)[len(own) // 2] for own in times.values()])
"""


def constants() -> dict[str, tuple[Path, int]]:
    """Each integer constant of csrc/cuda: its file and its value."""
    found = {}
    for path in sorted([*SOURCES.rglob("*.cuh"), *SOURCES.rglob("*.h"), *SOURCES.rglob("*.cu")]):
        for name, value in CONSTANT.findall(path.read_text()):
            found[name] = path, int(value)
    return found


def replaced(text: str, name: str, value: int) -> str:
    """The source with another value of a constant.

    >>> replaced("constexpr int kTile = 128;", "kTile", 64)
    'constexpr int kTile = 64;'
    """
    changed, count = re.subn(rf"(\bconstexpr \w+ {name} = )\d+;", rf"\g<1>{value};", text)
    if count != 1:
        raise ValueError(f"expected one definition of {name}, found {count}")
    return changed


def build(name: str, value: int, folder: Path) -> str:
    """Compile a copy of the checkout with one constant changed; what went wrong, or an empty string."""
    for part in ("nwfast", "csrc", "benchmarks"):
        shutil.copytree(
            ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results")
        )
    for part in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / part, folder / part)
    path = folder / constants()[name][0].relative_to(ROOT)
    path.write_text(replaced(path.read_text(), name, value))
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "NWFAST_EXT": "1"}
    )
    return done.stderr[-500:] if done.returncode else ""


def measure(folder: Path) -> str:
    """Rates of the package in `folder`, in a process of its own."""
    code = MEASURE.replace("POINTS", str(POINTS))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment
    )
    found = re.search(r"times (\S+) (\S+)", done.stdout)
    if not found:
        return f"failed: {(done.stderr.strip().splitlines() or ['no output'])[-1][:150]}"
    rates = [POINTS**2 / (float(ms) / 1000) / 1e12 for ms in found.groups()]
    return f"{rates[0]:8.3f} {rates[1]:8.3f}"


def tune_cuda(choices: dict[str, list[int]]) -> None:
    """Build every choice side by side, then time one after the other."""
    here = constants()
    jobs = [(name, value) for name, values in choices.items() for value in values]
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / f"{name}-{value}" for name, value in jobs]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
            errors = list(pool.map(lambda job, own: build(*job, own), jobs, folders))
        print(f"{'cuda, Tpair/s':40} {'forward':>8} {'all':>8}")
        for (name, value), own, error in zip(jobs, folders, errors, strict=True):
            present = " (present)" if here[name][1] == value else ""
            result = f"failed: {error.strip().splitlines()[-1][:150]}" if error else measure(own)
            print(f"{f'{name} = {value}{present}':40} {result}", flush=True)


def tune_triton() -> None:
    """Block sizes of the kernels for one feature and one channel."""
    import torch

    from benchmarks.gpu.problems import backend, problem
    from benchmarks.measure.alternate import alternate, clock_of
    from nwfast.backends.triton import call, launch

    device = torch.device("cuda", 0)
    works = [problem(device, POINTS, wanted=wanted) for wanted in ("", "qkvw")]
    present = call.single_blocks
    print(f"{'triton, rows x columns, warps; Tpair/s':40} {'forward':>8} {'all':>8}")
    for blocks in [None, *BLOCKS]:
        chosen = launch.Blocks(*blocks) if blocks else None
        call.single_blocks = lambda *sizes, chosen=chosen: chosen or present(*sizes)
        name = "{} x {}, {}".format(*blocks) if blocks else "present"
        try:
            calls = {work.wanted: backend("triton").prepare(work)[0] for work in works}
            times = alternate(calls, 1, clock_of(device))
            rates = [POINTS**2 / sorted(own)[len(own) // 2] / 1e12 for own in times.values()]
            print(f"{name:40} {rates[0]:8.3f} {rates[1]:8.3f}", flush=True)
        except Exception as error:  # a choice that does not compile, or needs more than there is
            print(f"{name:40} failed: {str(error).strip().splitlines()[-1][:120]}", flush=True)
    call.single_blocks = present


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the kernels with other constants.")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=V,V", help="constants of csrc/cuda"
    )
    parser.add_argument("--triton", action="store_true", help="block sizes of the Triton kernels")
    parser.add_argument("--list", action="store_true", help="the constants of csrc/cuda and their values")
    options = parser.parse_args()
    here = constants()
    if options.list:
        for name, (path, value) in here.items():
            print(f"{name} = {value}  ({path.relative_to(ROOT)})")
        return 0
    choices: dict[str, list[int]] = {}
    for text in options.set:
        name, _, values = text.partition("=")
        if name not in here or not re.fullmatch(r"\d+(,\d+)*", values):
            parser.error(f"--set wants NAME=V,V,... with one of {', '.join(here)}, got {text!r}")
        choices[name] = [int(value) for value in values.split(",")]
    if not choices and not options.triton:
        choices = WORTH_A_LOOK
    if choices:
        tune_cuda(choices)
    if options.triton:
        tune_triton()
    return 0


if __name__ == "__main__":
    sys.exit(main())
