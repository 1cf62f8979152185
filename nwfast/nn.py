"""`NWKernelRegression`, the op as a module with a learnable inverse bandwidth."""

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .functional import attention_weights, nadaraya_watson
from .index import KeyIndex
from .ops import is_transformed
from .validation import check_method


class _Call(NamedTuple):
    """What `attention_weights` needs of the last call, detached from its graph."""

    queries: Tensor
    keys: Tensor
    w: Tensor  # a copy: an optimiser changes the parameter in place
    exclude_self: bool
    versions: tuple[int, int] | None  # None where a tensor counts no in-place changes


# From so many keys on, calls that repeat keys and values share an index of them: sorting 4096 keys takes 0.1 ms.
_INDEXED_KEYS = 4096


class NWKernelRegression(nn.Module):
    r"""Nadaraya-Watson kernel regression with a learnable inverse bandwidth w.

    .. math:: \mathrm{out}_i = \sum_j \mathrm{softmax}_j\left(-\tfrac12 ((q_i - k_j) w)^2\right) v_j

    A drop-in for the module of the same name in "Dive into Deep Learning": same constructor use, same parameter,
    same call. It does not build the (M, n) matrix, in the forward pass or for the gradients.

    Parameters
    ----------
    w : float or Tensor, optional
        Start value of w, in the inverse unit of the queries. A number gives a parameter of shape (1,), a tensor one of
        its own shape: (1,), (D,) (one per feature) or (..., D) (one per head). Default: shape (1,), uniform on (0, 1).
    log_bandwidth : bool
        Learn ``log_bandwidth = -log w`` in place of w: w stays positive, and a step changes it by a factor whatever
        the unit of the data. The parameter, and the entry in the state dict, is then `log_bandwidth`; `w` is computed
        from it.
    exclude_self : bool
        In training mode, leave key i out for query i (leave-one-out), so that
        ``net(x_train, x_train, y_train)`` needs no (n, n - 1) copies of the data. As with dropout, ``net.eval()``
        turns it off. **In training mode it also acts on any other inputs of equal length**: call `eval` before
        predicting, or use the argument of the call, which says for that one call whether key i is left out.
    method, backend : str
        As for `nwfast.nadaraya_watson`.
    device, dtype
        Of the parameter. Without: those of a tensor `w`, else torch's defaults.
    **kwargs
        Passed to `torch.nn.Module`.

    Attributes
    ----------
    w : Parameter
        Inverse bandwidth; its sign does not matter. With `log_bandwidth`, a tensor computed from that parameter.
    log_bandwidth : Parameter
        With ``log_bandwidth=True`` only: the log of the bandwidth 1/w.

    Raises
    ------
    ValueError
        A start value that is not finite, or is 0 with `log_bandwidth`; an unknown method.

    Notes
    -----
    w is converted to the dtype of the queries where that is the wider one (float64 data and a float32 parameter),
    as in the textbook module. Calls outside `torch.func` transforms and export keep a reference to the last queries
    and keys, for `attention_weights`; copies and pickles of the module leave it out. Calls that repeat the
    same keys and values, from 4096 keys on, share a `nwfast.KeyIndex`: epochs of training sort them once, and
    predictions with one w take a time that does not depend on n. It holds a sorted copy of both, and is left out too.

    Examples
    --------
    >>> import torch, nwfast
    >>> x = torch.linspace(0.0, 5.0, 50)
    >>> y = torch.sin(x)
    >>> net = nwfast.NWKernelRegression(w=1.0)
    >>> loss = ((net(x, x, y, exclude_self=True) - y) ** 2 / 2).sum()
    >>> loss.backward()
    >>> net.w.grad.shape
    torch.Size([1])
    >>> net.attention_weights.shape
    torch.Size([50, 50])
    """

    def __init__(
        self,
        *,
        w: float | Tensor | None = None,
        log_bandwidth: bool = False,
        exclude_self: bool = False,
        method: str = "auto",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_method(method)
        self.exclude_self = exclude_self
        self.method = method
        self.backend = backend
        self._last_call: _Call | None = None
        self._index: KeyIndex | None = None
        self._seen: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = (
            None  # keys and values of the last call
        )
        start = _start(w, device, dtype)
        self._learns_log = log_bandwidth
        if log_bandwidth:
            if w is None:
                start = start.clamp(min=torch.finfo(start.dtype).tiny)  # the generator may give 0
            if (start == 0).any():
                raise ValueError("w must not be 0 with log_bandwidth=True: its bandwidth 1/w is infinite")
            self.log_bandwidth = nn.Parameter(-start.abs().log())
        else:
            # Not by attribute, which finds the property of this name in the way.
            self._parameters["w"] = nn.Parameter(start)

    @property
    def w(self) -> Tensor:
        """Inverse bandwidth, in the inverse unit of the queries."""
        if self._learns_log:
            return torch.exp(-self.log_bandwidth)
        parameter = self._parameters.get("w")
        if parameter is None:
            raise AttributeError("w")  # torch.nn.utils.parametrize moves it away and looks whether it is gone
        return parameter

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, exclude_self: bool | None = None
    ) -> Tensor:
        """Regress values on keys at the queries.

        Parameters
        ----------
        queries, keys, values : Tensor
            (M,), (n,), (n,) with keys shared by all queries, (M,), (M, n), (M, n) with one row of keys a query, or
            (..., M, D), (..., n, D), (..., n, C): every form that `nwfast.nadaraya_watson` takes.
        exclude_self : bool, optional
            Leave key i out for query i. Default: as given to the constructor, in training mode.

        Returns
        -------
        Tensor
            (M,), or (..., M, C).
        """
        if exclude_self is None:
            exclude_self = self.exclude_self and self.training
        w = self.w
        if isinstance(queries, Tensor) and w.dtype != queries.dtype:
            w = _widened(w, queries.dtype)
        index = self._index_of(keys, values) if isinstance(keys, Tensor) and keys.ndim == 1 else None
        if index is not None:
            out = index(queries, w, exclude_self=exclude_self)
        else:
            out = nadaraya_watson(
                queries, keys, values, w, exclude_self=exclude_self, method=self.method, backend=self.backend
            )
        # nn.Module.__setattr__ would cost more than all the rest of this method's bookkeeping.
        object.__setattr__(self, "_last_call", _remember(queries, keys, w, exclude_self))
        return out

    def _index_of(self, keys: Tensor, values: Any) -> KeyIndex | None:
        """An index of these very tensors from the second call with them on; None before, and where it is of no use."""
        if keys.shape[0] < _INDEXED_KEYS or torch.compiler.is_compiling() or is_transformed():
            return None
        if (
            not isinstance(values, Tensor)
            or keys.device.type != "cpu"
            or keys.requires_grad
            or values.requires_grad
        ):
            return None
        if self._index is not None and self._index.is_of(keys, values):
            return self._index
        repeated = self._seen is not None and self._seen[0]() is keys and self._seen[1]() is values
        self._seen = weakref.ref(keys), weakref.ref(values)
        self._index = KeyIndex(keys, values, method=self.method, backend=self.backend) if repeated else None
        return self._index

    @property
    def attention_weights(self) -> Tensor:
        """Weights of the last call, (M, n) or (..., M, n), with the w of that call: rows sum to 1, no gradient.

        They are computed each time they are asked for, in O(M n) memory, and not kept. For weights with a gradient
        see `nwfast.attention_weights`.

        Raises
        ------
        RuntimeError
            There was no call yet, or its queries or keys have been changed in place since.
        """
        last = self._last_call
        if last is None:
            raise RuntimeError(
                "attention_weights are those of the last call, and there is none yet: call the module first "
                "(calls inside torch.func transforms and torch.export do not count)"
            )
        if last.versions is not None and last.versions != (last.queries._version, last.keys._version):
            raise RuntimeError(
                "attention_weights are not known any more: queries or keys were changed in place since the call"
            )
        with torch.no_grad():
            return attention_weights(last.queries, last.keys, last.w, exclude_self=last.exclude_self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the model must not carry the data of its last call.
        return {**self.__dict__, "_last_call": None, "_index": None, "_seen": None}

    def extra_repr(self) -> str:
        """Options that differ from their defaults, and the shape of w where it is not (1,)."""
        shape = tuple(self.w.shape)
        shown = [f"w={shape}"] if shape != (1,) else []
        options = {"log_bandwidth": self._learns_log, "exclude_self": self.exclude_self}
        shown += [f"{name}=True" for name, on in options.items() if on]
        choices = {"method": self.method, "backend": self.backend}
        shown += [f"{name}={choice!r}" for name, choice in choices.items() if choice != "auto"]
        return ", ".join(shown)


def _start(w: float | Tensor | None, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """The start value of w as a tensor of its own."""
    if w is None:
        return torch.rand((1,), device=device, dtype=dtype)
    if not isinstance(w, Tensor):
        if not math.isfinite(w):
            raise ValueError(f"w must be finite, got {w}")
        return torch.full((1,), float(w), device=device, dtype=dtype)
    if not w.isfinite().all():
        raise ValueError("w must be finite, got a tensor with entries that are not")
    start = w.detach().to(device=device, dtype=dtype, copy=True)
    return start.reshape(1) if start.ndim == 0 else start


def _widened(w: Tensor, dtype: torch.dtype) -> Tensor:
    """`w` in `dtype` if that loses nothing; otherwise as it is, for the op to judge."""
    return w.to(dtype) if torch.promote_types(w.dtype, dtype) == dtype else w


def _remember(queries: Tensor, keys: Tensor, w: Tensor, exclude_self: bool) -> _Call | None:
    compiling = torch.compiler.is_compiling()
    if is_transformed() or (compiling and torch.compiler.is_exporting()):
        return None  # wrapped tensors, dead once the transform returns
    versions = None
    if not (compiling or queries.is_inference() or keys.is_inference()):
        versions = queries._version, keys._version
    if queries.requires_grad:
        queries = queries.detach()
    if keys.requires_grad:
        keys = keys.detach()
    return _Call(queries, keys, w.detach().clone(), exclude_self, versions)
