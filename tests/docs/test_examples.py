"""The scripts of examples/ run, and show what they say that they show."""

import runpy

import pytest
from conftest import ROOT

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(monkeypatch):
    """Run an example in this process, since importing torch takes longer than it: its names, and its figures' axes."""
    monkeypatch.undo()  # what an example says is of its own seeds, whatever NWFAST_TEST_SEED is
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    matplotlib.use("Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "show", lambda: None)

    def example(name):
        found = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
        return found, [axes for number in plt.get_fignums() for axes in plt.figure(number).axes]

    plt.close("all")
    yield example
    plt.close("all")


def check_chapter(found):
    errors = found["errors"]
    assert errors["learned w"] < errors["w = 1"] < errors["average"]
    assert found["losses"][-1] < found["losses"][0]
    assert (found["pooled"] - found["textbook"]).abs().max() < 1e-5


def check_attention(found):
    assert found["same"] < 1e-4 and found["same_unit"] < 1e-4
    assert found["error"] < 0.5 * found["blind"]  # it reads the sequence
    assert all(block.attend.log_w.grad.abs().min() > 0 for block in (found["model"][1], found["model"][2]))


def check_metric(found):
    def mean(losses, name):
        return sum(losses[name]) / len(losses[name])

    inside, outside = found["inside"], found["outside"]
    shared, free, priced = found["kinds"]
    assert mean(inside, free) < mean(inside, priced) < mean(inside, shared)
    assert mean(outside, priced) < mean(outside, shared) < mean(outside, free)
    kept = {name for name, w in zip(found["data"].feature_names, found["metric"], strict=True) if w > 0.5}
    assert {"bmi", "bp", "s5"} <= kept and len(kept) <= 5


def check_slope(found):
    assert found["gap"] < 1e-7
    mean, line, fitted = found["errors"].values()
    assert max(line[0], fitted[0]) < mean[0] and fitted[1] < line[1] < mean[1]


def check_map(found):
    assert found["error"] < 0.5 * found["spread"]
    assert 0.2 < found["smooth"].isnan().double().mean() < 0.6  # sea, and what lies beyond the borders


def check_million(found):
    assert 0.005 < float(found["selection"]) < 0.02
    assert found["error"] < 2 * found["std"].mean()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_shows_what_it_says(name, run):
    found, axes = run(name)
    globals()[f"check_{name}"](found)
    assert axes and all(part.has_data() for part in axes)
