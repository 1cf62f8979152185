"""Figures of fitted estimators: what they show is what the estimator says."""

import os

import fresh
import numpy as np
import pandas
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import nwfast
from nwfast import plotting
from nwfast.plotting import estimator as figures
from nwfast.plotting import parts, style


def line(n=50, kind=nwfast.LocalLinearRegressor, **options):
    generator = np.random.default_rng(1)
    frame = pandas.DataFrame({"age": np.sort(generator.uniform(0, 5, n))})
    wage = pandas.Series(2 * np.sin(frame["age"]) + generator.normal(0, 0.5, n), name="wage")
    return kind(options.pop("bandwidth", 0.4), **options).fit(frame, wage), frame, wage


@pytest.fixture(scope="module")
def plane():
    """Two features, two outputs; no data where both are large."""
    generator = np.random.default_rng(2)
    frame = pandas.DataFrame(generator.uniform(0, 10, (400, 2)), columns=["east", "north"])
    frame = frame[frame.sum(axis=1) < 13]
    outputs = pandas.DataFrame({"height": frame["east"], "rain": np.sin(frame["north"])})
    return nwfast.NadarayaWatsonRegressor([0.5, 0.7]).fit(frame, outputs)


def drawn(ax):
    """The figure's pixels."""
    FigureCanvasAgg(ax.figure) if not hasattr(ax.figure.canvas, "buffer_rgba") else None
    ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba())[..., :3] / 255


def labels(ax):
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def curve(ax, label):
    (found,) = [one for one in ax.lines if one.get_label() == label]
    return found.get_xdata(), found.get_ydata()


def band(ax):
    """Places, lower and upper end of the band."""
    (found,) = [one for one in ax.collections if "band" in str(one.get_label())]
    corners = found.get_paths()[0].vertices
    places = np.unique(corners[:, 0])
    ends = [corners[corners[:, 0] == place, 1] for place in places]
    return places, np.array([end.min() for end in ends]), np.array([end.max() for end in ends])


def test_fit_shows_curve_band_and_data():
    model, frame, wage = line()
    ax = plotting.fit(model, level=0.8)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("age", "wage")
    assert labels(ax) == ["80% band, pointwise", "observations", "local linear fit"]
    x, y = curve(ax, "local linear fit")
    assert (x[0], x[-1]) == (frame["age"].min(), frame["age"].max())
    rows = pandas.DataFrame({"age": x})
    np.testing.assert_allclose(y, model.predict(rows))
    places, lower, upper = band(ax)
    np.testing.assert_allclose(places, x)
    np.testing.assert_allclose((lower, upper), model.confidence_band(rows, 0.8))
    (points,) = [one for one in ax.collections if one.get_label() == "observations"]
    np.testing.assert_allclose(points.get_offsets(), np.column_stack([frame["age"], wage]))
    low, high = ax.get_ylim()
    assert low < wage.min() and high > wage.max()
    picture = drawn(ax)
    for colour in (style.PREDICTION, style.DATA):
        assert (np.abs(picture - to_rgb(colour)).max(-1) < 0.1).sum() > 20


def test_the_legend_is_above_all_that_is_drawn():
    ax = plotting.fit(line()[0])
    drawn(ax)
    bottom = ax.transData.inverted().transform(ax.get_legend().get_window_extent())[0, 1]
    assert bottom > max(ax.lines[0].get_ydata().max(), max(band(ax)[2]))


def test_fit_without_band_and_data_on_given_axes():
    figure = Figure()
    given = figure.add_subplot()
    ax = plotting.fit(line(kind=nwfast.NadarayaWatsonRegressor)[0], ax=given, level=None, data=False)
    assert ax is given
    assert labels(ax) == ["Nadaraya-Watson fit"]
    assert not ax.collections


def test_other_features_are_at_their_weighted_median(plane):
    ax = plotting.fit(plane, feature="north", output="rain", data=False, level=None)
    x, y = curve(ax, "Nadaraya-Watson fit, other features at their median")
    east = float(np.median(plane._state.sites.x[:, 0]))
    wanted = plane.predict(pandas.DataFrame({"east": east, "north": x}))["rain"]
    np.testing.assert_allclose(y, wanted, atol=0.02)  # of an even number the median is between two
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("north", "rain")
    assert parts.quantiles(np.array([3.0, 1, 2]), np.array([10.0, 1, 1]), [0.5]).tolist() == [3]


