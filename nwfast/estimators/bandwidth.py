"""`select_bandwidth`: the bandwidth of least cross-validation, of arrays and tensors."""

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.optimize  # noqa: F401, that it is missing is said here, and that no call waits for its import
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from . import CRITERIA, RULES
from .frames import to_tensor
from .selection import BandwidthSelection, select
from .sites import sites_of

_Bandwidths = NDArray[np.float64]


def select_bandwidth(
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    *,
    criterion: str = "loo",
    degree: int = 0,
    key_weight: ArrayLike | Tensor | None = None,
    bounds: tuple[ArrayLike, ArrayLike] | None = None,
    progress: bool | None = None,
) -> BandwidthSelection:
    r"""The bandwidth of a regression of y on x, one for each feature, that minimises a criterion.

    .. math:: h^* = \arg\min_h \frac1n \sum_i (\hat y_{-i}(h) - y_i)^2, \qquad h = 1 / w,

    is that of ``criterion="loo"``, with the fit to all observations but i, as in `leave_one_out_loss`.

    Parameters
    ----------
    x : array or Tensor
        Observed inputs, (n,) or (n, D), finite.
    y : array or Tensor
        Observed outputs, (n,) or (n, C), finite. Several outputs share the bandwidth.
    criterion : {"loo", "gcv", "aicc", "silverman", "scott"}
        "loo": leave-one-out squared error. "gcv": generalised cross-validation, sigma^2 / (1 - tr H / n)^2. "aicc":
        log sigma^2 + 1 + 2 (tr H + 1) / (n - tr H - 2), the corrected Akaike criterion. sigma^2 is the mean squared
        residual and H the hat matrix, whose trace is exact. The rules of thumb look at x alone: "scott" is
        s n^(-1/(D + 4)), with the standard deviation s of each feature, "silverman" that times
        ((D + 2) / 4)^(-1/(D + 4)).
    degree : {0, 1}
        0 for `nadaraya_watson`, 1 for `local_linear`.
    key_weight : array or Tensor, optional
        Weights a_i >= 0, (n,). Whole numbers are counts: an observation of weight 3 is three equal ones, of which one
        is left out at a time. Others are precisions, the inverse of a variance up to a factor, and an observation is
        left out whole. Divide whole numbers that are no counts by their mean.
    bounds : (lower, upper), optional
        Of the bandwidths, numbers or (D,). Default: from half of the tenth percentile of the gaps between neighbours,
        feature by feature, to ten times the range.
    progress : bool, optional
        Show a progress bar (tqdm); by default on a terminal, for selections of more than two seconds.

    Returns
    -------
    BandwidthSelection
        Its `bandwidth` has the form of a row of x. Where the minimum lies on a bound, `at_bound` says so for each
        feature and `note` why, and a UserWarning is given if that bound is the lower one or all features lie on the
        upper one. Deterministic: the same data give the same bandwidth.

    Raises
    ------
    TypeError, ValueError
        Not numbers, not finite, shapes that do not fit, less than two observations, unknown criterion or degree.

    Notes
    -----
    The scan has steps of a factor 1.3 with one feature, where a minimum that is narrower can be missed. A feature that
    is constant cannot matter, and gets the bandwidth 1. Time: some 60 to 100 evaluations of the criterion, of more
    than 65,536 observations (with two features 8,192, with more 2,048) most of them on a sample.

    References
    ----------
    Hardle and Marron (1985), "Optimal Bandwidth Selection in Nonparametric Regression Function Estimation"; Craven and
    Wahba (1979), "Smoothing Noisy Data with Spline Functions"; Hurvich, Simonoff and Tsai (1998), "Smoothing Parameter
    Selection in Nonparametric Regression Using an Improved Akaike Information Criterion"; Scott (1992), "Multivariate
    Density Estimation".

    Examples
    --------
    >>> import numpy as np, nwfast
    >>> x = np.linspace(0, 10, 200)
    >>> y = np.sin(x) + 0.2 * np.random.default_rng(0).standard_normal(200)
    >>> selection = nwfast.select_bandwidth(x, y)
    >>> 0.1 < float(selection) < 0.5
    True
    """
    if criterion not in (*CRITERIA, *RULES):
        raise ValueError(
            f"criterion must be one of {', '.join(map(repr, (*CRITERIA, *RULES)))}, got {criterion!r}"
        )
    if degree not in (0, 1):
        raise ValueError(f"degree must be 0 or 1, got {degree!r}")
    inputs, outputs, weight = _tensors(x, y, key_weight)
    limits = None if bounds is None else _given_bounds(bounds, inputs.shape[1])
    found = select(sites_of(inputs, outputs, weight), criterion, degree, limits, progress)
    bandwidth: Any = np.asarray(found.bandwidth)
    if isinstance(x, Tensor):
        bandwidth = torch.as_tensor(bandwidth, dtype=inputs.dtype, device=x.device)
    single = (x.ndim if isinstance(x, Tensor) else np.ndim(x)) == 1
    return replace(found, bandwidth=bandwidth[0] if single else bandwidth)


def _tensors(x: Any, y: Any, weight: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """X (n, D), y (n, C) and weights (n,) of one floating dtype, checked."""
    found = []
    for name, given in (("x", x), ("y", y), ("key_weight", weight)):
        if given is None and name == "key_weight":
            break
        tensor = given.detach() if isinstance(given, Tensor) else _from_array(name, given)
        if tensor.is_complex():
            raise TypeError(f"{name} must be real, got {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity (leave such observations out)")
        found.append(tensor)
    double = any(part.dtype not in (torch.float32, torch.float16, torch.bfloat16) for part in found[:2])
    dtype = torch.float64 if double else torch.float32
    inputs, outputs = (part.to(dtype) for part in found[:2])
    weights = found[2].to(dtype) if len(found) == 3 else None
    if inputs.ndim not in (1, 2) or outputs.ndim not in (1, 2):
        raise ValueError(
            "x must have shape (n,) or (n, D) and y (n,) or (n, C), "
            f"got {tuple(inputs.shape)} and {tuple(outputs.shape)}"
        )
    count = len(inputs)
    if len(outputs) != count or (weights is not None and weights.shape != (count,)):
        shapes = [tuple(part.shape) for part in found]
        raise ValueError(f"x, y and key_weight must be of the same n, got {', '.join(map(str, shapes))}")
    if count == 0 or inputs.shape[-1] == 0:
        raise ValueError(f"x must not be empty, got {tuple(inputs.shape)}")
    if weights is not None and not bool((weights >= 0).all() and (weights > 0).any()):
        raise ValueError("key_weight must not be negative, and not all weights zero")
    inputs = inputs.reshape(count, -1)
    return inputs, outputs.reshape(count, -1), weights


def _from_array(name: str, given: Any) -> Tensor:
    array = np.asarray(given)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    return to_tensor(array)


def _given_bounds(bounds: tuple[ArrayLike, ArrayLike], features: int) -> tuple[_Bandwidths, _Bandwidths]:
    lower, upper = (np.broadcast_to(np.asarray(bound, dtype=np.float64), features).copy() for bound in bounds)
    if not (np.all(lower > 0) and np.all(lower <= upper) and np.all(np.isfinite(upper))):
        raise ValueError(f"bounds must be 0 < lower <= upper, both finite, got {bounds}")
    return lower, upper
