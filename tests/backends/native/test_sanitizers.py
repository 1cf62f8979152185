"""The C++ sources built with AddressSanitizer and UndefinedBehaviorSanitizer, run over odd shapes: in `make test-full`.

What is compiled anew takes minutes. First the kernels for any processor, run in fewer points: all instruction sets
share one text. Then those of every instruction set that this processor has.
"""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import build, require

pytestmark = pytest.mark.full

# -fwrapv, which Python's own flags bring, would hide signed overflow.
FLAGS = "-O0 -g1 -fno-omit-frame-pointer -fno-wrapv -fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.fixture(scope="module")
def package(tmp_path_factory, missing_toolchain) -> Path:
    """With the kernels for any processor alone: half of what there is to compile."""
    require("native", missing_toolchain)
    return build(tmp_path_factory.mktemp("sanitized"), f"{FLAGS} -DNWFAST_BASELINE_ONLY", FLAGS)


@pytest.fixture(scope="module")
def full_package(tmp_path_factory, missing_toolchain) -> Path:
    require("native", missing_toolchain)
    return build(tmp_path_factory.mktemp("sanitized-full"), FLAGS, FLAGS)


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


def assert_clean(process: subprocess.CompletedProcess, instruction_set: str) -> None:
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == f"done with {instruction_set}"


def test_no_out_of_bounds_access_and_no_undefined_behaviour(package):
    assert_clean(drive(package, "fewer"), "baseline")


@pytest.mark.parametrize("capability", ["", "avx2", "baseline"])
def test_of_every_instruction_set(full_package, capability):
    best = importlib.import_module("nwfast._C").instruction_set()
    names = {"": best, "avx2": "AVX2", "baseline": "baseline"}
    if names[capability] == best and capability:
        pytest.skip(f"the best instruction set here is {best}, which is a case of its own")
    if capability == "avx2" and best == "baseline":
        pytest.skip("this processor has no AVX2")
    assert_clean(drive(full_package, NWFAST_CPU_CAPABILITY=capability), names[capability])


def test_where_tiles_are_skipped(package):
    assert_clean(drive(package, "general", NWFAST_CPU_SKIPPING="always"), "baseline")


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
