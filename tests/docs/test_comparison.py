"""What docs/comparison.md says of others is so, of the versions that it names, where these are installed."""

import importlib.metadata
import inspect
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

import nwfast

PAGE = (ROOT / "docs" / "comparison.md").read_text()
RANDOM = np.random.default_rng(0)
X = np.sort(RANDOM.uniform(0, 10, 200))
Y = np.sin(X) + 0.3 * RANDOM.standard_normal(200)
H = 0.3
FAR = X[-1] + 50 * H
OF_NAN = np.where(np.arange(200) == 100, np.nan, Y)
AT = np.linspace(0, 10, 20)


def peer(name):
    """The module, in the version that the page names."""
    module = pytest.importorskip(name)
    version = importlib.metadata.version(name)
    if f"{name} {version}".lower() not in PAGE.lower():
        pytest.skip(f"the page is of another version of {name} than {version}")
    return module


def ours(fit, x, h):
    return fit(*map(torch.from_numpy, (np.atleast_1d(x), X, Y)), 1 / h).numpy()


def row(name):
    """The cells of a row of the page, by column."""
    header = next(line for line in PAGE.splitlines() if line.startswith("| |") and "statsmodels" in line)
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
    cells = [[cell.strip() for cell in part.strip("|").split("|")] for part in (header, line)]
    return {column.split(" ")[0]: cell for column, cell in zip(*cells, strict=True)}


def test_the_rows_are_read():
    assert row("features")["hessband"] == "one"
    assert row("local line there") == {
        "": "local line there",
        "nwfast": "the line goes on",
        "statsmodels": "0",
        "hessband": "",
        "kernelsmooth": "the line goes on",
    }


def test_ours():
    assert ours(nwfast.nadaraya_watson, X[-1] + 1e4, H) == pytest.approx(Y[-1:])
    near, far = (ours(nwfast.local_linear, X[-1] + distance * H, H) for distance in (49, 50))
    assert abs(far) > abs(near) > 2
    with pytest.raises(ValueError, match="NaN"):
        nwfast.NadarayaWatsonRegressor(H).fit(X[:, None], OF_NAN)
    assert nwfast.NadarayaWatsonRegressor(H, missing="drop").fit(X[:, None], OF_NAN).n_dropped_ == 1
    model = nwfast.LocalLinearRegressor(H).fit(X[:, None], np.stack([Y, -Y], 1), sample_weight=np.ones(200))
    assert model.predict(AT[:, None]).shape == (20, 2)
    assert {"loo", "gcv", "aicc"} < set(re.findall(r'"(\w+)"', nwfast.select_bandwidth.__doc__))


def test_statsmodels():
    peer("statsmodels")
    from statsmodels.nonparametric.kernel_regression import KernelReg

    def reg(y=Y, kind="lc", types="c", x=X, **options):
        return KernelReg(y, x, types, **{"reg_type": kind, "bw": [H] * len(types)} | options)

    assert reg().fit(AT)[0] == pytest.approx(ours(nwfast.nadaraya_watson, AT, H))
    assert reg(kind="ll").fit(AT)[0] == pytest.approx(ours(nwfast.local_linear, AT, H))
    assert inspect.signature(KernelReg).parameters["reg_type"].default == "ll"
    with np.errstate(all="ignore"):
        assert np.isnan(reg().fit([FAR])[0]).all()
    assert reg(kind="ll").fit([FAR])[0] == 0
    assert np.isnan(reg(OF_NAN).fit(AT)[0]).all()
    assert isinstance(reg().fit(AT)[0], np.ndarray)
    both = np.stack([X, np.arange(200) % 3], 1)
    assert all(np.isfinite(reg(x=both, types=f"c{kind}").fit()[0]).all() for kind in "ou")
    with pytest.raises(ValueError, match="reshape"):
        reg(np.stack([Y, Y], 1))
    small = [KernelReg(Y[::8], X[::8], "c", bw=name).bw[0] for name in ("cv_ls", "aic")]
    assert min(small) > 0
    assert len(reg().fit(AT)) == 2 and not [name for name in dir(reg()) if "std" in name or "band" in name]
    parameters = inspect.signature(KernelReg).parameters
    assert not [name for name in parameters if "weight" in name]
    assert "boot" in inspect.getsource(KernelReg.sig_test)


