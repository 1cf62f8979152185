import json
import os

import numpy as np
import pandas
import pytest

import nwfast
from nwfast.cli import models, tables
from nwfast.estimators import storage

from .conftest import needs_pyarrow, table


def same(model, other):
    """Two fitted estimators of the same data and bandwidth."""
    assert type(model) is type(other)
    assert model.report_ == other.report_
    for part, wanted in zip(model._state.sites[:5], other._state.sites[:5], strict=True):
        np.testing.assert_array_equal(part, wanted)


@pytest.mark.parametrize("degree", [0, 1])
@pytest.mark.parametrize("end", ["csv", "csv.gz", pytest.param("parquet", marks=needs_pyarrow)])
def test_fit_is_the_estimators(run, tmp_path, degree, end):
    path, frame = tmp_path / f"data.{end}", table()
    frame.to_parquet(path) if end == "parquet" else frame.to_csv(path, index=False)
    options = ("--y", "wage", "--weights", "weight", "--variance", "local", "--degree", degree)
    status, out, err = run("fit", path, "--x", "age", *options, "-o", tmp_path / "m")
    kind = (nwfast.NadarayaWatsonRegressor, nwfast.LocalLinearRegressor)[degree]
    wanted = kind(missing="drop", variance="local").fit(frame[["age"]], frame["wage"], frame["weight"])
    assert (status, out, err) == (0, wanted.summary() + "\n", "")
    model = storage.load(tmp_path / "m")
    same(model, wanted)
    wanted.save(tmp_path / "estimator")
    assert (tmp_path / "m").read_bytes() == (tmp_path / "estimator").read_bytes()
    new = pandas.DataFrame({"age": np.linspace(15, 75, 40)})
    found, expected = (
        [*one.predict(rows, True, True), *one.confidence_band(rows)]
        for one, rows in ((models.load(str(tmp_path / "m")), new.to_numpy()), (model, new))
    )
    for part, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(part, wanted)


def test_several_columns_of_several_kinds(run, data, tmp_path):
    status, _, _ = run(
        "fit",
        data,
        "--x",
        "age,married",
        "--x",
        "size",
        "--y",
        "wage,hours",
        "--bandwidth",
        "5,0.5,2",
        "-o",
        tmp_path / "m",
    )
    assert status == 0
    model, frame = storage.load(tmp_path / "m"), table()
    assert model.report_["features"] == ["age", "married", "size"]
    assert model.output_names_ == ["wage", "hours"]
    wanted = nwfast.NadarayaWatsonRegressor([5, 0.5, 2], missing="drop")
    same(model, wanted.fit(frame[["age", "married", "size"]].astype(float), frame[["wage", "hours"]]))


def test_whole_weights_are_counts(run, data, tmp_path):
    run(
        "fit",
        data,
        "--x",
        "age",
        "--y",
        "wage",
        "--weights",
        "count",
        "--bandwidth",
        "3",
        "-o",
        tmp_path / "m",
    )
    assert storage.load(tmp_path / "m").n_observations_ == table()["count"].sum()


def test_a_column_with_a_comma_in_its_name(run, tmp_path):
    table().rename(columns={"age": "age, years"}).to_csv(tmp_path / "d.csv", index=False)
    assert (
        run("fit", tmp_path / "d.csv", "--x", "age, years", "--y", "wage", "-o", tmp_path / "m").status == 0
    )
    assert storage.load(tmp_path / "m").report_["features"] == ["age, years"]


