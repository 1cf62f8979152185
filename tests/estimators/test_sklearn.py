"""scikit-learn's contract: its own checks, all of them, and its tools around the estimators."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import nwfast

ESTIMATORS = [nwfast.NadarayaWatsonRegressor, nwfast.LocalLinearRegressor]
OPTIONS = [
    dict(),
    dict(missing="drop", bandwidth="silverman"),
    dict(bandwidth=0.8),
    dict(bandwidth="scott", variance="local"),
]


def every_check():
    for estimator in ESTIMATORS:
        for options in OPTIONS:
            # All with the bandwidth given. Both classes share what options change, and a search among lines takes ten
            # times what it takes among means: of means every other one with other options, in turns.
            lines, given = estimator is nwfast.LocalLinearRegressor, options == dict(bandwidth=0.8)
            for i, (instance, check) in enumerate(estimator_checks_generator(estimator(**options))):
                long = not given and (lines or (i + OPTIONS.index(options) // 3) % 2)
                marks = [pytest.mark.full] * bool(long)
                name = "-".join(map(str, (estimator.__name__, *options.values(), check.func.__name__)))
                yield pytest.param(instance, check, id=name, marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("instance", "check"), list(every_check()))
def test_check_estimator(instance, check, monkeypatch):
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")  # without it scikit-learn skips its check of array API inputs
    check(instance)


@pytest.fixture
def data():
    random = np.random.default_rng(0)
    x = random.random((200, 2))
    return x, np.sin(7 * x[:, 0]) + 2 + 0.1 * random.standard_normal(200)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pipeline_search_and_scores(estimator, data):
    x, y = data
    search = GridSearchCV(
        make_pipeline(StandardScaler(), estimator(bandwidth=1.0)),
        {f"{estimator.__name__.lower()}__bandwidth": [0.1, 0.3, 3.0, "scott"]},
        cv=3,
    ).fit(x, y)
    assert search.best_params_[f"{estimator.__name__.lower()}__bandwidth"] in (0.1, 0.3, "scott")
    assert cross_val_score(estimator(bandwidth=0.1), x, y, cv=3).mean() > 0.5  # of 1, and 0 is the mean of y
    assert clone(estimator(bandwidth=[0.1, 0.2])).get_params()["bandwidth"] == [0.1, 0.2]
    log = TransformedTargetRegressor(estimator(), func=np.log, inverse_func=np.exp).fit(x, y)
    assert log.score(x, y) > 0.9


def test_pandas_in_a_transformed_target(data):
    """scikit-learn reshapes what comes out: arrays on demand."""
    pandas = pytest.importorskip("pandas")
    x, y = data
    model = nwfast.NadarayaWatsonRegressor(bandwidth=0.1).set_output(predict="default")
    log = TransformedTargetRegressor(model, func=np.log, inverse_func=np.exp)
    frame = pandas.DataFrame(x, columns=["a", "b"])
    assert log.fit(frame, y).predict(frame).shape == (200,)


def test_weights_are_routed(data):
    import sklearn

    x, y = data
    weight = np.random.default_rng(1).integers(0, 3, len(y))
    with sklearn.config_context(enable_metadata_routing=True):
        model = nwfast.NadarayaWatsonRegressor(bandwidth=0.1).set_fit_request(sample_weight=True)
        scaler = StandardScaler(with_mean=False, with_std=False).set_fit_request(sample_weight=False)
        piped = make_pipeline(scaler, model)
        piped.fit(x, y, sample_weight=weight)
    alone = nwfast.NadarayaWatsonRegressor(bandwidth=0.1).fit(x, y, weight)
    np.testing.assert_array_equal(piped.predict(x), alone.predict(x))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_html_pickle_and_names(estimator, data):
    pandas = pytest.importorskip("pandas")
    x, y = data
    frame = pandas.DataFrame(x, columns=["a", "b"])
    model = estimator(bandwidth=[0.1, 0.4]).fit(frame, y)
    assert estimator.__name__ in model._repr_html_()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(frame), model.predict(frame))
    assert list(model.feature_names_in_) == ["a", "b"]
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame[["b", "a"]])
