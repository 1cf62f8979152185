"""The wheels: built from a copy of the sources, audited, installed in fresh environments without a compiler.

`make test-full` alone builds the wheel with the extension and compiles Numba's kernels where one is installed. What
`make test` audits is the extension that lies in the package's folder.
"""

import email
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, require

SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "nwfast")

URL = "https://host.test/owner/nwfast"

# In an installed package: where it is, what works, whether a compiler is in reach, and the op against the formula.
PROBE = """
import json, os, shutil, torch, nwfast
query, key = torch.linspace(-1, 6, 33), torch.rand(101) * 5
value, w = torch.randn(101, requires_grad=True), torch.tensor(3.0, requires_grad=True)
out = nwfast.nadaraya_watson(query, key, value, w, backend=os.environ["BACKEND"])
[nwfast.backends.load(name) for name in ("numba", "numba_fgt")]  # all their modules are there
expected = torch.softmax(-((query[:, None] - key) * w) ** 2 / 2, dim=1) @ value
torch.testing.assert_close(out, expected)
found, wanted = (torch.autograd.grad(result.square().sum(), (w, value)) for result in (out, expected))
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
compilers = [name for name in ("c++", "g++", "clang++", "gcc", "cc") if shutil.which(name)]
print(json.dumps([nwfast.__file__, nwfast.backends.available(), compilers]))
"""


def without_compiler(directory: Path, **variables: str) -> dict[str, str]:
    """The environment with nothing on PATH (an empty folder), and no trace of the sources."""
    directory.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX")}
    return {**kept, "PATH": str(directory), **variables}


