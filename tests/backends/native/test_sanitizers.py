"""The C++ sources built with AddressSanitizer and UndefinedBehaviorSanitizer, run over odd shapes."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, require

# -fwrapv, which Python's own flags bring, would hide signed overflow.
FLAGS = "-O0 -g1 -fno-omit-frame-pointer -fno-wrapv -fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.fixture(scope="module")
def package(tmp_path_factory, missing_toolchain) -> Path:
    """A folder that holds the package with a sanitized extension."""
    require("native", missing_toolchain)
    folder = tmp_path_factory.mktemp("sanitized")
    process = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-temp", folder / "temp", "--build-lib", folder / "lib"],
        cwd=ROOT,
        env={**os.environ, "NWFAST_EXT": "1", "CXXFLAGS": FLAGS, "LDFLAGS": FLAGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    return folder / "lib"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def drive(package: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run sanitizer_driver.py on the sanitized package."""
    asked = subprocess.run(
        [*compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    return subprocess.run(
        [sys.executable, Path(__file__).with_name("sanitizer_driver.py"), *arguments],
        cwd=package,
        env={
            **os.environ,
            "PYTHONPATH": str(package),
            "LD_PRELOAD": asked.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter itself leaves much behind
            "UBSAN_OPTIONS": "print_stacktrace=1",
            **variables,
        },
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("capability", ["", "avx2", "baseline"])
def test_no_out_of_bounds_access_and_no_undefined_behaviour(package, capability):
    if not capability and importlib.import_module("nwfast._C").instruction_set() == "AVX2":
        pytest.skip("the best instruction set here is AVX2, which is a case of its own")
    process = drive(package, NWFAST_CPU_CAPABILITY=capability)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "done"


def test_an_out_of_bounds_read_is_caught(package):
    process = drive(package, "read_out_of_bounds")
    assert process.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in process.stderr
    assert "/csrc/cpu/" in process.stderr  # in the kernels, not in what calls them


def test_undefined_behaviour_is_caught(package, tmp_path):
    # The same flags on a program that overflows; the kernels hold the check that catches it.
    program = "volatile int largest = 0x7fffffff; int main() { largest = largest + 1; }"
    (tmp_path / "overflow.cpp").write_text(program)
    subprocess.run([*compiler(), *FLAGS.split(), "overflow.cpp", "-o", "overflow"], cwd=tmp_path, check=True)
    process = subprocess.run([tmp_path / "overflow"], capture_output=True, text=True)
    assert process.returncode != 0
    assert "runtime error: signed integer overflow" in process.stderr
    (extension,) = package.glob("nwfast/_C*.so")
    assert b"__ubsan_handle_add_overflow_abort" in extension.read_bytes()
