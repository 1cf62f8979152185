import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import pytest

from nwfast import cli

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="no pyarrow")


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    """Runs a command in this process."""

    def call(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture
def refused(run):
    """The message of a command that is refused: one line, status 2, nothing on stdout."""

    def call(*arguments):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith(f"nwfast {arguments[0]}: error: ") and err.count("\n") == 1, err
        return err.partition("error: ")[2].strip()

    return call


def table(n=60):
    """Two features, two outputs, counts, text with commas; a boolean and a missing value each."""
    generator = np.random.default_rng(3)
    age = generator.uniform(20, 70, n).round(2)
    size = generator.integers(1, 9, n)
    return pandas.DataFrame(
        {
            "name": [f"row {k}, of {n}" for k in range(n)],
            "age": age,
            "size": size,
            "wage": (10 * np.sin(age / 9) + size + generator.normal(0, 0.5, n)).round(3),
            "hours": (age / 10 + generator.normal(0, 0.2, n)).round(3),
            "count": generator.integers(0, 4, n),
            "weight": generator.uniform(0.5, 2, n).round(3),
            "married": generator.random(n) < 0.5,
        }
    )


@pytest.fixture
def data(tmp_path) -> Path:
    """The table as a CSV file."""
    path = tmp_path / "data.csv"
    table().to_csv(path, index=False)
    return path


@pytest.fixture
def model(run, data, tmp_path) -> Path:
    """A model of wage by age and size."""
    path = tmp_path / "wage.model"
    arguments = ("--x", "age,size", "--y", "wage", "--bandwidth", "4,2", "--degree", "1", "--quiet")
    assert run("fit", data, *arguments, "-o", path) == (0, "", "")
    return path