def build(directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Build a wheel in `directory`/dist from a copy of the sources."""
    copy = directory / "sources"
    copy.mkdir(parents=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, copy)
    options = [
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--verbose",
        "--wheel-dir",
        directory / "dist",
    ]
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, copy],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(files.read(name).decode())


def only_wheel(directory: Path, process: subprocess.CompletedProcess) -> Path:
    assert process.returncode == 0, process.stdout
    (wheel,) = (directory / "dist").iterdir()
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory, missing_toolchain) -> Path:
    require("native", missing_toolchain)
    directory = tmp_path_factory.mktemp("wheel")
    # The optimiser and the kernels of newer processors take most of the time, and are not what is tested here.
    flags = "-O0 -DNWFAST_BASELINE_ONLY"
    return only_wheel(directory, build(directory, {**os.environ, "NWFAST_EXT": "1", "CXXFLAGS": flags}))


def run_installed(wheel: Path, directory: Path, backend: str) -> dict[str, bool | str]:
    """Install the wheel in a fresh environment, run PROBE there; what available() says."""
    venv.create(directory / "env", with_pip=False)
    python = directory / "env" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(directory / "env")}))
    # torch, numpy and numba come from this environment: a folder named in a .pth file is searched after the own one.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    # Where PYTHONPATH names the sources, pip would take nwfast for installed.
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*install, "--no-deps", "--no-index", wheel], env=alone, check=True)
    process = subprocess.run(
        [python, "-c", PROBE],
        env=without_compiler(directory / "empty", BACKEND=backend, NUMBA_OPT="0"),  # sooner compiled
        cwd=directory,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    path, available, compilers = json.loads(process.stdout.splitlines()[-1])
    assert Path(path).is_relative_to(site)
    assert compilers == []
    return available


@pytest.mark.full
def test_the_wheel_serves_all_pythons_from_3_10(wheel):
    assert wheel.name.startswith("nwfast-")
    assert "-cp310-abi3-" in wheel.name


@pytest.fixture(params=["extension", pytest.param("wheel", marks=pytest.mark.full)])
def package(request, native, tmp_path) -> Path:
    """A folder with the extension as it lies here, or with what the wheel holds."""
    if request.param == "extension":
        (tmp_path / "nwfast").mkdir()
        shutil.copy(importlib.import_module("nwfast._C").__file__, tmp_path / "nwfast")
        return tmp_path / "nwfast"
    shutil.unpack_archive(request.getfixturevalue("wheel"), tmp_path, "zip")
    return tmp_path / "nwfast"


def test_it_keeps_to_the_stable_abi_of_python(package):
    (extension,) = package.glob("*.so")
    subprocess.run([sys.executable, "-m", "abi3audit", "--strict", "--summary", extension], check=True)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11")
def test_it_keeps_to_the_stable_abi_of_torch(package):
    audit = Path(sys.executable).with_name("torch-abi-audit")
    subprocess.run([audit, "--check", "both", package], check=True)


@pytest.mark.full
def test_the_wheel_runs_native_without_a_compiler(wheel, tmp_path):
    assert run_installed(wheel, tmp_path, "native")["native"] is True


@pytest.mark.parametrize("computes", ["reference", pytest.param("numba", marks=pytest.mark.full)])
def test_without_a_compiler_the_build_says_so_and_numba_serves(tmp_path, computes):
    process = build(tmp_path, without_compiler(tmp_path / "empty", NWFAST_URL=URL))
    wheel = only_wheel(tmp_path, process)
    metadata = metadata_of(wheel)
    assert f"Source, {URL}" in metadata.get_all("Project-URL")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert f"]({URL}/blob/main/docs/linear-time.md)" in metadata.get_payload()
    assert "the C++ extension nwfast._C is SKIPPED: no C++ compiler: 'c++' is not found" in process.stdout
    assert wheel.name.endswith("-py3-none-any.whl")
    available = run_installed(wheel, tmp_path, computes)
    assert available["numba"] is True
    reason = "nwfast._C was left out when nwfast was built: no C++ compiler: 'c++' is not found"
    assert reason in available["native"]
    assert "install nwfast again: pip install " in available["native"]


@pytest.mark.parametrize("url", ["", URL])
def test_no_link_of_an_index_page_leads_into_the_checkout(url, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = runpy.run_path("setup.py")["description"](url)
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert targets and all("://" in target for target in targets)
    within = [re.sub("#.*", "", target.split("/main/")[1]) for target in targets if target.startswith(URL)]
    assert bool(within) == bool(url)
    assert all((ROOT / path).exists() for path in within)
    assert "nwfast.nadaraya_watson(query, key, value, w)" in page


def test_ext_1_without_a_compiler_fails(tmp_path):
    process = build(tmp_path, without_compiler(tmp_path / "empty", NWFAST_EXT="1"))
    assert process.returncode != 0
    assert "NWFAST_EXT=1, but the C++ extension nwfast._C cannot be built: no C++ compiler" in process.stdout


class TestExtensions:
    """setup.py's choice, in this process."""

    @pytest.fixture
    def extensions(self, monkeypatch):
        monkeypatch.chdir(ROOT)
        monkeypatch.delenv("NWFAST_EXT", raising=False)
        return runpy.run_path("setup.py")["extensions"]

    def test_ext_0_builds_nothing(self, extensions, monkeypatch, capsys):
        monkeypatch.setenv("NWFAST_EXT", "0")
        assert extensions() == []
        assert "SKIPPED: NWFAST_EXT=0" in capsys.readouterr().err

    def test_an_unknown_choice_is_an_error(self, extensions, monkeypatch):
        monkeypatch.setenv("NWFAST_EXT", "yes")
        with pytest.raises(SystemExit, match="NWFAST_EXT must be auto, 0 or 1, got 'yes'"):
            extensions()

    def test_cxx_names_the_compiler(self, extensions, monkeypatch, capsys):
        monkeypatch.setenv("CXX", "no-such-compiler -m64")
        assert extensions() == []
        assert "'no-such-compiler' is not found" in capsys.readouterr().err

    def test_isolation_without_torch_is_an_error(self, extensions, monkeypatch, missing_toolchain):
        monkeypatch.setitem(extensions.__globals__, "missing_toolchain", lambda: "")
        monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
        with pytest.raises(SystemExit, match="--no-build-isolation"):
            extensions()

    def test_no_flag_links_flush_to_zero_into_the_process(self, extensions, monkeypatch):
        monkeypatch.setitem(extensions.__globals__, "missing_toolchain", lambda: "")
        (extension,) = extensions()
        flags = [*extension.extra_compile_args, *extension.extra_link_args]
        assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations"} & set(flags)
