import io
import os
import sys

import numpy as np
import pandas
import pytest

from nwfast import cli
from nwfast.cli import predict
from nwfast.estimators import storage

from .conftest import needs_pyarrow, table

ALL = ("--std", "--slope", "--level", "0.9")


def wanted(model, frame):
    """What the estimator says of a table, by the names of the command's columns."""
    estimator = storage.load(model)
    inputs = frame[["age", "size"]].astype(float)
    fit, std, slope = (np.asarray(part) for part in estimator.predict(inputs, True, True))
    lower, upper = estimator.confidence_band(inputs, 0.9)
    return {
        "wage_fit": fit,
        "wage_std": std,
        "wage_lower": lower,
        "wage_upper": upper,
        "wage_slope_age": slope[:, 0],
        "wage_slope_size": slope[:, 1],
    }


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize(
    "ends",
    [
        "csv csv",
        "csv csv.gz",
        *(
            pytest.param(ends, marks=needs_pyarrow)
            for ends in ("csv parquet", "parquet csv", "parquet parquet")
        ),
    ],
)
def test_predictions_are_the_estimators_and_columns_stay(run, model, tmp_path, ends, chunk):
    source, target = (
        tmp_path / f"{name}.{end}" for name, end in zip(("new", "out"), ends.split(), strict=True)
    )
    frame = table(25)
    frame.to_parquet(source) if source.suffix == ".parquet" else frame.to_csv(source, index=False)
    assert run("predict", model, source, "-o", target, "--chunk", chunk, *ALL) == (0, "", "")
    found = pandas.read_parquet(target) if target.suffix == ".parquet" else pandas.read_csv(target)
    columns = wanted(model, frame)
    assert list(found) == [*frame, *columns]
    for name, values in columns.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-10, atol=1e-12)
    for name in frame:
        if ends == "csv parquet" and name not in ("age", "size"):  # other columns of CSV go on as texts
            assert list(found[name]) == [str(value) for value in frame[name]]
        else:
            assert list(found[name]) == list(frame[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"data.csv", "wage.model", source.name, target.name}
    )


def test_texts_stay_as_they_are(run, model, tmp_path):
    text = 'id,age,size,more\n007,30.50,2,"a, ""b"""\n008,1e1,3,NA\n,40,1,\n'
    (tmp_path / "new.csv").write_text(text)
    out = run("predict", model, tmp_path / "new.csv", "-o", "-").out
    assert out.splitlines()[0] == "id,age,size,more,wage_fit"
    assert [line.rpartition(",")[0] for line in out.splitlines()[1:]] == text.splitlines()[1:]


def test_rows_without_an_input_have_no_prediction(run, model, tmp_path):
    (tmp_path / "new.csv").write_text("age,size\n30,2\nNA,2\n30,\n30,2\n")
    status, out, err = run("predict", model, tmp_path / "new.csv", "-o", "-", "--std", "--chunk", 2)
    found = pandas.read_csv(io.StringIO(out))
    assert status == 0
    assert err == "nwfast predict: 2 rows with missing inputs have no prediction\n"
    assert (
        found["wage_fit"].isna().tolist() == found["wage_std"].isna().tolist() == [False, True, True, False]
    )
    assert found["wage_fit"][0] == found["wage_fit"][3]


@pytest.mark.parametrize("end", ["csv", pytest.param("parquet", marks=needs_pyarrow)])
def test_a_file_without_rows_gives_one(run, model, tmp_path, end):
    source = tmp_path / f"new.{end}"
    empty = table()[:0]
    empty.to_csv(source, index=False) if end == "csv" else empty.to_parquet(source)
    assert run("predict", model, source, "-o", tmp_path / f"out.{end}", *ALL).status == 0
    read = pandas.read_csv if end == "csv" else pandas.read_parquet
    assert list(read(tmp_path / f"out.{end}")) == [*empty, *wanted(model, table())]


