"""`import nwfast` in fresh processes: what it loads, what it can do without, what it costs."""

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import fresh
import pytest

import nwfast

OPTIONAL = ("numba", "triton", "sklearn", "matplotlib", "pandas", "tqdm")
IMPORT = "import nwfast, nwfast.nn, nwfast.cli"


def run(code: str, blocked: tuple[str, ...] = ()) -> dict:
    """What `code` leaves in `report`, run in a fresh process in which the `blocked` packages seem not installed."""
    # None in sys.modules is what both `import` and importlib.util.find_spec take for "not there".
    block = f"import json, sys\nfor name in {blocked!r}: sys.modules[name] = None\nreport = {{}}\n"
    process = fresh.run(f"{block}{code}\nprint(json.dumps(report))")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def added_packages(statement: str) -> set[str]:
    """The top-level packages that `statement` loads on top of `import torch`."""
    code = f"""
import torch
before = {{name.partition(".")[0] for name in sys.modules}}
{statement}
report["added"] = sorted({{name.partition(".")[0] for name in sys.modules}} - before)
"""
    return set(run(code)["added"])


def test_import_loads_no_optional_package():
    added = added_packages(IMPORT)
    assert "nwfast" in added
    assert not added & set(OPTIONAL)


def test_the_check_sees_an_optional_package():
    assert "numba" in added_packages(f"{IMPORT}; import numba")


@pytest.mark.parametrize("blocked", [OPTIONAL, ("numba",)], ids="+".join)
def test_the_op_works_without_optional_packages(blocked):
    report = run(
        f"""
{IMPORT}
import torch
x = torch.tensor([0.0, 1.0, 3.0])
report["out"] = nwfast.nadaraya_watson(x, x, 2 * x, w=0.0).tolist()
report["numba"] = nwfast.backends.available()["numba"]
""",
        blocked,
    )
    assert report["out"] == pytest.approx([8 / 3] * 3)
    assert report["numba"] == ("the package numba is not installed" if "numba" in blocked else True)


def test_a_blocked_package_cannot_be_imported():
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        run("import numba", blocked=("numba",))


def test_import_costs_little_over_torch():
    # Processor time: other work on the machine does not count. Median, since the first process may compile bytecode.
    code = """
import time
start = time.process_time()
import {}
report = time.process_time() - start
"""
    alone = [sys.executable, "-c", f"{code.format('torch')}print(report)"]
    torch = float(subprocess.run(alone, capture_output=True, text=True, check=True).stdout)
    own = [run(code.format("nwfast")) for _ in range(5)]
    assert statistics.median(own) <= 0.1 * torch, f"in 5 processes {own} s, torch {torch} s"


def test_the_modules_of_the_op_import_one_way():
    """Each can be read with those further on alone: call, prepared, local_linear; schema; autograd; by_reference."""
    allowed = {
        "call": {"schema", "autograd", "by_reference"},
        "prepared": {"schema", "autograd"},
        "local_linear": {"schema", "autograd", "by_reference"},
        "schema": {"autograd", "by_reference"},
        "autograd": {"by_reference"},
        "by_reference": set(),
    }
    folder = Path(nwfast.__file__).parent / "op"
    assert {path.stem for path in folder.glob("*.py")} == {"__init__", *allowed}
    for name, others in allowed.items():
        imports = [
            node
            for node in ast.walk(ast.parse((folder / f"{name}.py").read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1
        ]
        found = {node.module or alias.name for node in imports for alias in node.names}
        assert found <= others, name
