"""`NWKernelRegression`, the op as a module with a learnable inverse bandwidth."""

import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .functional import attention_weights, nadaraya_watson
from .leave_one_out import leave_one_out_loss
from .op.call import is_transformed
from .validation import NAMES_OF_BANDWIDTH, check_method, unexpected


class _Call(NamedTuple):
    """What `attention_weights` needs of the last call: copies, which no later change of the data reaches."""

    queries: Tensor | None  # None where the matrix of weights would be beyond any memory
    keys: Tensor | None
    w: Tensor
    exclude_self: bool
    compiled: bool


class _OwnCall(threading.local):
    """The last call of each thread."""

    call: _Call | None = None


# Of calls with more pairs than this no copies are kept: their weights would take 16 GB and more.
_MOST_PAIRS = 1 << 32
_INFINITE_BANDWIDTH = "w must not be 0 with log_bandwidth=True: its bandwidth 1/w is infinite"
_NO_CALL = (
    "attention_weights are those of the last call, and there is none yet: call the module first "
    "(calls inside torch.func transforms, torch.export and torch.jit.trace do not count)"
)


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
    as in the textbook module. Entries of w that training makes infinite or NaN give NaN.

    Nothing that a call returns depends on calls before it or in other threads: keys that many calls share can be
    prepared, by request, in a `nwfast.KeyIndex`. For `attention_weights` calls outside `torch.func` transforms and
    export keep copies of their queries, keys and w (up to 2**32 pairs); copies and pickles of the module leave
    them out.

    Assigning a number or a tensor to `w` with `log_bandwidth` sets that parameter to ``-log |w|``. Without it `w` is a
    parameter like any other, also for `torch.nn.utils.prune`, `parametrize` and `weight_norm`.

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
        wrong = NAMES_OF_BANDWIDTH.keys() & kwargs.keys()
        if wrong:
            raise unexpected(type(self).__name__, wrong)
        super().__init__(**kwargs)
        check_method(method)
        self.exclude_self = exclude_self
        self.method = method
        self.backend = backend
        self._last_call: _Call | None = None  # of any thread
        self._own_call = _OwnCall()
        start = _start(w, device, dtype)
        self._learns_log = log_bandwidth
        if log_bandwidth:
            if w is None:
                start = start.clamp(min=torch.finfo(start.dtype).tiny)  # the generator may give 0
            if (start == 0).any():
                raise ValueError(_INFINITE_BANDWIDTH)
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
            parameter = self.__dict__.get("w")  # what torch.nn.utils.prune and weight_norm compute goes there
        if parameter is None:
            raise AttributeError("w")  # torch.nn.utils.parametrize moves it away and looks whether it is gone
        return parameter

    @w.setter
    def w(self, w: Tensor) -> None:
        # nn.Module.__setattr__ takes parameters itself, where they have been registered, and refuses what is none.
        self.__dict__["w"] = w

    @w.deleter
    def w(self) -> None:
        self.__dict__.pop("w", None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "w" and self.__dict__.get("_learns_log", False):
            self._set_log_bandwidth(value)
        else:
            super().__setattr__(name, value)

    def _set_log_bandwidth(self, w: float | Tensor) -> None:
        parameter = self.log_bandwidth
        start = _start(w, parameter.device, parameter.dtype)
        if start.shape != parameter.shape:
            raise ValueError(f"w must have shape {tuple(parameter.shape)}, got {tuple(start.shape)}")
        if (start == 0).any():
            raise ValueError(_INFINITE_BANDWIDTH)
        with torch.no_grad():
            parameter.copy_(-start.abs().log())

    def __getattr__(self, name: str) -> Any:
        # Reached where the property raises AttributeError, whose message would be lost otherwise.
        if name == "attention_weights":
            raise AttributeError(_NO_CALL)
        return super().__getattr__(name)

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
        out = nadaraya_watson(
            queries, keys, values, w, exclude_self=exclude_self, method=self.method, backend=self.backend
        )
        call = _remember(queries, keys, w, exclude_self)
        # nn.Module.__setattr__ would cost more than all the rest of this method's bookkeeping.
        object.__setattr__(self, "_last_call", call)
        if not torch.compiler.is_compiling():
            self._own_call.call = call
        return out

    def leave_one_out_loss(
        self,
        x: Tensor,
        y: Tensor,
        *,
        key_weight: Tensor | None = None,
        degree: int = 0,
        reduction: str = "mean",
    ) -> Tensor:
        """`nwfast.leave_one_out_loss` of examples x, y with the module's w: what to train w by.

        It computes loss and derivative in one pass. It leaves key i out for query i whatever `exclude_self` says, and
        `attention_weights` does not count it as a call.

        Parameters
        ----------
        x, y, key_weight, degree, reduction
            As for `nwfast.leave_one_out_loss`.

        Returns
        -------
        Tensor
            A scalar, or a loss for each example with ``reduction="none"``.
        """
        w = self.w
        if isinstance(x, Tensor) and w.dtype != x.dtype:
            w = _widened(w, x.dtype)
        return leave_one_out_loss(
            x,
            y,
            w,
            key_weight=key_weight,
            degree=degree,
            reduction=reduction,
            method=self.method,
            backend=self.backend,
        )

    @property
    def attention_weights(self) -> Tensor:
        """Weights of the last call, (M, n) or (..., M, n), with the w of that call; rows sum to 1, no gradient.

        They are computed each time they are asked for, in O(M n) memory, and not kept. For weights with a gradient
        see `nwfast.attention_weights`. A thread gets those of its own last call, and one that has made none those of
        the last call of all; after a compiled call the last one counts, of whichever thread.

        Raises
        ------
        AttributeError
            There was no call yet.
        RuntimeError
            The last call had more than 2**32 pairs of a query and a key.
        """
        last, own = self._last_call, self._own_call.call
        if own is not None and (last is None or not last.compiled):
            last = own
        if last is None:
            raise AttributeError(_NO_CALL)
        if last.queries is None or last.keys is None:
            raise RuntimeError(
                f"attention_weights of the last call would be a matrix of more than {_MOST_PAIRS} entries: call "
                "nwfast.attention_weights with some of the queries at a time"
            )
        with torch.no_grad():
            return attention_weights(last.queries, last.keys, last.w, exclude_self=last.exclude_self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the model must not carry the data of its last call.
        state = {**self.__dict__, "_last_call": None}
        del state["_own_call"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own_call = _OwnCall()

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
    if is_transformed() or (torch.compiler.is_exporting() if compiling else torch._C._is_tracing()):
        return None  # wrapped tensors, dead once the transform returns
    own_w = w.detach().clone()
    if not compiling and _pairs(queries, keys) > _MOST_PAIRS:
        return _Call(None, None, own_w, exclude_self, False)
    own_queries = queries.detach().clone()
    own_keys = own_queries if keys is queries else keys.detach().clone()
    return _Call(own_queries, own_keys, own_w, exclude_self, compiling)


def _pairs(queries: Tensor, keys: Tensor) -> int:
    """So many entries the matrix of weights has, more where leading dimensions of both are broadcast."""
    if queries.ndim == 1:
        return keys.numel() if keys.ndim == 2 else queries.numel() * keys.numel()
    rows, columns = queries.shape[-2], keys.shape[-2]
    return max(queries.numel() * columns, keys.numel() * rows) // queries.shape[-1]
