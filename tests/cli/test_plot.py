import pytest
from matplotlib import image

from nwfast.cli import plot


@pytest.mark.parametrize("kind", plot._KINDS)
def test_each_kind_is_a_figure(run, model, tmp_path, kind):
    assert run("plot", model, "-o", tmp_path / "a.png", "--kind", kind) == (0, "", "")
    assert image.imread(tmp_path / "a.png")[..., :3].std() > 0.02


@pytest.mark.parametrize("end", ["pdf", "svg"])
def test_other_formats(run, model, tmp_path, end):
    assert run("plot", model, "-o", tmp_path / f"a.{end}", "--feature", "size", "--level", 0).status == 0
    assert (tmp_path / f"a.{end}").stat().st_size > 5000


def test_fit_draws_too(run, data, tmp_path):
    options = (
        "--x",
        "age",
        "--y",
        "wage",
        "--bandwidth",
        "3",
        "-o",
        tmp_path / "m",
        "--plot",
        tmp_path / "a.png",
    )
    assert run("fit", data, *options).status == 0
    assert run("plot", tmp_path / "m", "-o", tmp_path / "b.png").status == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_names_reach_the_figure(run, model, tmp_path, monkeypatch):
    from nwfast import plotting

    seen = {}
    for name in ("slope", "surface"):
        original = getattr(plotting, name)

        def spy(model, name=name, original=original, **options):
            seen[name] = options
            return original(model, **options)

        monkeypatch.setattr(plotting, name, spy)
    run(
        "plot",
        model,
        "-o",
        tmp_path / "a.png",
        "--kind",
        "slope",
        "--feature",
        "size",
        "--output",
        "wage",
        "--level",
        0.8,
    )
    assert seen["slope"] == {"feature": "size", "output": "wage", "level": 0.8}
    run("plot", model, "-o", tmp_path / "a.png", "--kind", "surface", "--feature", "size,age")
    assert seen["surface"] == {"features": ("size", "age"), "output": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--feature", "agee"], "has no feature 'agee'; did you mean 'age'? It has age, size"),
        (["--output", "wag"], "has no output 'wag'; did you mean 'wage'? It has wage"),
        (["--feature", "age,size"], "--kind fit takes 1 of --feature, got 2"),
        (["--kind", "surface", "--feature", "age"], "--kind surface takes 2 of --feature, got 1"),
        (["--level", "1"], "--level must be between 0 and 1, got 1"),
    ],
)
def test_options_that_cannot_be_served(refused, model, tmp_path, arguments, message):
    assert message in refused("plot", model, "-o", tmp_path / "a.png", *arguments)


def test_files_that_cannot_be_served(refused, run, data, model, tmp_path):
    assert "ends in none of .png, .pdf, .svg" in refused("plot", model, "-o", tmp_path / "a.jpeg")
    assert "there is no directory" in refused("plot", model, "-o", tmp_path / "no" / "a.png")
    assert "is no model" in refused("plot", data, "-o", tmp_path / "a.png")
    run("fit", data, "--x", "age", "--y", "wage", "--bandwidth", "3", "-o", tmp_path / "m")
    message = refused("plot", tmp_path / "m", "-o", tmp_path / "a.png", "--kind", "surface")
    assert message.startswith("a surface needs two inputs")
