"""The Triton kernels without a GPU: run by the interpreter against the oracle, and compiled for three generations.

The interpreter needs its environment variable before torch is imported and crashes on accesses out of bounds: each
group of tests has a process of its own. The tests of all backends run there with `--backend triton`.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")

TESTS = Path(__file__).resolve().parents[2]
ROOT = TESTS.parent

ZERO_WEIGHTS = "op/edges/test_zero_weights.py::test_"
GROUPS = {
    "its own, extremes, left-out keys": [
        "backends/triton/driver.py",
        "op/edges/test_extremes.py",
        "op/test_functional.py",
        f"{ZERO_WEIGHTS}what_keys_of_weight_zero_hold[triton-False-()-1-1-torch.float32]",
        f"{ZERO_WEIGHTS}a_key_of_weight_zero_nearer_than_all_others[triton-60.0-2-torch.float32]",
        f"{ZERO_WEIGHTS}terms_of_either_sign_that_overflow[triton-2-torch.float32]",
        f"{ZERO_WEIGHTS}the_gradient_of_a_weight_of_zero_up_to_the_largest_number[triton-2-1.0-310-0.001]",
        f"{ZERO_WEIGHTS}what_the_own_key_holds[triton-key-nan-()-1-1-torch.float32]",
        f"{ZERO_WEIGHTS}rows_that_nobody_uses[triton-nan-()-2-1-torch.float32]",
        "-k",
        "driver or test_zero_weights"
        " or (far_queries or ties_share or across_a_gap and 1e+38 or weight_zero) and float32"
        " or w_of_zero and float64"
        " or no_queries or lse_alone or any_unit and (1e-34 or 1e+24 or 1e-300 or 1e+290) and not triton-1-2",
    ],
    "the rest of its own": ["backends/triton/driver.py", "-m", "full"],
    "more left-out keys": [
        f"{ZERO_WEIGHTS}terms_of_either_sign_that_overflow[triton-1-torch.float64]",
        f"{ZERO_WEIGHTS}what_the_own_key_holds[triton-value-nan-(2,)-3-4-torch.float32]",
    ],
    "more extremes": [
        "op/edges/test_extremes.py",
        "-k",
        "across_a_gap and float32 and not 1e+38 or test_offsets[triton-1]"
        " or any_unit and (1e-24 or 1e-12 or 1000000000000.0 or 1e+160 or triton-1-2)",
    ],
}


def interpret(directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run pytest in the interpreter, on the package in `directory`."""
    files = [str(TESTS / a) if ".py" in a else a for a in arguments]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "backends.triton.interpreter",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    return subprocess.run(
        [*command, "-c", str(ROOT / "pyproject.toml"), "--backend", "triton", *files],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.parametrize(  # all but the first are long to interpret
    "group", [pytest.param(name, marks=[pytest.mark.full] * (i > 0)) for i, name in enumerate(GROUPS)]
)
def test_interpreter(group):
    done = interpret(ROOT, *GROUPS[group])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


# A fault planted in a kernel's source, and the test that must find it (which passes without it, above).
FAULTS = {
    "index": (
        "triton/terms.py",
        "key += element(table, b, key_b, 1, batches, TABLE)",
        "key += element(table, b, query_b, 1, batches, TABLE)",
        "test_batch_of_shared_queries",
    ),
    "tail mask": (
        "triton/forward.py",
        "p = tl.where(j < n, p, 0.0)",
        "p = tl.where(j <= n, p, 0.0)",
        "test_batch_of_shared_queries",
    ),
    "merge": (
        "triton/merge.py",
        "total = total * factor + part_total * part_factor",
        "total = total + part_total * part_factor",
        "test_parts[tiled, keys]",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, tmp_path):
    file, right, wrong, test = FAULTS[fault]
    shutil.copytree(
        ROOT / "nwfast", tmp_path / "nwfast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    source = tmp_path / "nwfast" / "backends" / file
    text = source.read_text()
    assert right in text
    source.write_text(text.replace(right, wrong))
    done = interpret(tmp_path, f"backends/triton/driver.py::{test}")
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-2000:]
    assert "AssertionError" in done.stdout
    assert "1 failed" in done.stdout


# Every kernel in the forms that ask most of it; the whole table, for every target, is `resources.rows()`.
COMPILED = [
    ("single_forward", "", 80),
    ("single_forward", "", 90),
    ("single_forward", "", 100),
    ("single_forward", "tangents", 90),
    ("single_merge", "few queries", 90),
    ("single_keys", "", 90),
    ("single_keys", "float64, weights", 80),
    ("tiled_forward", "D=3 C=64 float16", 90),
    ("tiled_merge", "D=3 C=64 float16, few", 90),
    ("tiled_keys", "D=3 C=64 float16", 80),
    ("tiled_keys", "D=3 C=64 float16", 90),
    ("tiled_keys", "D=3 C=4", 90),
    ("query_side", "D=3 C=4", 90),
    ("query_side", "D=2 C=1 float64", 90),
    ("describe_rows", "D=3 C=4", 90),
    ("describe_rows", "", 90),
    ("tangent_products", "tangents", 90),
]


# Of those that are there for several targets, the others by `make test-full`.
AGAIN = [one for one in COMPILED if one[2] != 90 and (*one[:2], 90) in COMPILED]


@pytest.mark.parametrize(
    ("kernel", "case", "target"),
    [pytest.param(*one, marks=[pytest.mark.full] if one in AGAIN else []) for one in COMPILED],
)
def test_compiled_within_registers(kernel, case, target):
    from backends.triton import resources

    (launch,) = (
        launch for launch in resources.launches() if launch.kernel.__name__ == kernel and launch.case == case
    )
    row = resources.measure(launch, target)
    assert row.spill_bytes == 0, row
    assert 16 <= row.registers <= row.register_budget, row
    assert row.shared_bytes <= 99 * 1024, row
