"""Build of the C++ extensions nwfast._C and nwfast._C_cuda; all else is in pyproject.toml.

NWFAST_EXT = auto (the default) builds them where a C++ compiler is found and says so where none is, 0 never builds
them, 1 takes a missing compiler for an error. A compiler that is there and fails is an error in any case. The
environment's CXXFLAGS come after the flags below. Build with --no-build-isolation: the extensions are compiled against
the torch that is installed. NWFAST_URL is the repository's address, for the metadata and the description's links.

nwfast._C_cuda is built where the installed torch has CUDA and nvcc is found, with a GPU or without.
TORCH_CUDA_ARCH_LIST says for which GPUs; unset, for those that are visible, or for the usual ones where none is.
"""

import os
import re
import runpy
import shlex
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

KERNELS = runpy.run_path("csrc/cpu/isa/compile.py")
# The stable ABI of torch 2.11; Python's comes with py_limited_api.
COMPILE = [*KERNELS["FLAGS"], "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# Extensions that this build leaves out, and why.
LEFT_OUT: dict[str, str] = {}
NVCC = [
    "-O3",
    "-std=c++17",
    "-DUSE_CUDA",  # declares torch's CUDA functions of the stable ABI
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-Xcompiler=-fvisibility=hidden",
]


def missing_toolchain() -> str:
    """Why the extension cannot be compiled here; empty if it can be tried."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if os.name == "nt":
        return "it needs GCC or Clang, which this build does not look for on Windows"
    if not shutil.which(compiler):
        return f"no C++ compiler: {compiler!r} is not found (Debian has one in its package g++; CXX names another)"
    headers = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(headers, "Python.h")):
        return f"no Python.h in {headers} (on Debian and Ubuntu it is in the package python3-dev)"
    return ""


def missing_cuda() -> str:
    """Why nwfast._C_cuda cannot be compiled here; empty if it can be tried."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "the installed torch is built without CUDA"
    if CUDA_HOME is None or not shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")):
        return "no nvcc is found (CUDA_HOME names the toolkit's folder)"
    return ""


def cuda_extension() -> Extension:
    """nwfast._C_cuda, for the GPUs that are asked for, or visible, or else usual."""
    import torch
    from torch.utils.cpp_extension import CUDAExtension

    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        # torch would look at the GPUs that it sees.
        version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0;10.0+PTX" if version >= (12, 8) else "8.0;9.0+PTX"
    return CUDAExtension(
        "nwfast._C_cuda",
        sources=sorted(glob("csrc/cuda/**/*.cu", recursive=True)),
        depends=sorted(
            path
            for part in ("common/*.h", "cuda/**/*.h", "cuda/**/*.cuh")
            for path in glob(f"csrc/{part}", recursive=True)
        ),
        py_limited_api=True,
        extra_compile_args={"cxx": COMPILE, "nvcc": NVCC},
    )


def units() -> list[str]:
    """What is compiled beside the kernels: all other sources of csrc/cpu, as one unit for each folder.

    Sources of a folder share most of what takes time, templates and torch's headers, which are then compiled once;
    prepared keys are of the grid's templates.
    """
    folders: dict[str, list[str]] = {}
    for path in sorted(set(glob("csrc/cpu/**/*.cpp", recursive=True)) - set(glob("csrc/cpu/isa/*.cpp"))):
        parts = path.split(os.sep)
        folder = parts[2] if len(parts) > 3 else "cpu"
        folders.setdefault("grid" if folder == "prepared" else folder, []).append("/".join(parts))
    made = []
    os.makedirs("build/units", exist_ok=True)
    for folder, paths in folders.items():
        unit = Path("build/units", f"{folder}.cpp")
        text = "".join(f'#include "../../{path}"\n' for path in paths)
        if not unit.exists() or unit.read_text() != text:  # one that stays the same is not compiled again
            unit.write_text(text)
        made.append(str(unit))
    return made


def extensions() -> list[Extension]:
    """The extensions to build, as NWFAST_EXT and the machine have it."""
    choice = os.environ.get("NWFAST_EXT", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"nwfast: NWFAST_EXT must be auto, 0 or 1, got {choice!r}")
    reason = "NWFAST_EXT=0" if choice == "0" else missing_toolchain()
    if reason and choice == "1":
        raise SystemExit(f"nwfast: NWFAST_EXT=1, but the C++ extension nwfast._C cannot be built: {reason}")
    LEFT_OUT.clear()
    if reason:
        LEFT_OUT.update(_C=reason, _C_cuda=reason)
        print(f"nwfast: the C++ extension nwfast._C is SKIPPED: {reason}. Numba serves.", file=sys.stderr)
        return []
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        raise SystemExit(
            f"nwfast: torch cannot be imported where nwfast is built ({error}). What works: "
            "pip install torch setuptools wheel ninja && pip install --no-build-isolation <what you are installing>; "
            "or NWFAST_EXT=0 in the environment to go without the C++ extension"
        ) from error
    found = [
        CppExtension(
            "nwfast._C",
            sources=units(),
            depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cpp", recursive=True)),
            py_limited_api=True,
            extra_compile_args=[*COMPILE, *shlex.split(os.environ.get("CXXFLAGS", ""))],
        )
    ]
    reason = missing_cuda()
    if not reason:
        found.append(cuda_extension())
        return found
    LEFT_OUT["_C_cuda"] = reason
    if torch.version.cuda is not None:
        print(
            f"nwfast: the C++ extension nwfast._C_cuda is SKIPPED: {reason}. Triton serves.", file=sys.stderr
        )
    return found


def write_record(package: Path) -> None:
    """Leave in the package what was left out, and which sources it is of, for `nwfast.backends.built` to read."""
    runpy.run_path("nwfast/backends/built.py")["write"](package, Path(), LEFT_OUT)


class BuildModules(build_py):
    """Copies the modules, and leaves the record beside them; in an editable installation beside the sources."""

    def run(self) -> None:
        """Run the command."""
        super().run()
        if not self.editable_mode:
            write_record(Path(self.build_lib, "nwfast"))
        elif os.environ.get("NWFAST_EXT") != "0":  # else the extension may be built on its own, in place
            write_record(Path("nwfast"))


def description(url: str) -> str:
    """The README for an index page, where links of a checkout lead nowhere: on to `url`, or without one left out."""

    def elsewhere(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if "://" in target:
            return link[0]
        if not url:
            return "" if picture else text
        return f"{picture}[{text}]({url}/{'raw' if picture else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", elsewhere, Path("README.md").read_text(encoding="utf-8"))


def urls(url: str) -> dict[str, str]:
    """What the metadata links to."""
    pages = {
        "Source": "",
        "Documentation": "/tree/main/docs",
        "Changelog": "/blob/main/CHANGELOG.md",
        "Issues": "/issues",
    }
    return {name: url + page for name, page in pages.items()} if url else {}


def build_commands(found: list[Extension]) -> dict:
    """The commands that differ; torch's build_ext where there is something to build: else torch need not be there."""
    if not found:
        return {"build_py": BuildModules}
    from torch.utils.cpp_extension import BuildExtension

    class BuildExtensions(BuildExtension):
        """Compiles the kernels first: `make setup` has done so already."""

        def build_extensions(self) -> None:
            found[0].extra_objects = KERNELS["compile_kernels"]()
            super().build_extensions()

    return {"build_py": BuildModules, "build_ext": BuildExtensions}


if __name__ == "__main__":
    found, url = extensions(), os.environ.get("NWFAST_URL", "").rstrip("/")
    setup(
        long_description=description(url),
        long_description_content_type="text/markdown",
        project_urls=urls(url),
        ext_modules=found,
        cmdclass=build_commands(found),
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
    if "--inplace" in sys.argv:
        write_record(Path("nwfast"))
