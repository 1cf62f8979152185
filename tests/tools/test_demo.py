import base64
import html.parser
import sys

import pytest
import torch
from matplotlib import image

from nwfast import NWKernelRegression, backends, datasets
from nwfast.demo import airports, chapter, flights
from nwfast.demo.chapter import DemoError, Options
from nwfast.demo.report import Figure, Section, Table, as_html, as_text

CHAPTER_FIGURES = {
    "data.png",
    "average.png",
    "nonparametric.png",
    "nonparametric-weights.png",
    "loss.png",
    "learned.png",
    "learned-weights.png",
}


class Page(html.parser.HTMLParser):
    """The images, the table rows and the text of a page; complains about tags left open."""

    def __init__(self, text):
        super().__init__()
        self.images, self.rows, self.text, self.open = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        # Self-contained: nothing is loaded from elsewhere.
        assert not {"href", "srcset"} & set(given)
        if tag == "img":
            kind, _, data = given["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.images.append(base64.b64decode(data, validate=True))
            assert given["alt"]
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def chapter_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "made" / "anew"
    text = chapter.run(Options(out=out, seed=1, w=0.6, dtype=torch.float64, flights=False), quiet=True)
    return out, text


def textbook_run(seed=1, w=0.6):
    """Losses, w after each epoch, and test errors of the three fits, from the matrices."""
    x, y, x_test, y_truth = datasets.chapter(seed=seed, dtype=torch.float64)
    others = ~torch.eye(50, dtype=torch.bool)
    keys, values = x.repeat(50, 1)[others].reshape(50, 49), y.repeat(50, 1)[others].reshape(50, 49)
    parameter = torch.tensor([w], dtype=torch.float64, requires_grad=True)
    losses, ws = [], []
    for _ in range(5):
        weights = torch.softmax(-(((x[:, None] - keys) * parameter) ** 2) / 2, dim=1)
        loss = (((weights * values).sum(1) - y) ** 2 / 2).sum()
        (gradient,) = torch.autograd.grad(loss, parameter)
        parameter.data -= 0.5 * gradient
        losses.append(loss.item())
        ws.append(parameter.item())

    def error(w):
        prediction = torch.softmax(-(((x_test[:, None] - x) * w) ** 2) / 2, dim=1) @ y
        return ((prediction - y_truth) ** 2).mean().item()

    return losses, ws, [error(0.0), error(1.0), error(ws[-1])]


def test_page_and_text_have_the_textbooks_numbers(chapter_run):
    out, text = chapter_run
    losses, ws, errors = textbook_run()
    rows = Page((out / "index.html").read_text(encoding="utf-8")).rows
    by_name = {row[0]: row for row in rows}
    for name, error in zip(("average pooling", "kernel regression", "learned w"), errors, strict=True):
        assert by_name[name][2] == f"{error:.4f}"
    for epoch, (loss, w) in enumerate(zip(losses, ws, strict=True), 1):
        assert by_name[str(epoch)] == [str(epoch), f"{loss:.4f}", f"{w:.4f}"]
    assert by_name["start"][2] == "0.6000"
    for row in rows:
        assert all(cell in text for cell in row)
    assert errors[2] < errors[1] < errors[0]


def test_products_have_the_chapters_shapes_and_values(chapter_run):
    _, text = chapter_run
    assert "(2, 1, 6)" in text
    assert text.count("4.5, 14.5") == 2
    assert "(2, 1, 1)" in text


def test_figures_are_files_and_in_the_page(chapter_run):
    out, _ = chapter_run
    assert {path.name for path in out.iterdir()} == CHAPTER_FIGURES | {"index.html"}
    files = {path.read_bytes() for path in out.glob("*.png")}
    assert len(files) == len(CHAPTER_FIGURES)  # no two alike
    assert set(Page((out / "index.html").read_text(encoding="utf-8")).images) == files


def test_no_figure_is_blank(chapter_run):
    for path in chapter_run[0].glob("*.png"):
        picture = image.imread(path)[..., :3]
        assert min(picture.shape[:2]) > 300
        assert 0.01 < (picture.min(-1) < 0.95).mean() < 0.99, path.name


def test_learned_weights_are_sharper(chapter_run):
    page = Page((chapter_run[0] / "index.html").read_text(encoding="utf-8"))
    largest = [float(part.split()[0]) for part in page.text.split("the largest of a row is ")[1:]]
    assert len(largest) == 2
    assert largest[1] > 2 * largest[0]


def test_same_options_give_the_same_figures_and_numbers(chapter_run, tmp_path):
    chapter.run(Options(out=tmp_path, seed=1, w=0.6, dtype=torch.float64, flights=False), quiet=True)
    for name in CHAPTER_FIGURES:
        assert (tmp_path / name).read_bytes() == (chapter_run[0] / name).read_bytes()


@pytest.fixture
def unpainted(monkeypatch):
    """Figures are made, and not painted, which takes longer than all else: for tests of what the text says."""
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, file, **options: file.write(b"png")
    )


