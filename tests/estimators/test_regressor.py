"""The two estimators: forms of the data, missing values, standard errors, bands, slopes, files, messages."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import every_other

import nwfast
from nwfast.backends.messages import how_to_install
from nwfast.estimators.storage import load

from . import dense

ESTIMATORS = [nwfast.NadarayaWatsonRegressor, nwfast.LocalLinearRegressor]
pandas = pytest.importorskip("pandas")


def data(n=150, features=2, seed=0):
    random = np.random.default_rng(seed)
    x = random.random((n, features))
    return x, np.sin(7 * x[:, 0]) + x[:, -1] + 0.2 * random.standard_normal(n)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fit_and_what_it_reports(estimator):
    x, y = data()
    model = estimator(bandwidth=[0.2, 0.3]).fit(x, y)
    hat = dense.weights(x, x, np.array([0.2, 0.3]), model._degree)[0]
    np.testing.assert_allclose(model.predict(x), hat @ y, rtol=1e-9)
    assert model.effective_dof_ == pytest.approx(np.trace(hat), rel=1e-9)
    assert model.r2_ == pytest.approx(model.score(x, y), rel=1e-9)
    residual = dense.leave_one_out(x, y[:, None], np.array([0.2, 0.3]), model._degree)[0]
    assert model.loss_ == pytest.approx((residual**2).mean(), rel=1e-9)
    assert model.selection_ is None and model.n_dropped_ == 0 and model.n_observations_ == 150
    json.dumps(model.report_, allow_nan=False)
    for part in ("150", "0.2", "0.3", f"{model.r2_:.4f}", "given"):
        assert part in model.summary()
    query = np.array([[0.5, 0.5], [1.2, 0.1]])
    rows, slopes = dense.weights(query, x, np.array([0.2, 0.3]), model._degree)
    fit, std, slope = model.predict(query, return_std=True, return_slope=True)
    np.testing.assert_allclose(fit, rows @ y, rtol=1e-9)
    np.testing.assert_allclose(slope, slopes @ y, rtol=1e-7)
    variance = model.report_["residual_std"][0] ** 2
    np.testing.assert_allclose(std, np.sqrt((rows**2).sum(1) * variance), rtol=1e-7)
    np.testing.assert_allclose(model.predict(query, return_slope=True)[1], slope)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_slopes_are_derivatives(estimator):
    """Of the local mean its derivative; of a line its slope."""
    x, y = data()
    model = estimator(bandwidth=0.2).fit(x, 3 * x[:, 0] - x[:, 1] if estimator is ESTIMATORS[1] else y)
    query = np.array([[0.4, 0.6], [0.1, 0.9]])
    slope = model.predict(query, return_slope=True)[1]
    step = 1e-5 * np.eye(2)
    ends = [(model.predict(query + part) - model.predict(query - part)) / 2e-5 for part in step]
    np.testing.assert_allclose(slope, np.stack(ends, 1), rtol=1e-5)
    effects = model.marginal_effects(query)
    np.testing.assert_allclose(effects["slope"], slope)
    assert (
        effects["std"].shape == (2, 2) and effects["mean"].shape == (2,) and (effects["mean_std"] > 0).all()
    )
    everywhere = model.marginal_effects()
    np.testing.assert_allclose(everywhere["slope"].mean(0), everywhere["mean"], rtol=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_data_frames(estimator):
    x, y = data()
    expected = estimator(bandwidth=0.2).fit(x, y)
    frame = pandas.DataFrame(x, columns=["a", "b"], index=np.arange(150) + 1000)
    model = estimator(bandwidth=0.2).fit(frame, pandas.Series(y, index=frame.index, name="height"))
    found, slope = model.predict(frame[10:20], return_slope=True)
    assert (
        isinstance(found, pandas.Series)
        and found.name == "height"
        and list(found.index) == list(frame.index[10:20])
    )
    assert list(slope.columns) == ["a", "b"]
    np.testing.assert_allclose(found, expected.predict(x[10:20]))
    assert isinstance(model.set_output(predict="default").predict(frame), np.ndarray)
    several = estimator(bandwidth=0.2).fit(frame, pandas.DataFrame({"u": y, "v": -y}, index=frame.index))
    assert list(several.predict(frame).columns) == ["u", "v"]
    assert isinstance(several.set_output(predict="pandas").predict(frame.to_numpy()[:3]), pandas.DataFrame)
    assert "height" in model.report_["outputs"] and model.report_["features"] == ["a", "b"]
    with pytest.raises(ValueError, match="predict must be one of"):
        model.set_output(predict="arrow")


def test_polars():
    polars = pytest.importorskip("polars")
    x, y = data()
    frame = polars.DataFrame({"a": x[:, 0], "b": x[:, 1], "y": y})
    model = nwfast.NadarayaWatsonRegressor(bandwidth=0.2).fit(frame[["a", "b"]], frame["y"])
    found = model.predict(frame[["a", "b"]])
    assert isinstance(found, polars.Series) and found.name == "y"
    np.testing.assert_allclose(
        found.to_numpy(), nwfast.NadarayaWatsonRegressor(bandwidth=0.2).fit(x, y).predict(x)
    )
    gaps = frame.with_columns(
        polars.when(polars.col("a") > 0.9).then(None).otherwise(polars.col("a")).alias("a")
    )
    model = nwfast.NadarayaWatsonRegressor(bandwidth=0.2, missing="drop").fit(gaps[["a", "b"]], gaps["y"])
    assert model.n_dropped_ == gaps["a"].null_count() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tensors(estimator, dtype):
    x, y = (torch.from_numpy(part).to(dtype) for part in data())
    model = estimator(bandwidth=0.2).fit(x, y)
    expected = estimator(bandwidth=0.2).fit(x.double().numpy(), y.double().numpy())
    query = x[:9].clone().requires_grad_()
    found = model.predict(query)
    assert found.dtype == dtype and found.device == x.device
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 2e-2}[dtype]
    np.testing.assert_allclose(
        found.detach().double(), expected.predict(x[:9].double().numpy()), rtol=tolerance, atol=tolerance
    )
    found.float().sum().backward()
    slope = expected.predict(x[:9].double().numpy(), return_slope=True)[1]
    if estimator is ESTIMATORS[0]:  # of a local line beta is not the derivative of the fit
        np.testing.assert_allclose(query.grad.double(), slope, rtol=20 * tolerance, atol=20 * tolerance)
    with torch.no_grad():
        assert not model.predict(query).requires_grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_missing_values(estimator):
    x, y = data()
    weight = np.random.default_rng(1).random(150) + 0.5
    holes = x.copy(), y.copy(), weight.copy()
    holes[0][3, 1] = holes[1][7] = holes[2][9] = np.nan
    kept = np.setdiff1d(np.arange(150), [3, 7, 9])
    model = estimator(bandwidth=0.2, missing="drop").fit(*holes)
    expected = estimator(bandwidth=0.2).fit(x[kept], y[kept], weight[kept])
    assert model.n_dropped_ == 3 and "3 rows" in model.summary()
    query = x[:4].copy()
    query[2, 0] = np.nan
    for found, right in zip(
        model.predict(query, return_std=True, return_slope=True),
        expected.predict(x[:4], return_std=True, return_slope=True),
        strict=True,
    ):
        assert np.isnan(found[2]).all()
        np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(right, 2, 0))
    lower, upper = model.confidence_band(query)
    assert np.isnan(lower[2]) and np.isnan(upper[2]) and (lower < upper)[[0, 1, 3]].all()
    with pytest.raises(ValueError, match="NaN"):
        estimator(bandwidth=0.2).fit(*holes[:2])
    with pytest.raises(ValueError, match="no row is left"):
        estimator(bandwidth=0.2, missing="drop").fit(np.full((3, 1), np.nan), np.ones(3))
    with pytest.raises(ValueError, match="infinity"):
        estimator(bandwidth=0.2, missing="drop").fit(np.array([[1.0], [np.inf]]), np.ones(2))


@every_other("estimator, bandwidth", ESTIMATORS, ["loo", "gcv", "aicc", "scott", 0.2])
def test_weights_that_count(estimator, bandwidth):
    x, y = data(60, 1)
    counts = np.random.default_rng(2).integers(0, 4, 60)
    weighted = estimator(bandwidth=bandwidth).fit(x, y, counts)
    repeated = estimator(bandwidth=bandwidth).fit(np.repeat(x, counts, 0), np.repeat(y, counts))
    query = np.linspace(-0.2, 1.2, 9)[:, None]
    for one, other in zip(
        weighted.predict(query, return_std=True, return_slope=True),
        repeated.predict(query, return_std=True, return_slope=True),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9)
    for name in ("loss_", "effective_dof_", "r2_", "n_observations_"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_data_are_copied(estimator):
    x, y = data()
    model = estimator(bandwidth=0.2).fit(x, y)
    before = model.predict(x[:5].copy())
    query = x[:5].copy()
    x[:], y[:] = 0, 0
    np.testing.assert_array_equal(model.predict(query), before)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bandwidth", ["loo", [0.2, 0.4]])
@pytest.mark.parametrize("outputs", [1, 2])
def test_files(estimator, bandwidth, outputs, tmp_path):
    x, y = data(80)
    frame = pandas.DataFrame(x, columns=["a", "b"])
    model = estimator(bandwidth=bandwidth, variance="local").fit(
        frame, y if outputs == 1 else np.stack([y, -y], 1)
    )
    model.save(tmp_path / "model")
    for found in (
        load(tmp_path / "model"),
        estimator.load(tmp_path / "model"),
        pickle.loads(pickle.dumps(model)),
    ):
        assert type(found) is estimator and found.get_params() == model.get_params()
        for one, other in zip(
            found.predict(frame, return_std=True, return_slope=True),
            model.predict(frame, return_std=True, return_slope=True),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
        assert found.summary() == model.summary() and found.report_ == model.report_
        assert list(found.feature_names_in_) == ["a", "b"]
        if bandwidth == "loo":
            np.testing.assert_array_equal(found.selection_.path[0], model.selection_.path[0])
            assert found.selection_.bandwidth.tolist() == model.selection_.bandwidth.tolist()
    with pytest.raises(ValueError, match="not a"):
        ESTIMATORS[estimator is ESTIMATORS[0]].load(tmp_path / "model")


def test_files_that_are_none(tmp_path):
    (tmp_path / "text").write_text("a,b\n1,2\n")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "empty").touch()
    with open(tmp_path / "pickle", "wb") as file:
        pickle.dump({"a": 1}, file)
    for name in ("text", "other.npz", "array.npy", "empty", "pickle"):
        with pytest.raises(ValueError, match="is no model that nwfast saved"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    model = nwfast.NadarayaWatsonRegressor(bandwidth=1.0).fit([[0.0], [1.0]], [0.0, 1.0])
    model.save(tmp_path / "new")
    with np.load(tmp_path / "new") as file:
        arrays = dict(file)
    text = json.loads(str(arrays["text"])) | {"version": 99}
    np.savez(tmp_path / "new.npz", **(arrays | {"text": np.array(json.dumps(text))}))
    with pytest.raises(ValueError, match="newer format"):
        load(tmp_path / "new.npz")


# The search for a local line's bandwidth costs ten times that for a mean's.
@pytest.mark.parametrize(
    ("estimator", "anew"),
    [
        (ESTIMATORS[0], True),
        (ESTIMATORS[1], False),
        pytest.param(ESTIMATORS[1], True, marks=pytest.mark.full),
    ],
)
def test_coverage_of_bands(estimator, anew):
    """Pointwise, over simulations with a bandwidth that is found anew in each, or in the first."""
    random = np.random.default_rng(5)
    places = np.linspace(0.1, 0.9, 17)[:, None]
    for bandwidth, bias, low, high in (("loo", True, 0.89, 0.98), (0.04, False, 0.91, 0.98)):
        hits = []
        for _ in range(50):
            x = random.random((250, 1))
            y = np.sin(4 * x[:, 0]) + 0.4 * random.standard_normal(250)
            model = estimator(bandwidth=bandwidth).fit(x, y)
            bandwidth = bandwidth if anew else model.bandwidth_
            lower, upper = model.confidence_band(places, bias=bias)
            truth = np.sin(4 * places[:, 0])
            hits.append(((lower <= truth) & (truth <= upper)).mean())
        # 50 simulations of some 6 places that are independent: 95 percent is known to 1.3.
        assert low <= np.mean(hits) <= high, (bandwidth, np.mean(hits))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_local_variance_follows_the_noise(estimator):
    random = np.random.default_rng(6)
    x = random.random((4000, 1))
    y = x[:, 0] * 3 * random.standard_normal(4000)
    places = np.array([[0.2], [0.8]])
    constant, local = (
        estimator(bandwidth=0.1, variance=variance).fit(x, y).predict(places, return_std=True)[1]
        for variance in ("constant", "local")
    )
    assert 0.9 < constant[1] / constant[0] < 1.1 and 3 < local[1] / local[0] < 5.5


def test_mean_effect_covers_the_truth():
    random = np.random.default_rng(7)
    hits = []
    for _ in range(60):
        x = random.random((200, 1))
        y = 2 * x[:, 0] + 0.3 * random.standard_normal(200)
        effects = nwfast.LocalLinearRegressor(bandwidth=0.2).fit(x, y).marginal_effects()
        hits.append(abs(effects["mean"][0] - 2) < 1.96 * effects["mean_std"][0])
    assert np.mean(hits) > 0.85  # of 60 with probability 0.95: less has a chance of 0.003


def test_more_observations_than_a_float32_index_needs():
    x, y = data(3000, 1)
    model = nwfast.NadarayaWatsonRegressor().fit(x, y)
    assert model._state._index is None
    first = model.predict(x[:7])
    assert model._state._index is not None
    np.testing.assert_array_equal(model.predict(x[:7]), first)


def test_bandwidth_curve():
    x, y = data(100, 1)
    model = nwfast.NadarayaWatsonRegressor().fit(x, y)
    bandwidths, losses = model.bandwidth_curve([0.5, 1.0, 2.0])
    assert (
        bandwidths[1] == model.bandwidth_
        and losses[1] == pytest.approx(model.loss_)
        and losses[1] == losses.min()
    )
    with pytest.raises(ValueError, match="criterion must be one of"):
        model.bandwidth_curve([1.0], "cv")


@pytest.mark.parametrize(
    ("options", "change", "error", "message"),
    [
        (
            dict(bandwidth="cv"),
            {},
            ValueError,
            "bandwidth must be a number, one for each feature, or one of 'loo'",
        ),
        (dict(bandwidth=0.0), {}, ValueError, "bandwidth must be above 0 and finite"),
        (dict(bandwidth=-1.0), {}, ValueError, "bandwidth must be above 0 and finite"),
        (dict(bandwidth=[1.0, 2.0, 3.0]), {}, ValueError, "one for each of the 2 features"),
        (dict(bandwidth=None), {}, TypeError, "bandwidth must be a number, a sequence or a string"),
        (dict(missing="mean"), {}, ValueError, "missing must be 'raise' or 'drop'"),
        (dict(variance="white"), {}, ValueError, "variance must be 'constant' or 'local'"),
        ({}, dict(sample_weight=-np.ones(150)), ValueError, "must not be negative"),
        ({}, dict(y=np.ones(149)), ValueError, "must be of the same n"),
        ({}, dict(y=np.ones((150, 2, 2))), ValueError, "dim 3|y must have shape"),
        ({}, dict(X=np.ones(150)), ValueError, "Reshape your data"),
        ({}, dict(X=np.array([["a", "b"]] * 150)), ValueError, "could not convert string to float"),
    ],
)
def test_bad_input(options, change, error, message):
    x, y = data()
    with pytest.raises(error, match=message):
        nwfast.NadarayaWatsonRegressor(**options).fit(**(dict(X=x, y=y) | change))


def test_one_observation():
    with pytest.raises(ValueError, match="n_samples = 1"):
        nwfast.NadarayaWatsonRegressor().fit([[1.0]], [2.0])
    model = nwfast.NadarayaWatsonRegressor(bandwidth=1.0).fit([[1.0]], [2.0])
    assert model.predict([[5.0]]) == 2 and model.effective_dof_ == 1
    fit, std = model.predict([[5.0]], return_std=True)
    assert fit == 2 and np.isnan(std)
    assert "NaN" not in model.summary()
    same = nwfast.LocalLinearRegressor().fit([[1.0], [1.0], [1.0]], [1.0, 2.0, 3.0])
    fit, std = same.predict([[1.0]], return_std=True)
    assert fit == 2 and std[0] == pytest.approx(np.sqrt(1 / 3))


def test_without_scikit_learn(monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("nwfast.estimators")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(how_to_install("estimators"))):
        nwfast.LocalLinearRegressor  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Regressor'"):
        nwfast.Regressor  # noqa: B018
    assert {"select_bandwidth", "NadarayaWatsonRegressor"} <= set(dir(nwfast))
