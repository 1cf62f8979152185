"""What a fitted kernel regression is and says: all of an estimator but scikit-learn's contract.

`KernelModel` computes on tensors. `nwfast/estimators/regressor.py` makes public estimators of it, which take arrays
and tables of all kinds; the command line, which knows what it has read, takes `LocalMeans` and `LocalLines`, and does
without the seconds that importing scikit-learn takes. In files both are the same.
"""

import math
import numbers
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..functional import local_linear, nadaraya_watson
from ..index import KeyIndex
from . import CRITERIA, RULES
from .criteria import as_call, flat, in_sample, value_of
from .frames import to_tensor
from .inference import (
    Weights,
    bias_at,
    fit_errors,
    mean_slope,
    residual_variance,
    slope_errors,
    student_quantile,
    weights_at,
)
from .report import report_of, summary_of
from .selection import BandwidthSelection, select
from .sites import Sites, sites_of

_MISSING = ("raise", "drop")
_VARIANCES = ("constant", "local")
_Columns = dict[str, NDArray[np.float64]]


class State:
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
        """The fit at query with its linear weights, for errors and slopes."""
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


class KernelModel:
    """A kernel regression with its parameters: arrays of float64 in and out, where a subclass takes no others."""

    n_features_in_: int
    _degree: int
    _kind: str  # the public estimator that it is

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

    def _check_parameters(self) -> None:
        if self.missing not in _MISSING:
            raise ValueError(f"missing must be 'raise' or 'drop', got {self.missing!r}")
        if self.variance not in _VARIANCES:
            raise ValueError(f"variance must be 'constant' or 'local', got {self.variance!r}")

    def _learn(self, inputs: Tensor, outputs: Tensor, weight: Tensor | None, names: list[str] | None) -> None:
        """Fit to inputs (n, D), outputs (n,) or (n, C), which may have names, and weights (n,)."""
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
            self.loss_ = value_of("loo", sites, w, self._degree)
        self._state = State(sites, w, self._degree, self.variance, max(self.n_observations_ - trace, 1.0))
        self.report_ = report_of(self)

    def _fitted(self) -> State:
        """What the fit holds, where there is one."""
        return self._state

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
            return self._output(with_gaps(fit, missing), X)
        rows = state.rows(query, return_slope)
        results = [self._output(with_gaps(rows.fit, missing), X)]
        if return_std:
            error = fit_errors(rows, state.sites, state.w, state.variance()).sqrt()
            results.append(self._output(with_gaps(error, missing), X))
        if return_slope:
            results.append(self._slopes(with_gaps(rows.slope, missing), X))
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
        reach = student_quantile(state.residual_dof, (1 + level) / 2) * error
        return (
            self._output(with_gaps(rows.fit - reach, missing), X),
            self._output(with_gaps(rows.fit + reach, missing), X),
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
        state = self._fitted()
        if X is None:
            query, missing, X = state.sites.x, None, np.zeros((0, 0))
        else:
            query, missing = self._queries(X)
        rows = state.rows(query, True)
        error = slope_errors(rows, state.sites, state.w, state.variance()).sqrt()
        mean, variance = mean_slope(state.sites, state.w, state.degree, state.variance())
        average, deviation = (part.mT.cpu().numpy() for part in (mean, variance.sqrt()))
        return {
            "slope": self._slopes(with_gaps(rows.slope, missing), X),
            "std": self._slopes(with_gaps(error, missing), X),
            "mean": average[0] if self._single else average,
            "mean_std": deviation[0] if self._single else deviation,
        }

    def bandwidth_curve(self, factors: ArrayLike, criterion: str | None = None) -> tuple[Any, Any]:
        """Bandwidths (k, D), `bandwidth_` times each of the factors (k,), and the criterion (k,) there."""
        sites = self._fitted().sites
        if criterion is None:
            criterion = (
                self.bandwidth if isinstance(self.bandwidth, str) and self.bandwidth in CRITERIA else "loo"
            )
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(map(repr, CRITERIA))}, got {criterion!r}")
        bandwidths = np.asarray(factors, dtype=np.float64)[:, None] * self.bandwidth_
        values = [
            value_of(criterion, sites, torch.from_numpy(1 / row).to(sites.x), self._degree)
            for row in bandwidths
        ]
        return bandwidths, np.array(values)

    def summary(self) -> str:
        """What was fitted, in lines of text."""
        self._fitted()
        return summary_of(self._kind, self.report_)

    def save(self, path: Any) -> None:
        """Write the fitted estimator to a file that `load` reads: arrays and JSON, nothing that runs."""
        from .storage import save

        self._fitted()
        save(self, path)

    def _queries(self, X: Any) -> tuple[Tensor, Tensor | None]:
        """Queries (M, D) as the op takes them, and which of them have a missing value, None if none can."""
        return without_gaps(to_tensor(X).to(self._fitted().sites.x))

    def _output(self, found: Tensor, X: Any) -> Any:
        """Results of rows (M, C) in the form that X asks for."""
        return (found[:, 0] if self._single else found).cpu().numpy()

    def _slopes(self, slope: Tensor, X: Any) -> Any:
        """(M, D, C) as (M, D) or (M, C, D), in that form."""
        return (slope.squeeze(-1) if self._single else slope.mT).cpu().numpy()

    def _feature_names(self) -> list[str]:
        names = getattr(self, "feature_names_in_", None)
        return (
            [f"x{k}" for k in range(self.n_features_in_)] if names is None else [str(name) for name in names]
        )

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


def with_gaps(found: Tensor, missing: Tensor | None) -> Tensor:
    """NaN in the rows with a missing value."""
    if missing is None or not bool(missing.any()):
        return found
    return found.masked_fill(missing.reshape(-1, *(1,) * (found.ndim - 1)), math.nan)


def without_gaps(query: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (M, D) with 0 for NaN, and which of them had one."""
    return query.nan_to_num(0.0), query.isnan().any(1)


def _default_names(outputs: int) -> list[str]:
    return ["y"] if outputs == 1 else [f"y{k}" for k in range(outputs)]


class _OfColumns(KernelModel):
    """A model of columns by their names, of finite numbers and NaN."""

    def fit(self, x: _Columns, y: _Columns, weight: NDArray[np.float64] | None = None) -> Any:
        """As the estimators' `fit`, of columns (n,) in float64."""
        self._check_parameters()
        self.n_features_in_ = len(x)
        self.feature_names_in_ = np.array(list(x), dtype=object)
        inputs, outputs = (torch.from_numpy(np.stack(list(part.values()), 1)) for part in (x, y))
        self._learn(
            inputs,
            flat(outputs),
            weight if weight is None else to_tensor(weight),
            list(y),
        )
        return self


class LocalMeans(_OfColumns):
    """What `NadarayaWatsonRegressor` computes."""

    _degree = 0
    _kind = "NadarayaWatsonRegressor"


class LocalLines(_OfColumns):
    """What `LocalLinearRegressor` computes."""

    _degree = 1
    _kind = "LocalLinearRegressor"


KINDS: dict[str, type[_OfColumns]] = {kind._kind: kind for kind in (LocalMeans, LocalLines)}
