"""`NadarayaWatsonRegressor` and `LocalLinearRegressor`: scikit-learn's contract around `KernelModel`."""

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import (
    _check_feature_names,
    _check_sample_weight,
    check_array,
    check_is_fitted,
    validate_data,
)
from torch import Tensor

from .frames import OUTPUTS, names_of, to_output, to_tensor
from .model import KernelModel, State, without_gaps


class _KernelRegressor(KernelModel, RegressorMixin, BaseEstimator):
    """What both estimators have in common."""

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
        self._check_parameters()
        inputs, outputs, weight = self._training_data(X, y, sample_weight)
        self._learn(inputs, outputs, weight, names_of(y))
        return self

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

    @property
    def _kind(self) -> str:  # type: ignore[override]
        return type(self).__name__

    def _fitted(self) -> State:
        check_is_fitted(self)
        return self._state

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
        sites = self._fitted().sites
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
        return without_gaps(query) if self.missing == "drop" else (query, None)

    def _output(self, found: Tensor, X: Any) -> Any:
        output = getattr(self, "_sklearn_output_config", {}).get("predict", "like")
        return to_output(found[:, 0] if self._single else found, X, self.output_names_, output)

    def _slopes(self, slope: Tensor, X: Any) -> Any:
        """(M, D, C) as (M, D) or (M, C, D); tables only where they have two dimensions."""
        slope = slope.squeeze(-1) if self._single else slope.mT
        output = getattr(self, "_sklearn_output_config", {}).get("predict", "like")
        return to_output(slope, X, self._feature_names(), output if slope.ndim == 2 else "default")


def _to_array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


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


KINDS = {kind.__name__: kind for kind in (NadarayaWatsonRegressor, LocalLinearRegressor)}
