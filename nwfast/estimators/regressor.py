"""`NadarayaWatsonRegressor` and `LocalLinearRegressor`: scikit-learn estimators around the op.

One base class: the two differ in the degree of the local polynomial. What `fit` found is held as tensors on the device
of the data, by an object of its own (`_State`) that also keeps what predictions share.
"""

import math
import numbers
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import stdtrit
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import (
    _check_feature_names,
    _check_sample_weight,
    check_array,
    check_is_fitted,
    validate_data,
)
from torch import Tensor

from ..functional import local_linear, nadaraya_watson
from ..index import KeyIndex
from . import CRITERIA, RULES
from .bandwidth import BandwidthSelection, data_bounds, select
from .criteria import as_call, criterion_of, flat, in_sample
from .frames import OUTPUTS, names_of, to_output, to_tensor
from .inference import (
    Weights,
    bias_at,
    fit_errors,
    mean_slope,
    residual_variance,
    slope_errors,
    weights_at,
)
from .sites import Sites, sites_of

_MISSING = ("raise", "drop")
_VARIANCES = ("constant", "local")


class _State:
    """What a fit holds: sites, w, and what is computed when first asked for."""

    def __init__(self, sites: Sites, w: Tensor, degree: int, variance: str, residual_dof: float):
        self.sites, self.w, self.degree, self.residual_dof = sites, w, degree, residual_dof
        self.constant = variance == "constant"
        self._index: KeyIndex | None = None
        self._variance: Tensor | None = None

    def fit_at(self, query: Tensor) -> Tensor:
        """The fit (M, C) at query (M, D)."""
        sites = self.sites
        if not len(query):
            return query.new_zeros(0, sites.y.shape[1])
        x, y = as_call(sites.x, sites.y)
        at = flat(query)
        if self.degree == 1:
            fit = local_linear(at, x, y, self.w, key_weight=sites.key_weight)
        elif query.shape[1] <= 3:
            index = self._index
            if index is None:
                self._index = index = KeyIndex(x, y, key_weight=sites.key_weight)
            fit = index(at, self.w)
        else:
            fit = nadaraya_watson(at, x, y, self.w, key_weight=sites.key_weight)
        return fit.reshape(len(query), -1)

    def rows(self, query: Tensor, slopes: bool) -> Weights:
        return weights_at(query, self.sites, self.w, self.degree, False, slopes)

    def variance(self) -> Tensor:
        """Of an observation of weight 1, (1, C), or at each place, (S, C)."""
        found = self._variance
        if found is None:
            found = residual_variance(self.sites, self.w, self.degree, self.constant)
            self._variance = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_index": None}


