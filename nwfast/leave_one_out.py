"""`leave_one_out_loss`: what to minimise in w, as one operator where the native backend has it, else as a formula."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from . import backends
from .functional import local_linear, nadaraya_watson
from .op import by_reference, call
from .op.schema import LEAVE_ONE_OUT
from .validation import as_declared, check_kind, check_method, unexpected

_REDUCTIONS = ("mean", "sum", "none")


@as_declared
def leave_one_out_loss(
    x: Tensor,
    y: Tensor,
    w: float | Tensor = 1.0,
    *,
    key_weight: Tensor | None = None,
    degree: int = 0,
    reduction: str = "mean",
    method: str = "auto",
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    r"""The squared residuals of a regression of y on x in which no example helps to predict itself.

    .. math::

        r_i = \frac{\sum_{j \ne i} a_j e^{s_{ij}} y_j}{\sum_{j \ne i} a_j e^{s_{ij}}} - y_i, \qquad
        s_{ij} = -\tfrac12 \sum_f (w_f (x_{if} - x_{jf}))^2, \qquad
        \mathrm{loss} = \frac{\sum_i a_i r_i^2}{\sum_i a_i}

    Its minimum is the bandwidth of least-squares cross-validation. The loss of the chapter, which halves and sums, is
    half of ``reduction="sum"``.

    Parameters
    ----------
    x : Tensor
        Observed inputs: (N,) for one feature, or (..., N, D).
    y : Tensor
        Observed outputs: (N,) or (N, C); (..., N, C) or (..., N).
    w : float or Tensor
        Inverse bandwidth 1/h, in the inverse unit of x, in the forms that `nadaraya_watson` takes. Losses of leading
        dimensions are reduced with all others; for one loss each of many bandwidths map over w by `torch.vmap`.
    key_weight : Tensor, optional
        Weights a_i >= 0 of the examples, (N,) or (..., N). They weigh a residual as they weigh the example among
        others: an example of weight 0 is as if it were not there, and its weight can grow without a jump of the loss.
    degree : {0, 1}
        Of the local polynomial that is fitted to the others: 0 for `nadaraya_watson`, the formula above, 1 for
        `local_linear`, whose fit takes the quotient's place in r_i.
    reduction : {"mean", "sum", "none"}
        "mean" is the weighted mean above over all examples, channels and leading dimensions, "sum" is its numerator,
        "none" are the numerator's terms a_i r_i^2 in the shape of the fit.
    method, backend : str
        As for `nadaraya_watson`.

    Returns
    -------
    Tensor
        A scalar, or the shape that `nadaraya_watson` gives with ``reduction="none"``; the dtype of x; the unit of y
        squared.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `nadaraya_watson`; ValueError for an unknown reduction or degree.

    Notes
    -----
    Rows that have no other example of a weight other than 0 are left out: they add 0, and to the mean's denominator
    nothing. If that leaves none, the mean is NaN and has no gradient. With one channel and no leading dimensions, where
    no gradient but that of w is needed, the native backend computes the derivative with the loss (in linear time, and
    with one feature, in one pass), and `backward` is one multiplication. Differentiable in x, y, w and key_weight,
    twice; the second derivative builds (N, N) matrices.
    With ``degree=1`` the fit is computed in float64; time, memory and derivatives are those of `local_linear`.

    References
    ----------
    Hardle and Marron (1985), "Optimal Bandwidth Selection in Nonparametric Regression Function Estimation"; for
    degree 1 Xia and Li (2002), "Asymptotic Behavior of Bandwidth Selected by the Cross-Validation Method for Local
    Polynomial Fitting".

    Examples
    --------
    >>> import torch, nwfast
    >>> x = torch.tensor([0.0, 1.0, 2.0])
    >>> nwfast.leave_one_out_loss(x, torch.tensor([0.0, 3.0, 0.0]), w=0.0)
    tensor(4.5000)
    """
    if unknown:
        raise unexpected("leave_one_out_loss", unknown)
    check_method(method)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, got {reduction!r}")
    if degree not in (0, 1):
        raise ValueError(f"degree must be 0 or 1, got {degree!r}")
    if degree == 0 and reduction != "none" and (backend == "auto" or backend == "native"):
        loss = _short_way(x, y, w, key_weight, reduction == "mean", method)
        if loss is not None:
            return loss
    return _by_formula(x, y, w, key_weight, degree, reduction, method, backend)


def _by_formula(
    x: Tensor,
    y: Tensor,
    w: float | Tensor,
    key_weight: Tensor | None,
    degree: int,
    reduction: str,
    method: str,
    backend: str,
) -> Tensor:
    check_kind("x", x)
    check_kind("y", y)
    fit = local_linear if degree else nadaraya_watson
    fitted = fit(x, x, y, w, key_weight=key_weight, exclude_self=True, method=method, backend=backend)
    residual = fitted - y
    examples = x.shape[0] if x.ndim == 1 else x.shape[-2]
    if key_weight is None:
        if examples == 1:  # a residual of 0 whose graph is whole
            residual = torch.where(torch.zeros_like(residual, dtype=torch.bool), residual, 0.0)
        squares = residual.square()
        if reduction == "none":
            return squares
        total = squares.sum()
        return (
            total
            if reduction == "sum"
            else _mean(total, squares.new_tensor(squares.numel() * (examples > 1)))
        )
    counts = key_weight != 0
    kept = counts.sum(-1, keepdim=True) > counts.to(torch.int64)
    weight = key_weight.to(residual.dtype)
    if y.ndim == 2 if x.ndim == 1 else y.ndim == x.ndim:
        counts, kept, weight = counts.unsqueeze(-1), kept.unsqueeze(-1), weight.unsqueeze(-1)
    # Of an example of weight 0 a finite residual is what its weight's gradient needs; one that is not matters to none.
    squares = torch.where(kept & (counts | residual.isfinite()), residual, 0.0).square()
    terms = weight * squares
    if reduction == "none":
        return terms
    total = terms.sum()
    if reduction == "sum":
        return total
    return _mean(total, torch.where(kept, weight, 0.0).expand_as(terms).sum())


def _mean(total: Tensor, weights: Tensor) -> Tensor:
    """Their quotient; NaN without gradient where nothing is counted."""
    none = weights == 0
    return torch.where(none, torch.nan, total / torch.where(none, 1.0, weights))


class _OfW(torch.autograd.Function):
    """The loss as a function of w alone: its derivative comes with it."""

    @staticmethod
    def forward(ctx, w, held):  # of one argument: each that autograd looks at takes its time
        operator, x, y, key_weight, mean = held
        with torch._C._AutoDispatchBelowAutograd():
            loss, ctx.slope = operator(x, y, w, key_weight, mean, True)
        ctx.save_for_backward(w, x, y, key_weight)  # for the second derivative
        ctx.mean = mean
        return loss

    @staticmethod
    def backward(ctx, grad):
        if not torch.is_grad_enabled():
            return grad * ctx.slope, None
        w, x, y, key_weight = ctx.saved_tensors
        points = x if x.ndim == 2 else x[:, None]
        by_reference.require_memory("second derivative", points, points, y if y.ndim == 2 else y[:, None])
        reduction = "mean" if ctx.mean else "sum"

        def loss(w):
            return _by_formula(x, y, w, key_weight, 0, reduction, "auto", "reference")

        (found,) = torch.func.vjp(loss, w)[1](grad)
        return found, None


def _short_way(x: Any, y: Any, w: Any, key_weight: Any, mean: bool, method: str) -> Tensor | None:
    """The loss of a call that the native operator takes as it is and that needs no gradient but that of w."""
    if not call.goes_short(x, x, y, w, key_weight, 2) or backends._why_not("native"):
        return None
    differentiate = torch.is_grad_enabled()
    if differentiate and (
        x.requires_grad or y.requires_grad or (key_weight is not None and key_weight.requires_grad)
    ):
        return None
    features = x.shape[1] if x.ndim == 2 else 1
    operator = LEAVE_ONE_OUT[call.choose_kernel("native", method, features, x.shape[0] ** 2)]
    try:
        if differentiate and w.requires_grad:
            return _OfW.apply(w, (operator, x, y, key_weight, mean))
        with torch._C._AutoDispatchBelowAutograd():
            return operator(x, y, w, key_weight, mean, False)[0]
    except RuntimeError as error:
        if call.is_refusal(error, x, y, w):
            return None
        raise