def test_observations_that_share_a_place_are_means_with_areas():
    x = np.repeat([1.0, 2.0, 3.0], [1, 10, 100])
    y = x + np.random.default_rng(0).normal(0, 1, len(x))
    model = nwfast.NadarayaWatsonRegressor(0.5).fit(x[:, None], y)
    ax = plotting.fit(model)
    label = "means at each x0 (area: number)"
    assert labels(ax)[1] == label
    (points,) = [one for one in ax.collections if one.get_label() == label]
    np.testing.assert_allclose(points.get_offsets()[:, 1], [y[x == place].mean() for place in (1, 2, 3)])
    small, middle, large = points.get_sizes()
    assert small < middle < large


def test_many_observations_are_hexagons_that_count_all():
    generator = np.random.default_rng(0)
    x = generator.normal(size=20_000)
    y = x**2 + generator.standard_t(2, 20_000)
    model = nwfast.NadarayaWatsonRegressor(0.2).fit(x[:, None], y, sample_weight=np.full(20_000, 3))
    ax = plotting.fit(model)
    hexagons = ax.collections[-1]
    assert ax.figure.axes[1].get_ylabel() == "observations in a cell"
    low, high = np.quantile(y, [0.002, 0.998])
    assert hexagons.get_array().sum() == pytest.approx(3 * ((y >= low) & (y <= high)).sum(), rel=0.002)
    (note,) = [text.get_text() for text in ax.texts]
    assert note == "0.4% of the observations out of sight"
    assert ax.get_ylim()[0] > y.min() and high < ax.get_ylim()[1] < y.max()
    assert drawn(ax).std() > 0.05


def test_slope_shows_the_marginal_effects():
    model, _, _ = line()
    ax = plotting.slope(model, level=0.9)
    x, y = curve(ax, "slope")
    found = model.marginal_effects(pandas.DataFrame({"age": x}))
    np.testing.assert_allclose(y, np.asarray(found["slope"])[:, 0])
    assert labels(ax) == ["90% band, pointwise", f"mean over the data: {found['mean'][0]:.3g}", "slope"]
    _, lower, upper = band(ax)
    std = np.asarray(found["std"])[:, 0]
    from scipy.stats import t

    reach = t.ppf(0.95, model.n_observations_ - model.effective_dof_) * std
    np.testing.assert_allclose(lower, y - reach)
    np.testing.assert_allclose(upper, y + reach)
    assert ax.get_ylabel() == "slope of wage in age"


def test_slope_of_one_feature_and_output_of_several(plane):
    ax = plotting.slope(plane, feature=1, output="rain", level=None)
    x, y = curve(ax, "slope")
    east = figures._medians(plane)[0]
    found = plane.marginal_effects(pandas.DataFrame({"east": east, "north": x}))
    np.testing.assert_allclose(y, found["slope"][:, 1, 1])
    assert labels(ax) == [f"mean over the data: {found['mean'][1, 1]:.3g}", "slope"]


@pytest.mark.parametrize("criterion", ["loo", "gcv", "aicc", 0.4])
def test_bandwidth_curve_marks_the_chosen_one(criterion):
    model, _, _ = line(bandwidth=criterion)
    ax = plotting.bandwidth_curve(model)
    path, mark = ax.lines
    assert mark.get_xdata() == model.bandwidth_[0]
    assert mark.get_ydata() == pytest.approx(model.loss_)
    assert ax.get_xscale() == "log"
    assert ax.get_ylabel() == figures._CRITERIA.get(criterion, "leave-one-out squared error")
    if criterion != 0.4:
        assert mark.get_ydata()[0] == pytest.approx(path.get_ydata().min(), rel=1e-9)
    report = model.report_
    assert (
        report["search_lower"][0] <= path.get_xdata().min()
        and path.get_xdata().max() <= report["search_upper"][0]
    )
    low, high = ax.get_ylim()
    assert low < mark.get_ydata()[0] < high


