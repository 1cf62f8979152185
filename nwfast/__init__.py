"""Nadaraya-Watson kernel regression: attention pooling with a Gaussian kernel, without the (M, N) matrix."""

import os
import sys
from typing import TYPE_CHECKING, Any

# `nwfast --version` and `python -m nwfast --version` answer without the seconds that importing torch takes.
if [os.path.basename(word) for word in sys.orig_argv[-2:]] != ["nwfast", "--version"]:
    from . import backends
    from .functional import attention_weights, local_linear, nadaraya_watson
    from .index import KeyIndex
    from .leave_one_out import leave_one_out_loss
    from .nn import NWKernelRegression

if TYPE_CHECKING:
    from .estimators.bandwidth import BandwidthSelection, select_bandwidth
    from .estimators.regressor import LocalLinearRegressor, NadarayaWatsonRegressor

__version__ = "0.1.0"
__all__ = [
    "BandwidthSelection",
    "KeyIndex",
    "LocalLinearRegressor",
    "NWKernelRegression",
    "NadarayaWatsonRegressor",
    "attention_weights",
    "backends",
    "leave_one_out_loss",
    "local_linear",
    "nadaraya_watson",
    "select_bandwidth",
]

# What needs SciPy and scikit-learn is imported where it is first asked for.
_ESTIMATORS = {
    "BandwidthSelection": "bandwidth",
    "LocalLinearRegressor": "regressor",
    "NadarayaWatsonRegressor": "regressor",
    "select_bandwidth": "bandwidth",
}


def __getattr__(name: str) -> Any:
    module = _ESTIMATORS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        found = importlib.import_module(f".estimators.{module}", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("scipy", "sklearn"):
            raise
        from .backends.messages import how_to_install

        raise ModuleNotFoundError(
            f"nwfast.{name} needs SciPy and scikit-learn, and {error.name} is not installed: "
            + how_to_install("estimators"),
            name=error.name,
        ) from error
    return getattr(found, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
