"""Build of the C++ extension nwfast._C; all else is in pyproject.toml.

NWFAST_EXT = auto (the default) builds it where a C++ compiler is found and says so where none is, 0 never builds it,
1 takes a missing compiler for an error. A compiler that is there and fails is an error in any case. The environment's
CXXFLAGS come after the flags below. Build with --no-build-isolation: the extension is compiled against the torch that
is installed.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup

COMPILE = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11; Python's comes with py_limited_api
    # Contraction to fused multiply-adds, and no more of -ffast-math: infinities, NaN and the order of additions count.
    # (-ffast-math itself would, at linking, switch the whole process that loads the extension to flush-to-zero.)
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]


def missing_toolchain() -> str:
    """Why the extension cannot be compiled here; empty if it can be tried."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if os.name == "nt":
        return "it needs GCC or Clang, which this build does not look for on Windows"
    if not shutil.which(compiler):
        return f"no C++ compiler: {compiler!r} is not found (the environment variable CXX names another)"
    headers = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(headers, "Python.h")):
        return f"no Python.h in {headers} (on Debian and Ubuntu it is in the package python3-dev)"
    return ""


def extensions() -> list[Extension]:
    """The extensions to build, as NWFAST_EXT and the machine have it."""
    choice = os.environ.get("NWFAST_EXT", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"nwfast: NWFAST_EXT must be auto, 0 or 1, got {choice!r}")
    reason = "NWFAST_EXT=0" if choice == "0" else missing_toolchain()
    if reason and choice == "1":
        raise SystemExit(f"nwfast: NWFAST_EXT=1, but the C++ extension nwfast._C cannot be built: {reason}")
    if reason:
        print(f"nwfast: the C++ extension nwfast._C is SKIPPED: {reason}. Numba serves.", file=sys.stderr)
        return []
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        raise SystemExit(
            f"nwfast: torch cannot be imported where nwfast is built ({error}): install torch first, and build "
            "with --no-build-isolation; or set NWFAST_EXT=0 to go without the C++ extension"
        ) from error
    return [
        CppExtension(
            "nwfast._C",
            sources=sorted(glob("csrc/cpu/*.cpp")),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            py_limited_api=True,
            extra_compile_args=[*COMPILE, *shlex.split(os.environ.get("CXXFLAGS", ""))],
        )
    ]


def build_commands(found: list[Extension]) -> dict:
    """Give torch's build_ext where there is something to build: without, torch need not be there."""
    if not found:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension}


if __name__ == "__main__":
    found = extensions()
    setup(
        ext_modules=found,
        cmdclass=build_commands(found),
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
