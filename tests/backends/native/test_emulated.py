"""The kernels for AVX-512 on a processor that has AVX2 alone: their source, lane for lane, in `make test-full`.

csrc/cpu/isa/emulated_avx512.h has the instructions that it names. What the compiler chooses for all else, and how long
it takes, only a processor with AVX-512 shows.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, build, require

pytestmark = pytest.mark.full

TESTS = (
    "tests/backends/native",
    "tests/op/edges",
    "tests/op/test_functional.py",
    "tests/op/test_properties.py",
)
# Ahead of the folder that it runs in, which holds the package with the usual extension.
WITHIN = "import sys; sys.path.insert(0, sys.argv.pop(1)); "


@pytest.fixture(scope="module")
def package(tmp_path_factory, missing_toolchain) -> Path:
    require("native", missing_toolchain)
    return build(tmp_path_factory.mktemp("emulated"), "-DNWFAST_EMULATED_AVX512 -w")


def within(package: Path, code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHIN + code, package, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_suite_passes(package):
    chosen = within(package, "import nwfast._C; print(nwfast._C.instruction_set())").stdout.strip()
    if chosen == "baseline":
        pytest.skip("this processor has no AVX2")
    assert chosen == "AVX-512"
    process = within(package, "import pytest; sys.exit(pytest.main())", "-q", "--backend", "native", *TESTS)
    assert process.returncode == 0, process.stdout[-4000:]
