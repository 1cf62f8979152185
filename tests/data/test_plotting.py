import io
import os

import fresh
import numpy as np
import pytest
import torch
from matplotlib import image

from nwfast import attention_weights, datasets, plotting
from nwfast.plotting import style


def pixels(figure):
    data = plotting.png(figure)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return image.imread(io.BytesIO(data))[..., :3]


def near(picture, colour, tolerance=0.06):
    """How many pixels have about this colour."""
    from matplotlib.colors import to_rgb

    return int((np.abs(picture - np.array(to_rgb(colour))).max(-1) < tolerance).sum())


@pytest.fixture
def data():
    return datasets.chapter(seed=0)


def test_thin_keeps_both_ends_and_the_order():
    assert plotting.thin(5, 10).tolist() == [0, 1, 2, 3, 4]
    kept = plotting.thin(1_000_003, 200)
    assert (len(kept), kept[0].item(), kept[-1].item()) == (200, 0, 1_000_002)
    assert (kept.diff() > 0).all()


def test_regression_shows_data_truth_and_prediction(data):
    figure = plotting.regression(*data, prediction=data.y_truth - 1, title="a title")
    (axes,) = figure.axes
    assert axes.get_xlim() == (0, 5)
    assert axes.get_ylim() == (-1, 5)
    assert axes.get_title() == "a title"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "training data",
        "truth",
        "prediction",
    ]
    assert len(axes.collections[0].get_offsets()) == 50
    assert axes.collections[0].get_alpha() == 0.5
    truth, prediction = axes.lines
    np.testing.assert_allclose(truth.get_ydata(), data.y_truth.numpy(), rtol=1e-6)
    np.testing.assert_allclose(prediction.get_ydata(), data.y_truth.numpy() - 1, rtol=1e-6)
    picture = pixels(figure)
    assert near(picture, style.TRUTH) > 300
    assert near(picture, style.PREDICTION) > 300


def test_regression_without_a_prediction_has_no_such_line(data):
    figure = plotting.regression(*data, prediction=None, title="")
    assert len(figure.axes[0].lines) == 1
    assert near(pixels(figure), style.PREDICTION) == 0


def test_regression_draws_a_sample_of_many_points():
    data = datasets.chapter(5000)
    figure = plotting.regression(*data, prediction=data.y_truth, title="")
    axes = figure.axes[0]
    assert len(axes.collections[0].get_offsets()) == 2000
    assert axes.get_legend().get_texts()[0].get_text() == "training data (2000 of 5000)"


def test_heatmap_is_darkest_where_the_weight_is_largest(data):
    weights = attention_weights(data.x_test, data.x_train, 5.0)
    figure = plotting.heatmap(weights, data.x_train, data.x_test, "")
    axes, bar = figure.axes
    shown = axes.images[0]
    np.testing.assert_allclose(shown.get_array(), weights.numpy(), rtol=1e-6)
    assert shown.get_cmap().name == "Reds"
    assert shown.get_clim() == (0, pytest.approx(weights.max().item()))
    assert bar.get_ylabel() == "weight"
    assert axes.get_yticklabels()[0].get_text() == "0.0"
    picture = pixels(figure)
    assert near(picture, shown.get_cmap()(1.0)[:3]) > 20


def test_heatmap_inputs_are_thinned_and_stay_sorted():
    data = datasets.chapter(1000)
    keys, queries = plotting.heatmap_inputs(data.x_train, data.x_test)
    assert keys.shape == queries.shape == (200,)
    assert (keys.diff() >= 0).all()
    assert (keys[0], queries[-1]) == (data.x_train[0], data.x_test[-1])
    small = datasets.chapter(50)
    assert torch.equal(plotting.heatmap_inputs(small.x_train, small.x_test)[0], small.x_train)


@pytest.mark.parametrize("losses", [[3.0], [20.0, 5.0, 1.0], [float("nan"), float("nan")]])
def test_loss_has_a_point_an_epoch(losses):
    figure = plotting.loss(losses, "")
    (line,) = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xdata(), range(1, len(losses) + 1))
    np.testing.assert_array_equal(line.get_ydata(), losses)
    assert (near(pixels(figure), style.PREDICTION) > 20) == (losses[0] == losses[0])


def test_flights_show_means_and_curves():
    hour = torch.linspace(5.0, 23.9, 10_000)
    delay = hour - 10
    grid = torch.linspace(5.0, 24.0, 100)
    figure = plotting.flights(hour, delay, grid, {"narrow": grid - 10, "wide": grid - 9}, "")
    axes = figure.axes[0]
    x, mean = axes.collections[0].get_offsets().T
    np.testing.assert_allclose(
        mean, x - 10, atol=0.05
    )  # of a line, the mean is its value at the bin's centre
    low, high = axes.get_ylim()
    assert low < -5
    assert high > 15
    picture = pixels(figure)
    assert min(near(picture, colour) for colour in (style.PREDICTION, style.DATA)) > 100


def test_airports_and_surface_have_their_places_and_one_scale_of_colours():
    longitude, latitude = torch.linspace(-100.0, -90.0, 21), torch.linspace(30.0, 36.0, 13)
    place = torch.tensor([[-98.0, 31.0], [-91.0, 35.0]])
    altitude = torch.tensor([0.0, 2000.0])
    surface = (longitude + 100) * 200 + 0 * latitude[:, None]  # higher to the east
    surface[:, :3] = torch.nan
    figure = plotting.airports(place, altitude, longitude, latitude, surface, "fit")
    left, right, bar = figure.axes
    np.testing.assert_array_equal(left.collections[0].get_offsets(), place)
    np.testing.assert_array_equal(right.collections[0].get_offsets(), place)
    np.testing.assert_array_equal(np.ma.filled(right.images[0].get_array(), np.nan), surface.numpy())
    assert right.images[0].get_extent() == [-100, -90, 30, 36]
    assert right.images[0].origin == "lower"  # north is up
    assert left.collections[0].norm is right.images[0].norm
    assert bar.get_ylabel() == "altitude (m)"
    colours = right.images[0].to_rgba(right.images[0].get_array())
    assert (colours[:, :3, 3] == 0).all()  # NaN is not drawn
    picture = pixels(figure)
    assert min(near(picture, style.LAND[end]) for end in (0, -1)) > 100


def test_bandwidth_marks_the_smallest_error():
    figure = plotting.bandwidth([1.0, 2.0, 4.0], [3.0, 2.0, 2.5], "")
    curve, best = figure.axes[0].lines
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([2.0], [2.0])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["1", "2", "4"]
    assert list(curve.get_ydata()) == [3.0, 2.0, 2.5]
    assert near(pixels(figure), style.PREDICTION) > 20


def test_png_is_the_same_every_time(data):
    first, second = (
        plotting.png(plotting.regression(*data, prediction=data.y_truth, title="")) for _ in range(2)
    )
    assert first == second


def test_figures_leave_the_backend_and_pyplot_alone():
    code = (
        "import sys; from nwfast import plotting; assert 'matplotlib' not in sys.modules; "
        "plotting.png(plotting.loss([1.0, 2.0], '')); print('matplotlib.pyplot' in sys.modules)"
    )
    # A display that does not exist and a backend that needs one.
    environment = {**os.environ, "MPLBACKEND": "TkAgg", "DISPLAY": ":99"}
    done = fresh.run(code, environment=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
