"""docs/estimator.md runs, and makes the figures that it shows."""

import doctest
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "estimator.md"


def test_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert failed == 0 and tried > 20
    shown = set(re.findall(r"\(figures/(estimator-[a-z]+\.png)\)", PAGE.read_text()))
    made = {path.name for path in tmp_path.glob("*.png")}
    assert shown == made | {"estimator-flights.png"} and len(made) == 4
    for name in shown:
        assert (ROOT / "docs" / "figures" / name).stat().st_size > 10_000
    commands = re.findall(r"^\$ nwfast (\w+)", PAGE.read_text(), re.MULTILINE)
    assert commands == ["data", "fit", "predict", "plot"]


def test_figures_are_drawn_by_a_script():
    assert "docs/estimator.md" in (ROOT / "docs" / "figures.py").read_text()
    assert callable(runpy.run_path(str(ROOT / "docs" / "figures.py"))["main"])