def test_hessband():
    hessband = peer("hessband")
    assert hessband.nw_predict(X, Y, AT, H) == pytest.approx(ours(nwfast.nadaraya_watson, AT, H))
    assert hessband.nw_predict(X, Y, np.array([FAR]), H) == pytest.approx(Y.mean())
    assert np.isnan(hessband.nw_predict(X, OF_NAN, AT, H)).all()
    assert isinstance(hessband.nw_predict(X, Y, AT, H), np.ndarray)
    assert not [name for name in dir(hessband) if re.search("test|linear|grad", name)]
    assert np.isfinite(hessband.nw_predict(X, Y, AT, H, kernel="epanechnikov")).all()
    with pytest.raises(ValueError, match=r"broadcast|size|shape"):
        hessband.nw_predict(np.stack([X, X], 1), Y, np.stack([AT, AT], 1), H)
    parameters = inspect.signature(hessband.select_nw_bandwidth).parameters
    assert parameters["folds"].default == 5
    assert set(inspect.signature(hessband.nw_predict).parameters) == {
        "X_train",
        "y_train",
        "X_test",
        "h",
        "kernel",
    }


def test_kernelsmooth():
    kernelsmooth = peer("kernelsmooth")
    inputs, at = X[:, None], np.append(AT, FAR)[:, None]
    mean = kernelsmooth.KernelRegression(H).fit(inputs, Y)
    line = kernelsmooth.LocalLinearRegression(H).fit(inputs, Y)
    h = H * X.std(ddof=1)  # it takes the bandwidth in standard deviations
    assert mean.predict(at) == pytest.approx(ours(nwfast.nadaraya_watson, at[:, 0], h))
    assert line.predict(at) == pytest.approx(ours(nwfast.local_linear, at[:, 0], h), rel=1e-5)
    for name in ("lscv", "gcv", "aicc"):
        assert kernelsmooth.KernelRegression(name).fit(inputs, Y).predict(inputs).shape == (200,)
    assert mean.predict(at, return_grad=True)[1].shape == (21, 1)
    assert np.isnan(kernelsmooth.KernelRegression(H).fit(inputs, OF_NAN).predict(at)).all()
    with pytest.raises(ValueError, match="incompatible"):
        kernelsmooth.KernelRegression(H).fit(inputs, np.stack([Y, Y], 1))
    assert list(inspect.signature(mean.fit).parameters) == ["X", "Y"]
    assert isinstance(mean.predict(at), np.ndarray) and not [name for name in dir(mean) if "test" in name]
    assert "std" not in " ".join([*dir(mean), *inspect.signature(mean.predict).parameters])


def test_fast_sums():
    peer("finufft")
    kdepy = peer("KDEpy")
    from benchmarks.peers import binned, nufft

    assert len(kdepy.FFTKDE._available_kernels) == 9
    key, at = X[:, None], np.array([[5.0], [X[-1] + 9 * H]])
    right = ours(nwfast.nadaraya_watson, at[:, 0], H)
    for found in (nufft.ratio(at, key, Y, 1 / H, 1), binned.smooth(at, key, Y, 1 / H)):
        assert found[0] == pytest.approx(right[0], abs=1e-3)
        assert not abs(found[1] / right[1] - 1) < 0.1
    exact = nwfast.nadaraya_watson(
        *map(torch.from_numpy, (at[:, 0], X, Y)), 1 / H, method="dense", backend="reference"
    )
    assert right == pytest.approx(exact.numpy(), rel=1e-12)
