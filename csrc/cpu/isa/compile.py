"""Compiles each instruction set's kernels; setup.py links what comes of it.

They include nothing of torch or Python: `make setup` runs this file while pip installs torch. It needs the standard
library alone.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Of all units; setup.py has more for those that include torch. The environment's CXXFLAGS come last.
FLAGS = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Contraction to fused multiply-adds, and no more of -ffast-math: infinities, NaN and the order of additions count.
    # (-ffast-math itself would, at linking, switch the whole process that loads the extension to flush-to-zero.)
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]


def compiler() -> str:
    """The C++ compiler's name, empty if it is not found."""
    name = shlex.split(os.environ.get("CXX") or "c++")[0]
    return name if shutil.which(name) else ""


def _command() -> list[str]:
    """Without the source: what Python's own extensions are compiled with, as torch has it, and the flags above."""
    cache = next(
        (name for name in ("ccache", "sccache") if "CXX" not in os.environ and shutil.which(name)), None
    )
    python = shlex.split(f"{sysconfig.get_config_var('CFLAGS') or ''} {os.environ.get('CFLAGS', '')}")
    own = [*FLAGS, "-std=c++20", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    name = shlex.split(os.environ.get("CXX") or "c++")
    return [*([cache] if cache else []), *name, *python, "-fPIC", *own]


def _is_new(made: Path) -> bool:
    """Whether the object is younger than all that its source included."""
    try:
        read = made.with_suffix(".d").read_text().replace("\\\n", " ").split()[1:]
        return all(Path(path).stat().st_mtime < made.stat().st_mtime for path in read)
    except OSError:
        return False


def compile_kernels() -> list[str]:
    """The objects, compiled where they are not new: in a folder for each command, so that builds do not disturb."""
    command = _command()
    folder = Path("build/kernels", hashlib.sha256(repr(command).encode()).hexdigest()[:12])
    folder.mkdir(parents=True, exist_ok=True)

    def made(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        if not _is_new(out):
            part = out.with_suffix(f".{os.getpid()}.o")
            listing = ["-MMD", "-MF", str(out.with_suffix(".d"))]
            run = [*command, *listing, "-c", source.as_posix(), "-o", str(part)]
            print(shlex.join(run), flush=True)
            subprocess.run(run, check=True)
            part.replace(out)
        return str(out)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(made, sorted(Path("csrc/cpu/isa").glob("*.cpp"))))


if __name__ == "__main__" and compiler() and os.environ.get("NWFAST_EXT") != "0":
    try:
        compile_kernels()
    except subprocess.CalledProcessError as error:
        sys.exit(f"nwfast: the kernels do not compile ({error.cmd[0]} returned {error.returncode})")
