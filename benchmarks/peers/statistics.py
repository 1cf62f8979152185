"""What statisticians use: kernelsmooth (Cython), statsmodels (NumPy) and hessband (NumPy), all in float64."""

import functools

import numpy as np
from torch import Tensor

from benchmarks.problems.workloads import Call, Data

from .own import rule_of_thumb
from .peer import Peer, missing


def _columns(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.numpy().astype(float)[:, None] for tensor in tensors]


def _kernelsmooth(given: Data) -> Call:
    from kernelsmooth import KernelRegression

    query, key, value = _columns(given.query, given.key, given.value)
    h = 1 / (float(given.w) * key.std(ddof=1))  # in units of the keys' standard deviation

    def call() -> tuple[np.ndarray]:
        return (KernelRegression(bandwidth=h, diag_cov=True).fit(key, value).predict(query),)

    return call


def _kernelsmooth_select(x: Tensor, y: Tensor) -> Call:
    from kernelsmooth import KernelRegression

    inputs, targets = _columns(x, y)

    def call() -> tuple[float]:
        model = KernelRegression(bandwidth="lscv", diag_cov=True).fit(inputs, targets)
        return (float(1 / (model.bandwidth[0] * inputs.std(ddof=1))),)

    return call


def _statsmodels(given: Data) -> Call:
    from statsmodels.nonparametric.api import KernelReg

    query, key, value = _columns(given.query, given.key, given.value)
    h = [1 / float(given.w)]
    return lambda: (KernelReg(value, key, "c", reg_type="lc", bw=h).fit(query)[0],)


def _statsmodels_select(x: Tensor, y: Tensor) -> Call:
    from statsmodels.nonparametric.api import KernelReg

    inputs, targets = _columns(x, y)
    return lambda: (float(1 / KernelReg(targets, inputs, "c", reg_type="lc", bw="cv_ls").bw[0]),)


def _hessband(given: Data) -> Call:
    from hessband import nw_predict

    query, key, value = (column[:, 0] for column in _columns(given.query, given.key, given.value))
    h = 1 / float(given.w)
    return lambda: (nw_predict(key, value, query, h),)


def _hessband_select(x: Tensor, y: Tensor) -> Call:
    from hessband import select_nw_bandwidth

    inputs, targets = (column[:, 0] for column in _columns(x, y))
    start = 1 / rule_of_thumb(x)
    return lambda: (float(1 / select_nw_bandwidth(inputs, targets, method="analytic", init_bandwidth=start)),)


PEERS = (
    Peer(
        name="kernelsmooth",
        about='`KernelRegression`, one thread; bandwidths by "lscv"',
        why_not=functools.cache(lambda: missing("kernelsmooth")),
        package="kernelsmooth",
        precision="float64",
        forward=_kernelsmooth,
        select=_kernelsmooth_select,
        most_features=1,
        one_channel=True,
        seconds_per_pair=1e-8,
    ),
    Peer(
        name="statsmodels",
        about='`KernelReg`, local constant; bandwidths by "cv_ls"',
        why_not=functools.cache(lambda: missing("statsmodels")),
        package="statsmodels",
        precision="float64",
        forward=_statsmodels,
        select=_statsmodels_select,
        most_features=1,
        one_channel=True,
        seconds_per_pair=5e-8,
    ),
    Peer(
        name="hessband",
        about="`nw_predict`; bandwidths by `select_nw_bandwidth` with its analytic Hessian and its five folds",
        why_not=functools.cache(lambda: missing("hessband")),
        package="hessband",
        precision="float64",
        forward=_hessband,
        select=_hessband_select,
        most_features=1,
        one_channel=True,
        bytes_per_pair=24,
        seconds_per_pair=2e-8,
    ),
)
