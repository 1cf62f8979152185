"""What a package without its C++ extension says, and when it takes another's: copies of nwfast in fresh processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import pytest

import nwfast
from nwfast.backends import built

PACKAGE = Path(nwfast.__file__).resolve().parent
EXTENSION = "_C.abi3.so"

IMPORT = "import json, sys, warnings; sys.modules['numba'] = None; import nwfast; "
STATE = IMPORT + "print(json.dumps([nwfast.__file__, nwfast.backends.available()['native']]))"
CALLS = IMPORT + "import torch; x = torch.rand(4); [nwfast.nadaraya_watson(x, x, x) for _ in range(2)]"


def copy(folder: Path, left_out: dict[str, str] | None = None, extension: bool = False) -> Path:
    """nwfast in `folder`, without its extension unless asked for, and with a record where one is given."""
    package = folder / "nwfast"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"))
    if extension:
        shutil.copy(PACKAGE / EXTENSION, package)
    if left_out is not None:
        built.write(package, folder, left_out)
    return package


def sources(folder: Path, text: str = "// one\n") -> None:
    (folder / "csrc").mkdir()
    (folder / "csrc" / "one.cpp").write_text(text)
    (folder / "setup.py").write_text("")


def run(
    code: str, folder: Path, *path: Path, anew: bool = False, **variables: str
) -> subprocess.CompletedProcess:
    """In a fresh process; `anew` in one of an interpreter that reads the variables, too."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("NWFAST_QUIET", "PYTHONWARNINGS")
    }
    kept["PYTHONPATH"] = os.pathsep.join(map(str, path))
    # An nwfast that is installed editable has a finder of its own, which would name its extension here.
    alone = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
    kept |= variables
    if anew:
        command = [sys.executable, "-c", alone + code]
        done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)
    else:
        done = fresh.run(alone + code, folder, kept)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "checkout"
    copy(folder)
    sources(folder)
    return folder


def test_a_checkout_takes_the_extension_that_is_installed_if_it_is_of_its_sources(checkout, tmp_path, native):
    site = tmp_path / "site"
    installed = copy(site, extension=True)
    built.write(installed, checkout, {})
    done = run(STATE, checkout, site)
    assert json.loads(done.stdout) == [str(checkout / "nwfast" / "__init__.py"), True]
    assert done.stderr == ""
    info = run("import nwfast.cli; print(nwfast.cli.info())", checkout, site).stdout
    assert f"of {installed}, built from the sources beside the package" in info


@pytest.mark.parametrize("change", ["sources", "record"])
def test_a_checkout_says_what_it_hides(change, checkout, tmp_path, native):
    site = tmp_path / "site"
    installed = copy(site, extension=True)
    if change == "sources":
        built.write(installed, checkout, {})
        (checkout / "csrc" / "one.cpp").write_text("// another\n")
    done = run(STATE, checkout, site)
    reason = json.loads(done.stdout)[1]
    assert f"not built in {checkout / 'nwfast'}, which hides the nwfast installed in {installed}" in reason
    assert done.stderr.count(reason) == 1
    assert "Warning: nwfast:" in done.stderr
    assert run(STATE, checkout, site, NWFAST_QUIET="1").stderr == ""
    assert (
        reason in run("import nwfast.cli; print(nwfast.cli.info())", checkout, site, NWFAST_QUIET="1").stdout
    )


def test_a_folder_that_hides_nothing(checkout):
    done = run(STATE, checkout)
    assert json.loads(done.stdout)[1].endswith(f"is not built: there is none in {checkout / 'nwfast'}")
    assert done.stderr == ""


def test_the_first_call_that_falls_back_says_why_and_what_to_do(tmp_path):
    copy(tmp_path, {"_C": "no compiler, say"})
    done = run(CALLS, tmp_path)
    expected = (
        "takes 'reference': the C++ extension nwfast._C was left out when nwfast was built: no compiler, say."
    )
    assert done.stderr.count(expected) == 1
    assert "install nwfast again: pip install" in done.stderr
    assert done.stderr.startswith("<string>:1: UserWarning")  # the caller's own line
    assert run(CALLS, tmp_path, NWFAST_QUIET="1").stderr == ""
    assert run(CALLS, tmp_path, anew=True, PYTHONWARNINGS="ignore:nwfast").stderr == ""
    named = CALLS.replace("x, x, x", "x, x, x, backend='reference'")
    assert run(named, tmp_path).stderr == ""


def test_a_build_that_was_to_go_without_it_is_silent(tmp_path):
    copy(tmp_path, {"_C": "NWFAST_EXT=0"})
    assert run(CALLS, tmp_path).stderr == ""


@pytest.mark.full
def test_the_warning_does_not_break_a_graph(tmp_path):
    copy(tmp_path, {"_C": "no compiler, say"})
    code = CALLS.replace("nwfast.nadaraya_watson(x, x, x)", "compiled(x)").replace(
        "x = torch.rand(4);",
        "x = torch.rand(4); compiled = torch.compile(lambda x: nwfast.nadaraya_watson(x, x, x), backend='eager', "
        "fullgraph=True);",
    )
    run(code, tmp_path)


def test_the_digest_is_that_of_what_is_compiled(checkout):
    before = built.digest(checkout)
    (checkout / "csrc" / "notes.txt").write_text("not compiled")
    assert built.digest(checkout) == before != ""
    (checkout / "csrc" / "one.cpp").rename(checkout / "csrc" / "two.cpp")
    assert built.digest(checkout) != before
    assert built.digest(checkout / "nwfast") == ""


def test_hints_name_what_can_be_installed(checkout, tmp_path):
    code = "from nwfast.backends.messages import how_to_install; print(how_to_install('demo'))"
    assert run(code, checkout).stdout == "pip install 'nwfast[demo]'\n"
    (checkout / "pyproject.toml").write_text("")
    assert run(code, checkout).stdout == "pip install --no-build-isolation '.[demo]'\n"
