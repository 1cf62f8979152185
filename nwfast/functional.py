"""The public functions: docstring, validate, choose, call the op."""

from typing import Literal, NoReturn, overload

from torch import Tensor

from . import backends
from .backends import reference
from .op import call
from .op import local_linear as lines
from .validation import as_declared, canonical, check_method, unexpected


@overload
def nadaraya_watson(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: float | Tensor = ...,
    *,
    key_weight: Tensor | None = ...,
    exclude_self: bool = ...,
    method: str = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def nadaraya_watson(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: float | Tensor = ...,
    *,
    key_weight: Tensor | None = ...,
    exclude_self: bool = ...,
    method: str = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def nadaraya_watson(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: float | Tensor = ...,
    *,
    key_weight: Tensor | None = ...,
    exclude_self: bool = ...,
    method: str = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


@as_declared
def nadaraya_watson(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: float | Tensor = 1.0,
    *,
    key_weight: Tensor | None = None,
    exclude_self: bool = False,
    method: str = "auto",
    backend: str = "auto",
    return_lse: bool = False,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Nadaraya-Watson kernel regression: attention pooling with a Gaussian kernel, without the (M, N) matrix.

    .. math::

        s_{ij} = -\tfrac12 \sum_f (w_f (q_{if} - k_{jf}))^2, \qquad
        \mathrm{out}_i = \frac{\sum_j a_j e^{s_{ij}} v_j}{\sum_j a_j e^{s_{ij}}}, \qquad
        \mathrm{lse}_i = \log \sum_j a_j e^{s_{ij}}

    It takes the place of ``softmax(-((query - key) * w)**2 / 2) @ value``, in O(M + N) memory, and with up to
    three features on the CPU in O(M + N) time.

    Parameters
    ----------
    query : Tensor
        Points at which to regress: (M,) for one feature, or (..., M, D).
    key : Tensor
        Observed inputs, in the unit of query: (N,), or (..., N, D) of as many dimensions as query; or (M, N), one row
        of keys a query (M,).
    value : Tensor
        Observed outputs: (N,) or (N, C); (..., N, C) or (..., N); (M, N) for one row of keys a query.
    w : float or Tensor
        Inverse bandwidth 1/h, in the inverse unit of query; the sign does not matter and 0 is average pooling. A
        scalar, (1,), (D,), or (..., D) with leading dimensions of the batch (one per head), or more: these broadcast
        with the leading dimensions of the others, so that (K, 1) over one set of data in one feature gives results
        (K, M). As torch promotes, tensors and arrays without dimensions and integer tensors take the dtype of query.
        A number must be finite (under torch.compile it is not looked at); NaN or inf in a tensor gives NaN.
    key_weight : Tensor, optional
        Weights a_j >= 0 of shape (N,) or (..., N), whose leading dimensions broadcast as those of w; masks (bool) and
        counts (integers) too. A key of weight 0 is left out: as if it were not there, whatever it holds, NaN
        included; its gradients are 0, and that of its weight is what adding it would change. A negative weight gives
        NaN.
    exclude_self : bool
        Leave key i out for query i (leave-one-out); needs M == N.
    method : {"auto", "dense", "fgt"}
        How to sum. "dense" visits all pairs that can matter, O(M N). "fgt", a fast Gauss transform, takes O(M + N),
        for one feature and on the native backend up to three; to rounding both compute the same. "auto" takes the one
        expected to be faster.
    backend : {"auto", "native", "cuda", "numba", "triton", "reference"}
        Where to compute; see `nwfast.backends.available`. Only "auto" chooses, a named backend runs or raises.
    return_lse : bool
        Also return lse: up to the constant log((2 pi)^(D/2) h^D) the log of the kernel density estimate times sum(a),
        and what is needed to merge results over disjoint sets of keys.

    Returns
    -------
    out : Tensor
        (M,), (M, C), (..., M, C) or (..., M), as value has a channel dimension or not; the dtype of query.
    lse : Tensor
        (..., M), with ``return_lse=True`` only; float64 for float64 inputs, else float32.

    Raises
    ------
    TypeError
        Arguments that are no tensors, integer or mixed dtypes.
    ValueError
        Shapes that do not fit, mixed devices, N = 0, M != N with exclude_self, unknown method or backend; "fgt" with
        more features than the backend takes, or where no backend has it.
    RuntimeError
        The named backend cannot run here (the message says why).

    Notes
    -----
    float32 and float64 are computed in their own precision; float16 and bfloat16 are storage, computed in float32.
    Under autocast, half-precision inputs are computed in float32 too, and so are returned. Differentiable in query,
    key, value, w and key_weight, twice in all of them (the second derivative builds (M, N) matrices); works under
    torch.compile(fullgraph=True), torch.export and torch.func; torch.onnx.export writes down the plain-PyTorch
    reference, if it is given the module or function itself, not a program that torch.export made. A row that has no
    key left (all weights 0, or exclude_self with N = 1) is NaN, with lse = -inf and zero gradient.

    A NaN in value (a missing observation) makes NaN of every output in its channel that its key counts for, which may
    be all of them: a weight of any size, 0 by underflow included, times NaN is NaN. A weight of 0 in key_weight leaves
    such keys out, ``key_weight=~value.isnan()``.

    References
    ----------
    Nadaraya (1964), "On Estimating Regression"; Watson (1964), "Smooth Regression Analysis"; Zhang, Lipton, Li and
    Smola, "Dive into Deep Learning", chapter "Attention Pooling: Nadaraya-Watson Kernel Regression".

    Examples
    --------
    >>> import torch, nwfast
    >>> x = torch.tensor([0.0, 1.0, 2.0])
    >>> y = torch.tensor([0.0, 1.0, 4.0])
    >>> nwfast.nadaraya_watson(torch.tensor([1.0]), x, y, w=10.0)
    tensor([1.])
    >>> nwfast.nadaraya_watson(x, x, y, w=0.0)  # average pooling
    tensor([1.6667, 1.6667, 1.6667])
    """
    if unknown:
        raise unexpected("nadaraya_watson", unknown)
    check_method(method)
    if backend == "auto" or backend == "native" or backend == "numba":
        result = call.short_way(backend, query, key, value, w, key_weight, exclude_self, method, return_lse)
        if result is not None:
            return result
    form = canonical(query, key, value, w, key_weight, exclude_self)
    query = form[0]  # under autocast of another dtype than the one given
    backend = backends.resolve(backend, query.device, method)
    kernel = call.choose_kernel(backend, method, query.shape[-1], query.shape[-2] * form[1].shape[-2])
    out, lse = call.nadaraya_watson(kernel, *form[:5], exclude_self, return_lse, form[5])
    if out.dtype != query.dtype:
        out = out.to(query.dtype)
    return out if lse is None else (out, lse)


@overload
def local_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: float | Tensor = ...,
    *,
    key_weight: Tensor | None = ...,
    exclude_self: bool = ...,
    method: str = ...,
    backend: str = ...,
    return_slope: Literal[False] = ...,
) -> Tensor: ...


@overload
def local_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: float | Tensor = ...,
    *,
    key_weight: Tensor | None = ...,
    exclude_self: bool = ...,
    method: str = ...,
    backend: str = ...,
    return_slope: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def local_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: float | Tensor = ...,
    *,
    key_weight: Tensor | None = ...,
    exclude_self: bool = ...,
    method: str = ...,
    backend: str = ...,
    return_slope: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


@as_declared
def local_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: float | Tensor = 1.0,
    *,
    key_weight: Tensor | None = None,
    exclude_self: bool = False,
    method: str = "auto",
    backend: str = "auto",
    return_slope: bool = False,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Local linear regression with a Gaussian kernel: at each query the weighted least-squares line (plane) there.

    .. math::

        (\mathrm{fit}_i, \mathrm{slope}_i) = \arg\min_{\alpha, \beta} \sum_j a_j
        e^{-\frac12 \sum_f (w_f (q_{if} - k_{jf}))^2} \, |v_j - \alpha - \beta^T (k_j - q_i)|^2

    Where data ends, or is denser on one side, it has not the bias of `nadaraya_watson`. Linear functions are
    reproduced. In O(M + N) memory, and with up to three features on the CPU in O(M + N) time.

    Parameters
    ----------
    query, key, value, w, key_weight, exclude_self, method, backend
        As for `nadaraya_watson`. With w = 0 the fit is ordinary least squares over all keys.
    return_slope : bool
        Also return the fitted slopes, in the unit of value per unit of query.

    Returns
    -------
    fit : Tensor
        The shape and dtype of what `nadaraya_watson` returns.
    slope : Tensor
        With ``return_slope=True`` only: (..., M, C, D), or (..., M, D) where fit has no channel dimension; without
        features (query (M,)) the shape of fit.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `nadaraya_watson`.

    Notes
    -----
    Computed in float64 whatever the dtype of the inputs: the kernels of `nadaraya_watson` give the weights' means and
    covariances. With two and three features in linear time on the CPU, float32 inputs without gradients are computed in
    float32, to some 1e-7 of the scale of results (1e-6 where the keys of a row vary little along a direction); local
    lines then take about twice the time of averages.

    The weights may be on fewer than D + 1 points, or on points with a direction in which they do not differ, to
    rounding: variances of less than some 1e-11 of the squared bandwidth, or of the squared extent of all keys where
    that is less. The slope is then the one of least norm in units of the bandwidth (the norm of slope / w), and fades
    to it continuously: at a query far from all keys but one the fit is the value of that key, as that of
    `nadaraya_watson`. It is NaN only where that is.

    Differentiable in query, key, value, w and key_weight, twice (the second derivative builds (M, N) matrices). First
    derivatives take the time of the method. But for that of value they lose digits where keys extend over many
    bandwidths: up to 6000 to each side of their middle they are good to some 1e-8 of their scale, then they build
    (M, N) matrices, or raise RuntimeError if these do not fit the memory. Faded directions of a row are taken as fixed.
    Inside torch.func transforms and forward-mode AD the plain-PyTorch formula serves, with (M, N) matrices.

    References
    ----------
    Cleveland (1979), "Robust Locally Weighted Regression and Smoothing Scatterplots"; Fan and Gijbels (1996), "Local
    Polynomial Modelling and Its Applications".

    Examples
    --------
    >>> import torch, nwfast
    >>> x = torch.tensor([0.0, 1.0, 2.0])
    >>> nwfast.local_linear(torch.tensor([1.0, 3.0]), x, 2 * x + 1, w=1.0)
    tensor([3., 7.])
    >>> nwfast.local_linear(torch.tensor([1.0]), x, x**2, w=1.0, return_slope=True)[1]
    tensor([2.])
    """
    if unknown:
        raise unexpected("local_linear", unknown)
    check_method(method)
    one_feature = isinstance(query, Tensor) and query.ndim == 1
    query, key, value, scale, key_weight, drop = canonical(query, key, value, w, key_weight, exclude_self)
    backend = backends.resolve(backend, query.device, method)
    kernel = call.choose_kernel(backend, method, query.shape[-1], query.shape[-2] * key.shape[-2])
    fit, slope = lines.local_linear(kernel, query, key, value, scale, key_weight, exclude_self)
    fit = call.drop_last(fit, drop).to(query.dtype)
    if not return_slope:
        return fit
    slope = slope.mT.to(query.dtype)
    return fit, slope.reshape(fit.shape) if one_feature else slope.squeeze(-2) if drop else slope


@as_declared
def attention_weights(
    query: Tensor,
    key: Tensor,
    w: float | Tensor = 1.0,
    *,
    key_weight: Tensor | None = None,
    exclude_self: bool = False,
    **unknown: NoReturn,
) -> Tensor:
    r"""The weights p that `nadaraya_watson` averages with, as a matrix: for plots and checks, O(M N) memory.

    .. math:: p_{ij} = a_j e^{s_{ij}} / \sum_l a_l e^{s_{il}}

    Parameters
    ----------
    query, key, w, key_weight, exclude_self
        As for `nadaraya_watson`.

    Returns
    -------
    Tensor
        (M, N) or (..., M, N), rows sum to 1; the dtype of query. A row that has no key left is NaN.

    Raises
    ------
    TypeError, ValueError
        As `nadaraya_watson`.

    Examples
    --------
    >>> import torch, nwfast
    >>> x = torch.tensor([0.0, 1.0])
    >>> nwfast.attention_weights(x, x, w=0.0)
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    if unknown:
        raise unexpected("attention_weights", unknown)
    query, key, _, scale, key_weight, drop = canonical(
        query, key, None, w, key_weight, exclude_self, without_value=True
    )
    weights = reference.attention_weights(query, key, scale, key_weight, exclude_self)
    return (weights.squeeze(-2) if drop == 2 else weights).to(query.dtype)