def test_json_is_one_document(run, data, tmp_path):
    status, out, err = run("fit", data, "--x", "age", "--y", "wage", "-o", tmp_path / "m", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (status, err) == (0, "")
    assert found.pop("data") == str(data)
    assert found.pop("model") == str(tmp_path / "m")
    assert found == storage.load(tmp_path / "m").report_


def test_json_knows_no_nan(run, tmp_path):
    pandas.DataFrame({"x": [1.0], "y": [2.0]}).to_csv(tmp_path / "d.csv", index=False)
    arguments = (
        "fit",
        tmp_path / "d.csv",
        "--x",
        "x",
        "--y",
        "y",
        "--bandwidth",
        "1",
        "-o",
        tmp_path / "m",
        "--json",
    )
    found = json.loads(run(*arguments).out, parse_constant=pytest.fail)
    assert found["loss"] is None


def test_rows_with_missing_values_are_dropped_and_counted(run, refused, tmp_path):
    frame = table()
    frame.loc[[3, 7], "age"] = np.nan
    frame.loc[[7, 9], "wage"] = np.nan
    frame.to_csv(tmp_path / "d.csv", index=False, na_rep="NA")
    arguments = ("fit", tmp_path / "d.csv", "--x", "age", "--y", "wage", "-o", tmp_path / "m")
    assert "57 (3 rows with missing values dropped)" in run(*arguments).out
    message = refused(*arguments, "--missing", "raise")
    assert message.startswith(f"{tmp_path / 'd.csv'}: column 'age' has 2 missing values, the first in row 4")


def test_a_warning_is_one_line(run, tmp_path):
    pandas.DataFrame({"x": [1.0, 1.0, 2.0, 2.0], "y": [1.0, 1.1, 5.0, 5.1]}).to_csv(
        tmp_path / "d.csv", index=False
    )
    arguments = ("fit", tmp_path / "d.csv", "--x", "x", "--y", "y", "-o", tmp_path / "m")
    note = storage.load(tmp_path / "m").report_["note"] if run(*arguments).status == 0 else ""
    assert note
    told = run(*arguments)
    assert note in told.out and told.err == ""
    assert run(*arguments, "--json").err == f"nwfast fit: warning: {note}\n"
    assert run(*arguments, "--quiet") == (0, "", "")


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{} is empty"),
        ("x,y\n", "{} has no rows"),
        ("x,y\n1,\n2,NA\n", "{}: column 'y' has no values"),
        ("x,y\n1,\n,2\n", "no row is left: each of the 2 rows has a NaN in X, y or sample_weight"),
        ("x,y\n1,2\n1,two\n", "{}: column 'y' is to hold numbers, and row 2 has 'two'"),
        ("x,y\n1,2\n1,True\n3,maybe\n", "{}: column 'y' is to hold numbers, and row 3 has 'maybe'"),
        (
            "x,y\n1,2013-01-01\n",
            "{}: column 'y' holds dates, which are no numbers: make a column",
        ),
        ("x,y\n1,1\n2,inf\n", "{}: column 'y' has an infinite value in row 2"),
        ("xx,y\n1,2\n", "{} has no column 'x'; did you mean 'xx'? It has xx, y"),
        ("a;y\n1;2\n", "{} has no column 'x'; It has a;y"),
        ("x,y\n1,2\n1,2,3\n", "cannot read {}: Error tokenizing data. C error: Expected 2 fields in line 3"),
        ("x,y\n1,2,3\n1,2,3\n", "cannot read {}: Length of header or names does not match length of data."),
        ("z,x,y\n1,2,3,4,5\n1,2,3\n", "cannot read {}: Length of header or names does not match"),
        (b"x,y\n1,\xff\n", "{}: column 'y' is no text in UTF-8 in row 1"),
    ],
    ids=lambda value: None,
)
def test_files_that_cannot_be_fitted(refused, tmp_path, text, message):
    path = write(tmp_path / "d.csv", text)
    told = refused("fit", path, "--x", "x", "--y", "y", "--bandwidth", "1", "-o", tmp_path / "m")
    assert told.startswith(message.format(path))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("text", "y"),
    [
        ('x,t,y\n1,"a\nb",3\n2,"c, ""d""",4\n', [3, 4]),
        ("x,y\r\n1,3\r\n2,4\r\n", [3, 4]),
        ("\ufeffx,y\n1,3\n2,4", [3, 4]),
        ("x,y\n1,true\n2,False\n", [1, 0]),
        ("x,y\n1,1e-300\n2,0.30000000000000004\n", [1e-300, 0.30000000000000004]),
        ("x,y,y\n1,3,5\n2,4,6\n", [3, 4]),
        ("x,y\n1,7\n2,True\n", [7, 1]),
        ("\nx,y\n1,3\n2,4\n", [3, 4]),
        ('"x",y\n"1",9007199254740993\n2,1e5\n', [9007199254740993, 1e5]),
    ],
    ids=lambda value: None,
)
@pytest.mark.parametrize("reader", ["plain", "arrow", "pandas"])
def test_ways_to_write_numbers(run, tmp_path, monkeypatch, text, y, reader):
    path = write(tmp_path / "d.csv", text)
    if reader != "plain":
        monkeypatch.setattr(tables, "_plain_numbers", lambda *_: None)
    if reader == "pandas":
        read = pandas.read_csv

        def without(*arguments, engine=None, **options):
            if engine == "pyarrow":
                raise ImportError("no pyarrow")
            return read(*arguments, **options)

        monkeypatch.setattr(pandas, "read_csv", without)
    assert run("fit", path, "--x", "x", "--y", "y", "--bandwidth", "1", "-o", tmp_path / "m").status == 0
    assert storage.load(tmp_path / "m")._state.sites.y[:, 0].tolist() == pytest.approx(y, rel=1e-15, abs=0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.csv.gz", "x,y\n1,2\n"),
        ("d.zip", "x"),
        ("d.csv.zip", "x"),
        pytest.param("d.pq", "x,y", marks=needs_pyarrow),
    ],
)
def test_files_that_are_not_what_they_are_called(refused, tmp_path, name, text):
    path = write(tmp_path / name, text)
    told = refused("fit", path, "--x", "x", "--y", "y", "-o", tmp_path / "m")
    assert told.startswith("cannot read " if name != "d.zip" else f"{str(path)!r} ends in none of .csv")