@pytest.mark.usefixtures("unpainted")
def test_start_of_w_is_drawn_from_the_seed(tmp_path):
    options = Options(out=tmp_path, n=5, epochs=0, flights=False)
    state = torch.random.get_rng_state()
    lines = [line for _ in range(2) for line in chapter.run(options, quiet=True).splitlines()]
    start = {line for line in lines if line.startswith("  start ")}
    assert len(start) == 1
    assert 0 < float(start.pop().split()[-1]) < 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not (tmp_path / "loss.png").exists()  # nothing to draw without an epoch


@pytest.mark.usefixtures("unpainted")
def test_many_examples_are_scaled_and_thinned(tmp_path):
    text = chapter.run(Options(n=3000, out=tmp_path, flights=False), quiet=True)
    assert "50/n = 0.0166667" in text
    assert "3000 training inputs" in text
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Computed for 200 of the test inputs and 200 of the training inputs" in page
    errors = [float(line.split()[-2]) for line in text.splitlines() if line.startswith("  learned w ")]
    assert len(errors) == 1
    assert errors[0] < 0.02


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("n", [2, 3])
def test_few_examples(tmp_path, n):
    text = chapter.run(Options(n=n, out=tmp_path, flights=False), quiet=True)
    assert f"{n} training inputs" in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 1}, "--n must be at least 2"),
        ({"n": 10**10}, r"--n must be at most 10\*\*9"),
        ({"epochs": -1}, "--epochs must not be negative, got -1"),
        ({"noise": -0.5}, "--noise must be a finite number >= 0, got -0.5"),
        ({"lr": float("inf")}, "--lr must be a finite number >= 0, got inf"),
        ({"w": float("nan")}, "--w must be finite, got nan"),
        ({"seed": 2**70}, "--seed must fit into 64 bits"),
        ({"lr": 1e39}, r"--lr must be a finite number >= 0, got 1e\+39"),
        ({"w": -1e39}, r"--w must be finite, got -1e\+39"),
        ({"lr": 3e38}, "diverged to w = .*: try a smaller --lr"),
        ({"backend": "nonsense"}, "backend must be 'auto' or one of"),
        ({"backend": "reference", "n": 100_000}, r"too large for the backend 'reference'.* 80 GB"),
    ],
)
def test_bad_options(tmp_path, options, match):
    with pytest.raises(DemoError, match=match):
        chapter.run(Options(out=tmp_path, flights=False, **options), quiet=True)


def test_backend_that_cannot_run_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_why_not", lambda name: "no such luck" if name == "numba" else "")
    with pytest.raises(DemoError, match="backend='numba' cannot run: no such luck"):
        chapter.run(Options(out=tmp_path, backend="numba", flights=False), quiet=True)


def test_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DemoError, match=r"cannot write to .*file"):
            chapter.run(Options(out=out, flights=False), quiet=True)


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib: pip install .*\[demo\]"):
        chapter.run(Options(out=tmp_path, flights=False), quiet=True)


@pytest.mark.usefixtures("unpainted")
def test_reference_and_missing_data_leave_the_flights_out(tmp_path, monkeypatch):
    text = chapter.run(Options(n=5, out=tmp_path, backend="reference"), quiet=True)
    assert "builds the matrix of all pairs, 857 GB" in text
    monkeypatch.setattr(datasets, "why_no_flights", lambda: "there are none")
    assert "Left out: there are none." in chapter.run(Options(n=5, out=tmp_path), quiet=True)


class Bar:
    """Counts what tqdm would show."""

    count = 0

    def set_description(self, text):
        pass

    def update(self):
        self.count += 1


