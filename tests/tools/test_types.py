"""The types of the package, and of a user's file with all public functions as `mypy --strict` checks it."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ROOT

import nwfast

PACKAGE = Path(nwfast.__file__).resolve().parent
CACHE = ROOT / ".mypy_cache"

RIGHT = """
import torch
from torch import Tensor

import nwfast

x, y = torch.rand(5), torch.rand(5)
out: Tensor = nwfast.nadaraya_watson(x, x, y, 2.0)
pair: tuple[Tensor, Tensor] = nwfast.nadaraya_watson(x, x, y, w=x[:1], key_weight=y, return_lse=True)
fit: Tensor = nwfast.local_linear(x, x, y, 2.0, exclude_self=True)
lines: tuple[Tensor, Tensor] = nwfast.local_linear(x, x, y, 2.0, return_slope=True)
weights: Tensor = nwfast.attention_weights(x, x, 2.0)
loss: Tensor = nwfast.leave_one_out_loss(x, y, 2.0, degree=1, reduction="sum")
index = nwfast.KeyIndex(x, y, method="dense")
predicted: Tensor = index(x, 2.0)
both: tuple[Tensor, Tensor] = index(x, 2.0, return_lse=True)
net = nwfast.NWKernelRegression(w=1.0, log_bandwidth=True)
learnt: Tensor = net.w
last: Tensor = net.attention_weights
own: Tensor = net.leave_one_out_loss(x, y)
found: dict[str, bool | str] = nwfast.backends.available()
"""

# Each line is an error: what is passed, or what comes back, is something else.
WRONG = """
import torch
import nwfast

x = torch.rand(5)
a = nwfast.nadaraya_watson(x, x, x, bandwidth=0.3)
b = nwfast.local_linear(x, x, x, h=0.3)
c = nwfast.attention_weights(x, x, sigma=0.3)
d = nwfast.leave_one_out_loss(x, x, bandwidth=0.3)
e: int = nwfast.nadaraya_watson(x, x, x)
f = nwfast.KeyIndex(x, x)(x, bandwidth=0.3)
"""

# What --strict adds to the settings of pyproject.toml, for the user's files alone: of torch, which takes half a minute,
# what was found for the package then holds.
STRICT = (
    "# mypy: disallow-any-generics, disallow-subclassing-any, disallow-untyped-calls, disallow-untyped-defs,"
    " disallow-incomplete-defs, disallow-untyped-decorators, warn-return-any, no-implicit-reexport,"
    " strict-equality, extra-checks"
)


def mypy(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Mypy, called in a folder with the settings of pyproject.toml."""
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def package() -> subprocess.CompletedProcess:
    """Mypy on the package, as `make lint` calls it."""
    return mypy(ROOT, "--cache-dir", CACHE)


def test_the_package_has_no_error(package):
    assert package.returncode == 0, package.stdout + package.stderr


@pytest.fixture(scope="module")
def check(tmp_path_factory, package):
    folder = tmp_path_factory.mktemp("types")
    venv.create(folder / "env", with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "env")}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    shutil.copytree(PACKAGE, site / "nwfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    shutil.copytree(CACHE, folder / "cache")

    def run(**texts: str) -> list[str]:
        for name, text in texts.items():
            (folder / f"{name}.py").write_text(STRICT + text)
        options = ["--python-executable", folder / "env" / "bin" / "python", "--no-error-summary"]
        done = mypy(folder, *options, "--cache-dir", folder / "cache", *(f"{name}.py" for name in texts))
        assert done.stderr == ""
        return [line for line in done.stdout.splitlines() if ": error: " in line]

    return run


def test_a_users_file_passes_strictly_and_mistakes_do_not(check):
    errors = check(right=RIGHT, wrong=WRONG)
    assert [line for line in errors if not line.startswith("wrong.py:")] == []
    found = {int(line.split(":")[1]) for line in errors}
    wrong = {
        i for i, line in enumerate(WRONG.splitlines(), 1) if line[1:2] in (" ", ":") and "nwfast." in line
    }
    assert found == wrong
    assert len(wrong) == 6