class _KernelRegressor(RegressorMixin, BaseEstimator):
    """What both estimators have in common."""

    _degree: int

    def __init__(
        self,
        bandwidth: float | ArrayLike | str = "loo",
        *,
        missing: str = "raise",
        variance: str = "constant",
        progress: bool | None = None,
    ):
        self.bandwidth = bandwidth
        self.missing = missing
        self.variance = variance
        self.progress = progress

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Hold the data, and find the bandwidth where none is given.

        Parameters
        ----------
        X : array, table or Tensor of shape (n, D)
            Observed inputs.
        y : array, series, table or Tensor of shape (n,) or (n, outputs)
            Observed outputs.
        sample_weight : array or Tensor of shape (n,), optional
            Weights, not negative. Whole numbers are counts, others precisions: see `nwfast.select_bandwidth`.

        Returns
        -------
        self
        """
        if self.missing not in _MISSING:
            raise ValueError(f"missing must be 'raise' or 'drop', got {self.missing!r}")
        if self.variance not in _VARIANCES:
            raise ValueError(f"variance must be 'constant' or 'local', got {self.variance!r}")
        inputs, outputs, weight = self._training_data(X, y, sample_weight)
        names = names_of(y)
        single = outputs.ndim == 1
        self.n_dropped_ = 0
        if self.missing == "drop":
            kept = ~(inputs.isnan().any(1) | outputs.reshape(len(outputs), -1).isnan().any(1))
            if weight is not None:
                kept &= ~weight.isnan()
            self.n_dropped_ = int(len(kept) - kept.sum())
            if self.n_dropped_ == len(kept):
                raise ValueError(
                    f"no row is left: each of the {len(kept)} rows has a NaN in X, y or sample_weight"
                )
            if self.n_dropped_:
                inputs, outputs = inputs[kept], outputs[kept]
                weight = weight if weight is None else weight[kept]
        if weight is not None and not bool((weight >= 0).all() and (weight > 0).any()):
            raise ValueError("sample_weight must not be negative, and not all weights zero")
        self.n_outputs_ = 1 if single else outputs.shape[1]
        self.output_names_ = (
            names if names and len(names) == self.n_outputs_ else _default_names(self.n_outputs_)
        )
        self._single = single
        sites = sites_of(inputs, outputs.reshape(len(outputs), -1), weight)
        self.selection_ = found = self._select(sites)
        self.bandwidth_ = self._given(sites.x.shape[1]) if found is None else np.asarray(found.bandwidth)
        w = torch.as_tensor(1 / self.bandwidth_, dtype=sites.x.dtype, device=sites.x.device)
        squares, trace = in_sample(sites, w, self._degree)
        mass = sites.mass.double()
        centred = (sites.y.double() - (mass @ sites.y.double()) / mass.sum()).square()
        total = (mass.unsqueeze(-1) * centred).sum(0) + sites.unit.double() @ sites.within.double()
        ratio = torch.where(total > 0, squares.double() / total, torch.where(squares > 0, 1.0, 0.0))
        self.r2_ = 1 - float(ratio.mean())
        self.effective_dof_ = trace
        self.n_observations_ = round(float(sites.copies.sum()))
        self.loss_ = math.nan if found is None else found.loss
        if math.isnan(self.loss_) and self.n_observations_ > 1 and len(sites.x) > 1:
            with torch.no_grad():
                self.loss_ = float(criterion_of("loo", sites, w, self._degree))
        self._state = _State(sites, w, self._degree, self.variance, max(self.n_observations_ - trace, 1.0))
        self.report_ = self._report()
        return self

    def predict(self, X: Any, return_std: bool = False, return_slope: bool = False) -> Any:
        """The fit at X.

        Parameters
        ----------
        X : array, table or Tensor of shape (M, D)
            With ``missing="drop"`` rows with a NaN are NaN in the result.
        return_std : bool
            Also return the pointwise standard errors of the fit (not of new observations), in the unit of y.
        return_slope : bool
            Also return the slopes of the fit, (M, D) or (M, outputs, D), in the unit of y per unit of X. Those of
            `LocalLinearRegressor` are the fitted ones.

        Returns
        -------
        fit, or a tuple of fit, standard errors, slopes as asked for
            (M,) or (M, outputs), in the form of X: an array, a series or table with its index, or a tensor on its
            device, to whose gradient the fit is open if that is all that is asked for. See `set_output`.
        """
        query, missing = self._queries(X)
        state = self._state
        if not (return_std or return_slope):
            with torch.set_grad_enabled(query.requires_grad and torch.is_grad_enabled()):
                fit = state.fit_at(query)
            return self._output(_with_gaps(fit, missing), X)
        rows = state.rows(query, return_slope)
        results = [self._output(_with_gaps(rows.fit, missing), X)]
        if return_std:
            error = fit_errors(rows, state.sites, state.w, state.variance()).sqrt()
            results.append(self._output(_with_gaps(error, missing), X))
        if return_slope:
            results.append(self._slopes(_with_gaps(rows.slope, missing), X))
        return tuple(results)

    def confidence_band(self, X: Any, level: float = 0.95, bias: bool = True) -> tuple[Any, Any]:
        """Lower and upper end of pointwise confidence intervals for the regression function at X.

        fit -/+ t sqrt(std^2 + bias^2), with the quantile t of Student's distribution of n - tr H degrees of freedom.
        A bandwidth that is best for the fit has a bias of half the standard error, for which -/+ t std alone covers
        some 90 instead of 95 percent. The bias is estimated by smoothing the fit once more.

        Parameters
        ----------
        X : array, table or Tensor of shape (M, D)
            Where.
        level : float
            The probability with which each interval is to cover.
        bias : bool
            Allow for the bias; False for bands of the standard error alone, which cover where bandwidths are narrower
            than the best.

        Returns
        -------
        lower, upper
            In the form of X, as `predict` has it.

        Notes
        -----
        Intervals are pointwise: all of them together do not cover with that probability, and a curve that leaves the
        band somewhere is no evidence against it. At peaks that are narrower than the bandwidth and, for
        `NadarayaWatsonRegressor`, where data end, the bias is larger than its estimate, and they cover less.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level!r}")
        query, missing = self._queries(X)
        state = self._state
        rows = state.rows(query, False)
        error = fit_errors(rows, state.sites, state.w, state.variance()).sqrt()
        if bias:
            error = error.hypot(bias_at(query, state.sites, state.w, self._degree))
        reach = float(stdtrit(state.residual_dof, (1 + level) / 2)) * error
        return (
            self._output(_with_gaps(rows.fit - reach, missing), X),
            self._output(_with_gaps(rows.fit + reach, missing), X),
        )

    def marginal_effects(self, X: Any = None) -> dict[str, Any]:
        """Slopes of the fit with their standard errors, and their mean over the data.

        Parameters
        ----------
        X : array, table or Tensor of shape (M, D), optional
            Where: without, at the observations, as their places (`Sites`) hold them.

        Returns
        -------
        dict
            "slope" and "std", (M, D) or (M, outputs, D), at X; and, of the observations, "mean" and "mean_std", arrays
            (D,) or (outputs, D), the average marginal effect. In the unit of y per unit of X.
        """
        check_is_fitted(self)
        state = self._state
        if X is None:
            query, missing, X = state.sites.x, None, np.zeros((0, 0))
        else:
            query, missing = self._queries(X)
        rows = state.rows(query, True)
        error = slope_errors(rows, state.sites, state.w, state.variance()).sqrt()
        mean, variance = mean_slope(state.sites, state.w, state.degree, state.variance())
        average, deviation = (part.mT.cpu().numpy() for part in (mean, variance.sqrt()))
        return {
            "slope": self._slopes(_with_gaps(rows.slope, missing), X),
            "std": self._slopes(_with_gaps(error, missing), X),
            "mean": average[0] if self._single else average,
            "mean_std": deviation[0] if self._single else deviation,
        }

    def bandwidth_curve(self, factors: ArrayLike, criterion: str | None = None) -> tuple[Any, Any]:
        """Bandwidths (k, D), `bandwidth_` times each of the factors (k,), and the criterion (k,) there."""
        check_is_fitted(self)
        if criterion is None:
            criterion = (
                self.bandwidth if isinstance(self.bandwidth, str) and self.bandwidth in CRITERIA else "loo"
            )
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(map(repr, CRITERIA))}, got {criterion!r}")
        sites = self._state.sites
        bandwidths = np.asarray(factors, dtype=np.float64)[:, None] * self.bandwidth_
        with torch.no_grad():
            values = [
                float(criterion_of(criterion, sites, torch.from_numpy(1 / row).to(sites.x), self._degree))
                for row in bandwidths
            ]
        return bandwidths, np.array(values)

    def summary(self) -> str:
        """What was fitted, in lines of text."""
        check_is_fitted(self)
        report = self.report_
        lines = [
            type(self).__name__,
            f"observations          {report['n_observations']:,}"
            + (f" ({report['n_dropped']:,} rows with missing values dropped)" if report["n_dropped"] else ""),
            f"degree                {report['degree']}",
            f"bandwidth             {report['bandwidth_from']}",
        ]
        for name, value in zip(report["features"], report["bandwidth"], strict=True):
            lines.append(f"  {name:<20}{value:.6g}")
        lines += [
            f"leave-one-out error   {math.sqrt(max(report['loo'], 0.0)):.6g} (root of the mean square, unit of y)",
            f"effective parameters  {report['effective_dof']:.4g}",
            f"R squared             {report['r2']:.4f}",
            f"residual deviation    {', '.join(f'{value:.6g}' for value in report['residual_std'])}",
        ]
        if report["note"]:
            lines.append(f"note                  {report['note']}")
        return "\n".join(lines)

    def set_output(self, *, predict: str | None = None, transform: str | None = None) -> Any:
        """In which form `predict` answers.

        Parameters
        ----------
        predict : {"like", "default", "pandas", "polars"}, optional
            "like", at first: as X. "default": NumPy arrays, which `TransformedTargetRegressor` and `StackingRegressor`
            need where X is a table. Tensors are answered with tensors in any case.
        transform : optional
            Taken for the sake of pipelines, which pass it on; a regressor transforms nothing.

        Returns
        -------
        self
        """
        if predict is not None:
            if predict not in OUTPUTS:
                raise ValueError(f"predict must be one of {', '.join(map(repr, OUTPUTS))}, got {predict!r}")
            self._sklearn_output_config = {"predict": predict}
        return self

    def save(self, path: Any) -> None:
        """Write the fitted estimator to a file that `load` reads: arrays and JSON, nothing that runs."""
        from .storage import save

        check_is_fitted(self)
        save(self, path)

    @classmethod
    def load(cls, path: Any) -> Any:
        """Read an estimator that `save` wrote; ValueError if the file holds none, or one of another class."""
        from .storage import load

        found = load(path)
        if not isinstance(found, cls):
            raise ValueError(f"{path} holds a {type(found).__name__}, not a {cls.__name__}")
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        tags.input_tags.allow_nan = self.missing == "drop"
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_state")

    def _given(self, features: int) -> Any:
        """The bandwidths (D,) that the user gave."""
        found = np.asarray(self.bandwidth, dtype=np.float64)
        if found.ndim > 1 or found.size not in (1, features):
            raise ValueError(
                f"bandwidth must be a number, one for each of the {features} features, or one of "
                f"{', '.join(map(repr, (*CRITERIA, *RULES)))}, got shape {found.shape}"
            )
        if not (np.all(found > 0) and np.all(np.isfinite(found))):
            raise ValueError(
                f"bandwidth must be above 0 and finite, in the unit of X, got {self.bandwidth!r}"
            )
        return np.broadcast_to(found, features).copy()

    def _select(self, sites: Sites) -> BandwidthSelection | None:
        if isinstance(self.bandwidth, str):
            if self.bandwidth not in (*CRITERIA, *RULES):
                raise ValueError(
                    f"bandwidth must be a number, one for each feature, or one of "
                    f"{', '.join(map(repr, (*CRITERIA, *RULES)))}, got {self.bandwidth!r}"
                )
            return select(sites, self.bandwidth, self._degree, progress=self.progress)
        if not isinstance(self.bandwidth, numbers.Real | np.ndarray | list | tuple | Tensor):
            raise TypeError(
                f"bandwidth must be a number, a sequence or a string, got {type(self.bandwidth).__name__}"
            )
        return None

    def _training_data(self, X: Any, y: Any, sample_weight: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs (n, D), outputs (n,) or (n, C) and weights (n,) as tensors of one dtype on one device."""
        finite: Any = "allow-nan" if self.missing == "drop" else True
        if isinstance(X, Tensor):
            array, device, half = _to_array(X), X.device, X.dtype in (torch.float16, torch.bfloat16)
        else:
            array, device, half = X, torch.device("cpu"), False
        outputs = _to_array(y) if isinstance(y, Tensor) else y
        options: dict[str, Any] = dict(dtype=[np.float64, np.float32], ensure_all_finite=finite)
        if y is None:
            validate_data(self, array, y, multi_output=True, **options)  # says what is missing
        inputs = validate_data(self, array, **options)
        outputs = check_array(
            outputs, ensure_2d=False, dtype=[np.float64, np.float32], ensure_all_finite=finite, input_name="y"
        )
        if outputs.ndim > 2 or outputs.ndim == 0:
            raise ValueError(f"y must have shape (n,) or (n, outputs), got {outputs.shape}")
        if len(outputs) != len(inputs):
            raise ValueError(f"X and y must be of the same n, got {inputs.shape} and {outputs.shape}")
        weight = None
        if sample_weight is not None:
            given = _to_array(sample_weight) if isinstance(sample_weight, Tensor) else sample_weight
            if self.missing == "drop":
                weight = check_array(given, ensure_2d=False, dtype=np.float64, ensure_all_finite="allow-nan")
            else:
                weight = _check_sample_weight(given, inputs, dtype=np.float64)
            if weight.shape != (len(inputs),):
                raise ValueError(f"sample_weight must have shape ({len(inputs)},), got {weight.shape}")
        single = inputs.dtype == np.float32 and outputs.dtype == np.float32
        dtype = torch.float32 if single or half else torch.float64
        # Copies: the estimator's data do not change with the caller's.
        x = torch.from_numpy(np.array(inputs)).to(device=device, dtype=dtype)
        tensor = torch.from_numpy(np.array(outputs)).to(device=device, dtype=dtype)
        return (
            x,
            tensor,
            weight if weight is None else torch.from_numpy(np.array(weight)).to(device=device, dtype=dtype),
        )

    def _queries(self, X: Any) -> tuple[Tensor, Tensor | None]:
        """Queries (M, D) as the op takes them, and which of them have a missing value, None if none can."""
        check_is_fitted(self)
        sites = self._state.sites
        finite: Any = "allow-nan" if self.missing == "drop" else True
        if isinstance(X, Tensor):
            _check_feature_names(self, _to_array(X), reset=False)
            validate_data(self, _to_array(X), reset=False, dtype=np.float64, ensure_all_finite=finite)
            query = X.to(sites.x)
        else:
            array = validate_data(
                self, X, reset=False, dtype=[np.float64, np.float32], ensure_all_finite=finite
            )
            query = to_tensor(array).to(sites.x)
        if self.missing != "drop":
            return query, None
        missing = query.isnan().any(1)
        return query.nan_to_num(0.0), missing

    def _output(self, found: Tensor, X: Any) -> Any:
        output = getattr(self, "_sklearn_output_config", {}).get("predict", "like")
        return to_output(found[:, 0] if self._single else found, X, self.output_names_, output)

    def _slopes(self, slope: Tensor, X: Any) -> Any:
        """(M, D, C) as (M, D) or (M, C, D); tables only where they have two dimensions."""
        slope = slope.squeeze(-1) if self._single else slope.mT
        output = getattr(self, "_sklearn_output_config", {}).get("predict", "like")
        return to_output(slope, X, self._feature_names(), output if slope.ndim == 2 else "default")

    def _feature_names(self) -> list[str]:
        names = getattr(self, "feature_names_in_", None)
        return (
            [f"x{k}" for k in range(self.n_features_in_)] if names is None else [str(name) for name in names]
        )

    def _report(self) -> dict[str, Any]:
        """All that was found, as plain numbers and strings."""
        sites, state = self._state.sites, self._state
        loo = self.loss_
        if isinstance(self.bandwidth, str) and self.bandwidth in ("gcv", "aicc"):
            with torch.no_grad():
                loo = (
                    float(criterion_of("loo", sites, state.w, self._degree)) if len(sites.x) > 1 else math.nan
                )
        variance = state.variance() if self.n_observations_ > 1 else torch.full((1, 1), math.nan)
        selection = self.selection_
        lower, upper = data_bounds(sites) if selection is None else (selection.lower, selection.upper)
        return {
            "estimator": type(self).__name__,
            "degree": self._degree,
            "n_observations": self.n_observations_,
            "n_dropped": self.n_dropped_,
            "features": self._feature_names(),
            "outputs": list(self.output_names_),
            "bandwidth": [float(value) for value in self.bandwidth_],
            "bandwidth_from": self.bandwidth if isinstance(self.bandwidth, str) else "given",
            "loss": self.loss_,
            "loo": loo,
            "effective_dof": self.effective_dof_,
            "r2": self.r2_,
            "residual_std": [float(value) for value in variance.mean(0).sqrt()],
            "search_lower": [float(value) for value in lower],
            "search_upper": [float(value) for value in upper],
            "at_bound": [None] * len(lower) if selection is None else list(selection.at_bound),
            "note": "" if selection is None else selection.note,
            "evaluations": 0 if selection is None else selection.evaluations,
        }


def _to_array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


def _with_gaps(found: Tensor, missing: Tensor | None) -> Tensor:
    """NaN in the rows with a missing value."""
    if missing is None or not bool(missing.any()):
        return found
    return found.masked_fill(missing.reshape(-1, *(1,) * (found.ndim - 1)), math.nan)


def _default_names(outputs: int) -> list[str]:
    return ["y"] if outputs == 1 else [f"y{k}" for k in range(outputs)]


class NadarayaWatsonRegressor(_KernelRegressor):
    r"""Nadaraya-Watson regression: at each x the mean of the observations, weighted by a Gaussian of their distance.

    .. math::

        \hat y(x) = \frac{\sum_j a_j e^{-\frac12 \sum_f ((x_f - x_{jf}) / h_f)^2} y_j}
                         {\sum_j a_j e^{-\frac12 \sum_f ((x_f - x_{jf}) / h_f)^2}}

    Parameters
    ----------
    bandwidth : number, array of shape (D,), or {"loo", "gcv", "aicc", "silverman", "scott"}
        h, in the unit of X: one for all features or one for each; or how to find it, by `nwfast.select_bandwidth`.
    missing : {"raise", "drop"}
        What to do with rows that have a NaN: refuse them, or leave them out and count them in `n_dropped_`.
    variance : {"constant", "local"}
        For standard errors: one variance for all observations (over their weights), or by each one's residual, which
        is right where the noise depends on x.
    progress : bool, optional
        Show the progress of the selection; by default on a terminal, if it takes more than two seconds.

    Attributes
    ----------
    bandwidth_ : ndarray of shape (D,)
    loss_ : float
        The criterion of the selection; of a bandwidth that was given, or a rule's, the leave-one-out squared error.
    effective_dof_ : float
        The trace of the hat matrix.
    r2_ : float
        Of the observations, in sample.
    n_dropped_, n_observations_ : int
    selection_ : BandwidthSelection or None
    report_ : dict
        All of it, plain numbers and strings; `summary()` prints it.
    n_features_in_, feature_names_in_
        As scikit-learn has them.

    See Also
    --------
    LocalLinearRegressor : without the bias at the ends of the data, and with fitted slopes.
    nwfast.nadaraya_watson : the function, on tensors.

    References
    ----------
    Nadaraya (1964), "On Estimating Regression"; Watson (1964), "Smooth Regression Analysis".

    Examples
    --------
    >>> import numpy as np, nwfast
    >>> x = np.linspace(0, 10, 300)[:, None]
    >>> model = nwfast.NadarayaWatsonRegressor(bandwidth=0.5).fit(x, np.sin(x[:, 0]))
    >>> fit, std = model.predict([[1.0], [2.0]], return_std=True)
    >>> fit.round(2)
    array([0.76, 0.8 ])
    """

    _degree = 0


class LocalLinearRegressor(_KernelRegressor):
    r"""Local linear regression: at each x the line (plane) of least squares, weighted by a Gaussian of the distance.

    .. math::

        \hat y(x) = \hat\alpha, \quad (\hat\alpha, \hat\beta) = \arg\min_{\alpha, \beta}
        \sum_j a_j e^{-\frac12 \sum_f ((x_f - x_{jf}) / h_f)^2} (y_j - \alpha - \beta^T (x_j - x))^2

    Parameters and attributes are those of `NadarayaWatsonRegressor`; slopes are the fitted ones, beta.

    See Also
    --------
    nwfast.local_linear : the function, on tensors, and what it does where weights are on too few points.

    References
    ----------
    Fan and Gijbels (1996), "Local Polynomial Modelling and Its Applications".

    Examples
    --------
    >>> import numpy as np, nwfast
    >>> x = np.linspace(0, 10, 300)[:, None]
    >>> model = nwfast.LocalLinearRegressor(bandwidth=0.5).fit(x, 3 * x[:, 0])
    >>> fit, slope = model.predict([[0.0], [2.0]], return_slope=True)
    >>> fit.round(6) + 0.0, slope.round(6)
    (array([0., 6.]), array([[3.],
           [3.]]))
    """

    _degree = 1