def test_several_outputs_have_columns_of_their_own(run, data, tmp_path):
    run("fit", data, "--x", "age", "--y", "wage,hours", "--bandwidth", "3", "-o", tmp_path / "m")
    out = run("predict", tmp_path / "m", data, "-o", "-", "--std", "--slope").out
    found = pandas.read_csv(io.StringIO(out))
    added = [f"{output}_{end}" for output in ("wage", "hours") for end in ("fit", "std", "slope")]
    assert list(found)[-6:] == added
    fit, std, slope = storage.load(tmp_path / "m").predict(table()[["age"]], True, True)
    for k, output in enumerate(("wage", "hours")):
        for end, values in (("fit", fit), ("std", std)):
            np.testing.assert_allclose(found[f"{output}_{end}"], np.asarray(values)[:, k], rtol=1e-10)
        np.testing.assert_allclose(found[f"{output}_slope"], np.asarray(slope)[:, k, 0], rtol=1e-10)


def test_a_file_can_be_written_onto_itself(run, model, data):
    before = pandas.read_csv(data)
    assert run("predict", model, data, "-o", data, "--chunk", 7).status == 0
    pandas.testing.assert_frame_equal(pandas.read_csv(data).drop(columns="wage_fit"), before)


def test_a_text_far_down_leaves_no_file(refused, model, tmp_path):
    frame = table(25).astype({"age": object})
    frame.loc[20, "age"] = "old"
    frame.to_csv(tmp_path / "new.csv", index=False)
    (tmp_path / "out.csv").write_text("before")
    message = refused("predict", model, tmp_path / "new.csv", "-o", tmp_path / "out.csv", "--chunk", 4)
    assert message == f"{tmp_path / 'new.csv'}: column 'age' is to hold numbers, and row 21 has 'old'"
    assert (tmp_path / "out.csv").read_text() == "before"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("arguments", [["--level", "1"], ["--level", "0"], ["--chunk", "0"]])
def test_options_that_cannot_be_served(refused, model, data, arguments):
    assert refused("predict", model, data, "-o", "-", *arguments).startswith(f"{arguments[0]} must be ")


def test_files_that_do_not_fit(refused, run, model, data, tmp_path):
    assert (
        refused("predict", tmp_path / "no", data, "-o", "-") == f"there is no file {str(tmp_path / 'no')!r}"
    )
    assert refused("predict", tmp_path, data, "-o", "-").endswith("is a directory, not a model")
    assert refused("predict", data, data, "-o", "-") == f"{str(data)!r} is no model that nwfast saved"
    np.savez(tmp_path / "other.npz", a=1)
    assert refused("predict", tmp_path / "other.npz", data, "-o", "-").endswith(
        "is no model that nwfast saved"
    )
    table()[["age", "wage"]].rename(columns={"age": "Age"}).to_csv(tmp_path / "new.csv", index=False)
    message = refused("predict", model, tmp_path / "new.csv", "-o", "-")
    assert (
        message
        == f"{tmp_path / 'new.csv'} has no column 'age'; did you mean 'Age' or 'wage'? It has Age, wage"
    )
    run("predict", model, data, "-o", tmp_path / "out.csv")
    message = refused("predict", model, tmp_path / "out.csv", "-o", "-")
    assert message == f"{tmp_path / 'out.csv'} has a column 'wage_fit' already"
    assert "it is a directory" in refused("predict", model, data, "-o", _folder(tmp_path / "folder.csv"))
    assert "ends in none of" in refused("predict", model, data, "-o", tmp_path / "out.xls")


def _folder(path):
    path.mkdir()
    return path


def test_a_reader_that_goes_ends_quietly(model, data, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(["predict", str(model), str(data), "-o", "-"]) == 141
        monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def test_an_interrupt_ends_quietly_and_leaves_no_file(run, model, data, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "added_columns", interrupted)
    assert run("predict", model, data, "-o", tmp_path / "out.csv") == (130, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "wage.model"]
