"""The CUDA kernels' own sources, executed on the CPU by an emulated GPU (tests/backends/cuda/emulation), against the
oracle."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

EMULATION = ROOT / "tests" / "backends" / "cuda" / "emulation"

# Tests of all backends, run on this one: every feature and kind of data. What is large, or many examples of what others
# show, is left to the other backends.
TESTS = [
    "tests/op/test_functional.py",
    "tests/op/edges/test_extremes.py",
    "tests/backends/cuda/emulation/emulated_cases.py",
]
TESTS += ["tests/backends/cuda/emulation/emulated_kinds.py", "tests/op/edges/test_zero_weights.py"]
TESTS += ["tests/op/test_properties.py::test_constant_values_return_the_constant"]
TESTS += ["tests/op/test_properties.py::test_concatenating_keys_is_merging_by_lse"]
TESTS += ["tests/op/test_local_linear.py::test_few_points", "tests/op/test_local_linear.py::test_gradcheck"]
LEFT_OUT = [
    "threads",
    "memory",
    "thousands",
    "every_small_size",
    "features_and_channels",
    "test_any_bandwidth",
]
# Long to emulate: by `make test-full`.
LONG = ["test_many_features", "test_long_sums_have_two_levels", "test_tiny_weights_of_tiny_values"]
LONG += ["test_attention_weights_are_the_softmax", "test_what_the_own_key_holds"]

# Errors planted in a source, and the case of small_case.py that finds each: that the tests can find what they look for.
MUTATIONS = {
    "an index that is off by one": (
        "sorted",
        "dense/single/rows.cu",
        "stage(problem.value, value + j * problem.value.row_stride",
        "stage(problem.value, value + (j > 0 ? j - 1 : j) * problem.value.row_stride",
    ),
    "a tail that is not masked": (
        "sorted",
        "dense/single/rows.cu",
        "const int count = static_cast<int>(end - from < kSingleTile ? end - from : kSingleTile);",
        "const int count = kSingleTile;",
    ),
    "a merge that leaves out a part": (
        "sorted",
        "dense/forward.cuh",
        "for (int64_t part = 0; part < plan.parts; ++part) {",
        "for (int64_t part = 1; part < plan.parts; ++part) {",
    ),
    "a window that is too narrow": (
        "sorted",
        "dense/single/rows.cu",
        "fabs(w) * (1 + 1e-6);",
        "fabs(w) / 4;",
    ),
    "a wait that is too short": ("sorted", "dense/single/rows.cu", "wait_copies<1>();", "wait_copies<2>();"),
    "a barrier that is missing": (
        "sorted",
        "dense/single/keys.cu",
        "wait_copies<1>();\n      __syncthreads();",
        "wait_copies<1>();",
    ),
    "a tail of the tiled gradients that is not masked": (
        "tiled",
        "dense/tiled/grads.cu",
        "float log_weight = thread < count ? 0 : -INFINITY;",
        "float log_weight = 0;",
    ),
    "tiled gradients that go to the wrong key": (
        "tiled",
        "dense/tiled/grads.cu",
        "mine = first_own + own + lane % 4 * 4",
        "mine = first_own + own + lane % 4",
    ),
}
OUTSIDE = (
    "dense/single/rows.cu",
    "const int64_t row = own_row + r * kSingleThreads < m ? own_row + r * kSingleThreads : m - 1;",
    "const int64_t row = own_row + r * kSingleThreads;",
)


@pytest.fixture(scope="module")
def objects(tmp_path_factory, missing_toolchain) -> Path:
    if reason := missing_toolchain():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="module")
def library(objects) -> Path:
    return build(objects / "emulated.so", objects)


def build(library: Path, objects: Path, **options) -> Path:
    sys.path.insert(0, str(EMULATION))
    try:
        import build as builder
    finally:
        sys.path.remove(str(EMULATION))
    builder.build(library, objects, **options)
    return library


def run(*arguments: str | Path, **variables: str) -> str:
    """The output of a Python that finds this folder's modules; errors go with it."""
    path = os.pathsep.join([str(EMULATION), str(ROOT)])
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def run_cases(*pairs: tuple[Path, str], **variables: str) -> list[str]:
    """What small_case.py prints for each pair of a library and a case."""
    output = run(EMULATION / "small_case.py", *(word for pair in pairs for word in pair), **variables)
    parts = ("\n" + output).split("\n== ")[1:]
    assert [part.split("\n", 1)[0] for part in parts] == [f"{library} {case}" for library, case in pairs]
    return [part.split("\n", 1)[1] for part in parts]


@pytest.mark.parametrize("which", ["most", pytest.param("all", marks=pytest.mark.full)])
def test_the_tests_of_all_backends_pass(library, which):
    options = ["-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "--backend", "cuda", "-q", "-x"]
    options += ["-m", ""] if which == "all" else []  # those that are marked full, too
    names = [*LEFT_OUT, *(LONG if which == "most" else [])]
    output = run(*options, *TESTS, "-k", f"not ({' or '.join(names)})", NWFAST_EMULATED_LIBRARY=str(library))
    assert " passed" in output


@pytest.mark.full
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_error_is_caught(library, objects, tmp_path, mutation):
    case, *replace = MUTATIONS[mutation]
    mutant = build(tmp_path / "mutant.so", objects, replace=replace)
    right, found = run_cases((library, case), (mutant, case))
    assert right.startswith("right"), right
    assert found.startswith("wrong") or "emulated GPU:" in found, found


@pytest.fixture(scope="module")
def sanitized(objects, library) -> dict[str, str]:
    """What AddressSanitizer, which sees every access to global and shared memory, and the small cases print."""
    cases = ["sorted", "unsorted", "tiled", "few channels", "halves"]
    right = build(objects / "sanitized.so", objects, sanitize=True)
    mutant = build(objects / "outside.so", objects, sanitize=True, replace=OUTSIDE)
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    command = [*compiler, "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    # The interpreter itself leaves much memory behind.
    variables = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    pairs = [*((right, case) for case in cases), (mutant, "sorted")]
    return dict(zip([*cases, "mutant"], run_cases(*pairs, **variables), strict=True))


@pytest.mark.full
@pytest.mark.parametrize("case", ["sorted", "unsorted", "tiled", "few channels", "halves"])
def test_no_access_outside_an_array(sanitized, case):
    assert sanitized[case].startswith("right"), sanitized[case]
    assert "AddressSanitizer" not in sanitized[case]


@pytest.mark.full
def test_an_access_outside_an_array_is_caught(sanitized):
    assert "AddressSanitizer: heap-buffer-overflow" in sanitized["mutant"], sanitized["mutant"]