def test_bandwidth_curve_of_several_features_is_in_proportion(plane):
    ax = plotting.bandwidth_curve(plane)
    assert ax.get_xlabel() == "factor of all bandwidths"
    path, _ = ax.lines
    wanted = plane.bandwidth_curve(path.get_xdata())[1]
    np.testing.assert_allclose(path.get_ydata(), wanted)
    assert ax.texts[0].get_text() == "0.5, 0.7"


def test_surface_is_the_fit_and_white_where_there_are_no_data(plane):
    ax = plotting.surface(plane, output="rain")
    (image,) = [one for one in ax.collections if hasattr(one, "get_coordinates")]
    shown = np.ma.filled(image.get_array().astype(float), np.nan)
    sites = plane._state.sites
    across, up = (np.linspace(*figures._ends(sites.x[:, k]), figures._SURFACE) for k in (0, 1))
    places = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
    nearest = (((places[:, None] - sites.x.numpy()) / plane.bandwidth_) ** 2).sum(-1).min(1) ** 0.5
    nearest = nearest.reshape(shown.shape)
    assert np.isnan(shown[nearest > 1.05 * figures._FAR]).all() and (nearest > 1.05 * figures._FAR).any()
    seen = nearest < 0.95 * figures._FAR
    wanted = plane.predict(pandas.DataFrame(places, columns=["east", "north"]))["rain"].to_numpy()
    np.testing.assert_allclose(shown[seen], wanted.reshape(shown.shape)[seen], atol=1e-9)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("east", "north")
    assert ax.figure.axes[1].get_ylabel() == "rain"
    (points,) = [one for one in ax.collections if one.get_label() == "places of the data"]
    assert len(points.get_offsets()) == len(sites.x)
    assert drawn(ax).std() > 0.1


def test_surface_turned_and_refused(plane):
    ax = plotting.surface(plane, features=("north", "east"))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("north", "east")
    with pytest.raises(ValueError, match="'north' twice"):
        plotting.surface(plane, features=(1, "north"))
    with pytest.raises(ValueError, match="two features at least, this one has 1"):
        plotting.surface(line()[0])
    with pytest.raises(ValueError, match="feature must be one of east, north, or an index below 2, got 2"):
        plotting.fit(plane, feature=2)
    with pytest.raises(
        ValueError, match="output must be one of height, rain, or an index below 2, got 'wind'"
    ):
        plotting.residuals(plane, output="wind")


def test_residuals_are_what_the_fit_leaves():
    model, frame, wage = line()
    ax = plotting.residuals(model)
    fitted = model.predict(frame)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), np.column_stack([fitted, wage - fitted]))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("fit of wage", "residual of wage")


@pytest.mark.parametrize("n", [50, 250])
def test_weights_of_rows_sum_to_one(n):
    model, frame, _ = line(n)
    ax = plotting.weights(model, frame.iloc[[0, 10, -1]])
    shown = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(shown.sum(1), 1)
    assert shown.shape == (3, 50 if n == 50 else 125)  # of 250 pairs
    x = frame["age"].to_numpy()
    p = np.exp(-0.5 * ((x[[0, 10, -1], None] - x) / 0.4) ** 2)
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(shown, p.reshape(3, shown.shape[1], -1).sum(-1), rtol=1e-9, atol=1e-14)
    assert ax.get_yticklabels()[1].get_text() == f"{x[10]:.4g}"


def test_figures_of_estimators_leave_pyplot_alone():
    code = """
import sys, warnings
warnings.simplefilter("error")
import numpy, nwfast
from nwfast import plotting
assert "matplotlib" not in sys.modules
x = numpy.linspace(0, 1, 20)[:, None]
model = nwfast.LocalLinearRegressor(0.2).fit(x, x[:, 0])
plotting.fit(model).figure.savefig("/dev/null")
print("matplotlib.pyplot" in sys.modules)
"""
    done = fresh.run(code, environment={**os.environ, "MPLBACKEND": "TkAgg", "DISPLAY": ":99"})
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