@needs_pyarrow
def test_parquet_with_dates(refused, tmp_path):
    pandas.DataFrame({"x": pandas.date_range("2020-01-01", periods=3), "y": [1, 2, 3]}).to_parquet(
        tmp_path / "d.pq"
    )
    assert "column 'x' holds dates" in refused(
        "fit", tmp_path / "d.pq", "--x", "x", "--y", "y", "-o", tmp_path / "m"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--x", "agee", "--y", "wage"],
            "has no column 'agee'; did you mean 'age' or 'wage'? It has name, age, size",
        ),
        (["--x", "AGE", "--y", "wage"], "did you mean 'age'"),
        (["--x", "age", "--y", "age"], "column 'age' is given as two of --x, --y and --weights"),
        (["--x", "age", "--y", "wage", "--weights", "wage"], "column 'wage' is given as two of"),
        (["--x", "age,age", "--y", "wage"], "column 'age' is given twice"),
        (
            ["--x", "age", "--y", "wage", "--weights", "size,count"],
            "--weights takes one column, got size, count",
        ),
        (
            ["--x", "age", "--y", "wage", "--bandwidth", "0"],
            "--bandwidth must be one of loo, gcv, aicc, silverman",
        ),
        (["--x", "age", "--y", "wage", "--bandwidth", "best"], "or numbers above 0, got 'best'"),
        (
            ["--x", "age", "--y", "wage", "--bandwidth", "1,2"],
            "bandwidth must be a number, one for each of the 1",
        ),
        (["--x", "age", "--y", "wage", "--plot", "fit.gif"], "'fit.gif' ends in none of .png, .pdf, .svg"),
    ],
)
def test_options_that_cannot_be_served(refused, data, tmp_path, arguments, message):
    assert message in refused("fit", data, *arguments, "-o", tmp_path / "m")


def test_files_that_are_not_there(refused, data, tmp_path):
    some = ("--x", "age", "--y", "wage", "-o")
    assert refused("fit", tmp_path / "no.csv", *some, "m") == f"there is no file {str(tmp_path / 'no.csv')!r}"
    message = refused("fit", tmp_path / "data.txt", *some, "m")
    assert message.endswith("ends in none of .csv (also .csv.gz and the like), .parquet, .pq")
    (tmp_path / "folder.csv").mkdir()
    assert (
        refused("fit", tmp_path / "folder.csv", *some, "m")
        == f"{str(tmp_path / 'folder.csv')!r} is a directory"
    )
    assert refused("fit", data, *some, tmp_path) == f"cannot write {str(tmp_path)!r}: it is a directory"
    assert "there is no directory" in refused("fit", data, *some, tmp_path / "no" / "m")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(refused, data, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    assert "permission denied" in refused(
        "fit", data, "--x", "age", "--y", "wage", "-o", tmp_path / "shut" / "m"
    )


@needs_pyarrow
@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("x, y ,z\n1,2,a\n3,NA,b\n,5,c\n", True),
        ("x,y\n1,\n2,\n", True),
        ("x,y\n", False),
        ("x,y\n1,2013-01-01\n", False),
        ("x,y\n1,2\n2,inf\n", False),
        ("x,y\n1,2\n2,true\n", False),
        ('x,"y"\n1,2\n', False),
        ("x,y,y\n1,2,3\n", False),
        ("x,y,\n1,2,3\n", False),
        ("\nx,y\n1,2\n", False),
        ("x,y\n1,2,3\n", False),
    ],
    ids=lambda value: None,
)
def test_plain_numbers_are_those_of_pandas(tmp_path, text, plain):
    path = str(write(tmp_path / "d.csv", text))
    names = tables.columns_of(path)
    assert names == [str(name) for name in pandas.read_csv(path, nrows=0).columns]
    found = tables._plain_numbers(path, names[:2])
    assert (found is not None) == plain
    if plain:
        wanted = tables.numbers(tables._read_csv(path, names[:2]), names[:2], path)
        for name in names[:2]:
            np.testing.assert_array_equal(found[name], wanted[name])
