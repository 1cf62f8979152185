"""Build csrc/cuda for the CPU, with the GPU emulated: a library that registers nwfast::cuda_forward and cuda_backward.

    python build.py library.so [--sanitize] [--replace dense/forward.cu old new]

The sources are compiled as they are; --replace plants an error in one of them, for tests that it is found.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[3] / "csrc"

FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-O1",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    '-DNWFAST_EMULATED="gpu.h"',
]
SANITIZE = ["-g1", "-fsanitize=address", "-fno-omit-frame-pointer"]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def build(
    library: Path, objects: Path, sanitize: bool = False, replace: tuple[str, str, str] | None = None
) -> None:
    """Compile what is not in the folder `objects` yet, two files at a time, and link.

    replace = (path in csrc/cuda, old, new) plants an error in a copy of the sources; what it makes stays out of
    `objects`.
    register.cu runs no kernel itself, and takes longest with a sanitizer: it goes without.
    """
    root = Path(torch.__file__).parent
    includes = [HERE, root / "include", sysconfig.get_path("include")]
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]
    sources = SOURCES
    changed: list[Path] = []
    with tempfile.TemporaryDirectory() as name:
        if replace:
            file, old, new = replace
            sources = Path(name) / "csrc"
            shutil.copytree(SOURCES, sources)
            path = sources / "cuda" / file
            text = path.read_text()
            if text.count(old) != 1:
                raise SystemExit(f"{file} has {old!r} {text.count(old)} times, expected once")
            path.write_text(text.replace(old, new))
            changed = [path]
            if path.suffix == ".cuh":
                changed += [p for p in (sources / "cuda").rglob("*.cu") if path.name in p.read_text()]

        def compile_one(source: Path) -> Path:
            options = SANITIZE if sanitize and source.stem != "register" else []
            folder = Path(name) if source in changed else objects
            place = source.relative_to(sources) if source.is_relative_to(sources) else Path(source.name)
            stem = "-".join(place.with_suffix("").parts)
            target = folder / f"{stem}{'.sanitized' if options else ''}.o"
            if not target.exists():
                command = [*compiler(), *flags, *options, "-x", "c++", "-c", str(source), "-o", str(target)]
                subprocess.run(command, check=True)
            return target

        with ThreadPoolExecutor(2) as pool:
            files = [HERE / "gpu.cpp", HERE / "workspace.cpp", *sorted((sources / "cuda").rglob("*.cu"))]
            made = list(pool.map(compile_one, files))
        libraries = root / "lib"
        link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
        link += SANITIZE if sanitize else []
        subprocess.run([*compiler(), "-shared", *map(str, made), "-o", str(library), *link], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", type=Path)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--replace", nargs=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as objects:
        build(options.library, Path(objects), options.sanitize, options.replace and tuple(options.replace))


if __name__ == "__main__":
    sys.exit(main())