def test_flights_section_has_the_leave_one_out_errors(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hour = 5 + (torch.rand(600, generator=generator) * 1000).floor() / 60
    delay = 10 * torch.sin(hour / 3) + torch.randn(600, generator=generator)
    monkeypatch.setattr(datasets, "flights", lambda dtype: datasets.Flights(hour.to(dtype), delay.to(dtype)))
    bar = Bar()
    candidates = (1.0, 30.0, 480.0)
    section = flights.flights_section(torch.float64, "auto", candidates, 60.0, bar)

    x, y = hour.double(), delay.double()
    errors = []
    for minutes in candidates:
        scores = -(((x[:, None] - x) * 60 / minutes) ** 2) / 2
        weights = torch.softmax(scores.fill_diagonal_(-torch.inf), dim=1)
        errors.append((weights @ y - y).square().mean().sqrt().item())
    (table,) = section.tables
    assert [row[2] for row in table.rows] == [f"{error:.4f}" for error in errors]
    assert errors[1] < min(errors[0], errors[2])  # neither end
    assert bar.count == 2 + len(candidates)
    assert [figure.name for figure in section.figures] == ["flights.png", "flights-bandwidth.png"]
    assert "600 flights" in section.paragraphs[0]


def test_airports_section_learns_the_w_of_least_leave_one_out_error(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    (west, east), (south, north) = datasets.CONTIGUOUS
    place = torch.rand(300, 2, generator=generator, dtype=torch.float64)
    place = torch.tensor([west, south]) + place * torch.tensor([east - west, north - south])
    altitude = 1000 + 800 * torch.sin(place[:, 1]) + 40 * place[:, 0]  # roughest northwards
    altitude += 20 * torch.randn(300, generator=generator)
    table = datasets.Airports(place, altitude)
    monkeypatch.setattr(datasets, "airports", lambda dtype: datasets.Airports(*(x.to(dtype) for x in table)))
    bar = Bar()
    section = airports.airports_section(torch.float64, "auto", bar)
    assert bar.count == airports.STEPS

    def error(w):
        scores = -(((place[:, None] - place) * w) ** 2).sum(-1) / 2
        weights = torch.softmax(scores.fill_diagonal_(-torch.inf), dim=1)
        return (weights @ altitude - altitude).square().mean().sqrt().item()

    (table,) = section.tables
    both, each = ([float(cell) for cell in row[1:]] for row in table.rows)
    assert both[0] == both[1]
    assert each[1] > 3 * each[0]
    for found in (both, each):
        shown = torch.tensor(found[:2])  # to three decimals
        assert error(shown) == pytest.approx(found[4], rel=1e-2)
    least = error(torch.tensor(each[:2]))
    assert least < 0.9 * error(torch.tensor(both[:2]))
    for factor in ([1.1, 1.0], [1 / 1.1, 1.0], [1.0, 1.1], [1.0, 1 / 1.1]):
        assert error(torch.tensor(each[:2]) * torch.tensor(factor)) > least
    kilometres = 111.2 / each[1]
    assert each[3] == pytest.approx(kilometres, abs=0.6)
    assert [figure.name for figure in section.figures] == ["airports.png"]
    assert "300 airports" in section.paragraphs[0]


def test_surface_of_the_map_is_the_regression_and_ends_beyond_the_data():
    place, altitude = torch.tensor([[-100.0, 40.0], [-99.0, 40.5]]), torch.tensor([100.0, 300.0])
    longitude, latitude = torch.linspace(-101, -90, 23), torch.linspace(39, 41, 5)
    w = torch.tensor([2.0, 1.0])
    surface = airports._surface(place, altitude, w, longitude, latitude, "auto")
    assert surface.shape == (5, 23)
    points = torch.stack(torch.meshgrid(longitude, latitude, indexing="xy"), -1).double()
    scores = -(((points[..., None, :] - place) * w) ** 2).sum(-1) / 2
    exact = torch.softmax(scores, -1) @ altitude.double()
    near = scores.logsumexp(-1) > -8
    assert 0.3 < near.double().mean() < 0.7
    assert torch.equal(surface.isnan(), ~near)
    torch.testing.assert_close(surface[near].double(), exact[near], rtol=1e-5, atol=0)


def test_report_escapes_and_aligns():
    sections = [
        Section("a < b", ["x & <script>"], [Table(("name", "value"), [("<i>", "1"), ("long name", "22")])]),
        Section("Figures alone", figures=[Figure("f.png", b"png", 'says "quoted" <b>')]),
    ]
    page = Page(as_html("t & u", sections))
    assert page.images == [b"png"]
    assert page.rows == [["name", "value"], ["<i>", "1"], ["long name", "22"]]
    assert "x & <script>" in page.text
    assert "<script" not in as_html("", sections)
    assert as_text("title", sections).splitlines() == [
        "title",
        "",
        "a < b",
        "  x & <script>",
        "  name       value",
        "  <i>            1",
        "  long name     22",
    ]


def test_train_reports_progress_and_leaves_w_without_epochs():
    data = datasets.chapter(10)
    net, calls = NWKernelRegression(w=0.5), []
    run = chapter.train(net, data.x_train, data.y_train, epochs=3, progress=lambda: calls.append(1))
    assert len(calls) == len(run.losses) == len(run.ws) == 3
    assert run.start == 0.5
    again = chapter.train(net, data.x_train, data.y_train, epochs=0)
    assert (again.losses, again.start) == ([], run.ws[-1])
