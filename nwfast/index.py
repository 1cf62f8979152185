"""`KeyIndex`: keys and values that many calls share, sorted once and, for a fixed bandwidth, compressed once."""

from typing import Any, Literal, NamedTuple, NoReturn, overload

import torch
from torch import Tensor

from . import backends
from .functional import nadaraya_watson
from .op import call, prepared
from .validation import as_declared, canonical, check_kind, check_method, unexpected


class _Compressed(NamedTuple):
    """Compressed keys and the bandwidth that they are for."""

    w: list[float]
    tensors: list[Tensor]


_Held = tuple[Tensor, Tensor, Tensor | None]
_MOST_FEATURES = 3


class KeyIndex:
    r"""Keys and values in one to three features, prepared for calls that repeat: training, predictions in portions.

    ``index(query, w)`` computes what ``nadaraya_watson(query, key, value, w)`` does, to rounding. With one feature the
    keys are sorted once, when the index is made. For a fixed w they are also compressed once, at the first call with
    that w that asks for no gradient, and from then on the time of a call does not depend on N. With two and three
    features this is so in C++ where the grid's boxes hold many keys: queries in boxes without a key, or where keys are
    too sparse for a series, are computed from the keys.

    Parameters
    ----------
    key : Tensor
        Observed inputs, (N,) or (N, D), D at most 3.
    value : Tensor
        Observed outputs, (N,) or (N, C); the dtype and device of key.
    key_weight : Tensor, optional
        Weights a_j >= 0, (N,); 0 masks a key out.
    method, backend : str
        As for `nwfast.nadaraya_watson`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `nwfast.nadaraya_watson`; ValueError also for keys of more than three features or with batch dimensions.

    Notes
    -----
    It holds copies of key, value and key_weight, made with it: no later change of those tensors, in whatever way,
    reaches it, and calls from several threads may share it. Memory: that sorted copy, the order (8 bytes a key) and the
    compressed keys of the last w: most where a box holds about 8 keys, then up to 24 bytes a key for each channel and
    one more; with several features up to 256 bytes.

    Gradients reach query and w, and key, value and key_weight where these required them when the index was made (not
    under `torch.no_grad`): the copies keep the graph of what they are copies of. Calls that need a gradient visit all
    keys, in their sorted order. A copy or a pickle of the index holds the data without a graph, and sorts and
    compresses it anew; `torch.load` takes it as it is, with ``weights_only=True``, once nwfast is imported.

    Examples
    --------
    >>> import torch, nwfast
    >>> key = torch.tensor([2.0, 0.0, 1.0])
    >>> index = nwfast.KeyIndex(key, value=key**2)
    >>> index(torch.tensor([1.0, 1.9]), w=10.0)
    tensor([1., 4.])
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        *,
        key_weight: Tensor | None = None,
        method: str = "auto",
        backend: str = "auto",
    ):
        self._check(key, value, key_weight, method)
        backends.resolve(backend, key.device, method)
        self.method, self.backend = method, backend
        if torch.is_inference_mode_enabled():  # copies that autograd takes too
            with torch.inference_mode(False):
                weight = key_weight if key_weight is None else key_weight.detach()
                self._take(key.detach(), value.detach(), weight)
        else:
            self._take(key, value, key_weight)
        self._compressed: _Compressed | None = None  # a call reads it once: another thread's may replace it

    @staticmethod
    def _check(key: Tensor, value: Tensor, key_weight: Tensor | None, method: str) -> None:
        check_method(method)
        check_kind("key", key)
        if key.ndim not in (1, 2) or (key.ndim == 2 and not 1 <= key.shape[1] <= _MOST_FEATURES):
            raise ValueError(f"key must have shape (N,) or (N, D), D at most 3, got {tuple(key.shape)}")
        canonical(key[:1], key, value, 1.0, key_weight, exclude_self=False)

    def _take(self, key: Tensor, value: Tensor, key_weight: Tensor | None) -> None:
        """Copies of the data, with one feature in ascending order of the keys."""
        self._held: _Held = (
            key.clone(),
            value.clone(),
            key_weight if key_weight is None else key_weight.clone(),
        )
        flat = self._held[0].detach().reshape(-1)
        self._order: Tensor | None = None  # None where the keys are in order as they are
        one_feature = key.ndim == 1 or key.shape[1] == 1
        if one_feature and not bool((flat[1:] >= flat[:-1]).all()):
            self._order = flat.argsort(stable=True)
        # Where gradients reach the copies each call sorts them anew: backward passes free the graph of what they used.
        self._is_sorted = self._order is None
        if not any(tensor is not None and tensor.requires_grad for tensor in self._held):
            self._held = self._in_order()
            self._is_sorted = True

    def __len__(self) -> int:
        """The number of keys N."""
        return self._held[0].shape[0]

    def __repr__(self) -> str:
        key, value, key_weight = self._held
        shapes = f"key {tuple(key.shape)}, value {tuple(value.shape)}" + (
            ", key_weight" if key_weight is not None else ""
        )
        return f"KeyIndex({shapes}, {key.dtype}, {key.device})"

    @overload
    def __call__(
        self,
        query: Tensor,
        w: float | Tensor = ...,
        *,
        exclude_self: bool = ...,
        return_lse: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def __call__(
        self, query: Tensor, w: float | Tensor = ..., *, exclude_self: bool = ..., return_lse: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    @as_declared
    def __call__(
        self,
        query: Tensor,
        w: float | Tensor = 1.0,
        *,
        exclude_self: bool = False,
        return_lse: bool = False,
        **unknown: NoReturn,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Regress the values on the keys at the queries.

        Parameters
        ----------
        query : Tensor
            (M,), or (M, D) where the keys are (N, D). To leave each key out for its own query pass the keys in the
            order in which they were given to the index.
        w : float or Tensor
            Inverse bandwidth, as for `nwfast.nadaraya_watson`.
        exclude_self : bool
            Leave key i out for query i, in the order of the keys as they were given; needs M == N.
        return_lse : bool
            Also return lse.

        Returns
        -------
        out, lse
            As of `nwfast.nadaraya_watson`.
        """
        if unknown:
            raise unexpected("KeyIndex.__call__", unknown)
        if not exclude_self:
            predicted = self._predict(query, w)
            if predicted is not None:
                return predicted if return_lse else predicted[0]
        key, value, key_weight = self._in_order()
        order = self._order if exclude_self else None
        if order is not None:
            if not isinstance(query, Tensor) or query.shape[:1] != key.shape[:1]:
                order = None  # for the op to refuse
            else:
                query = query[order]
        result = nadaraya_watson(
            query,
            key,
            value,
            w,
            key_weight=key_weight,
            exclude_self=exclude_self,
            method=self.method,
            backend=self.backend,
            return_lse=return_lse,
        )
        if order is None:
            return result
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows = -2 if value.ndim == 2 else -1
        if isinstance(result, tuple):
            out, lse = result
            return out.index_select(rows, places), lse.index_select(-1, places)
        return result.index_select(rows, places)

    def __getstate__(self) -> dict[str, Any]:
        """Tensors and strings alone, without a graph, the keys in the order in which they were given."""
        key, value, key_weight = self._held
        if self._is_sorted and self._order is not None:
            places = self._order.argsort()
            key, value = key[places], value[places]
            key_weight = key_weight if key_weight is None else key_weight[places]
        return {
            "key": key.detach(),
            "value": value.detach(),
            "key_weight": key_weight if key_weight is None else key_weight.detach(),
            "method": self.method,
            "backend": self.backend,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What a file says is checked as what a caller says: torch.load may be given any file.
        data, method = (state["key"], state["value"], state["key_weight"]), state["method"]
        self._check(*data, method)
        self.method, self.backend = method, state["backend"]
        with torch.inference_mode(False):
            self._take(*data)
        self._compressed = None

    def _in_order(self) -> _Held:
        key, value, key_weight = self._held
        if self._is_sorted or self._order is None:
            return self._held
        order = self._order
        return key[order], value[order], key_weight if key_weight is None else key_weight[order]

    def _predict(self, query: Tensor, w: float | Tensor) -> tuple[Tensor, Tensor] | None:
        """(out, lse) from compressed keys, or None where the call is one for the op."""
        if not self._is_sorted or call.is_transformed() or torch.compiler.is_compiling():
            return None
        features = 1 if self._held[0].ndim == 1 else self._held[0].shape[1]
        if isinstance(w, Tensor) and w.numel() not in (1, features):
            return None
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in (query, w, *self._held)
        ):
            return None
        query, key, value, scale, key_weight, drop = canonical(
            query, *self._held[:2], w, self._held[2], False
        )
        if query.ndim > 2:  # w has leading dimensions
            return None
        backend = backends.resolve(self.backend, query.device, self.method)
        kernel = call.choose_kernel(backend, self.method, features, query.shape[0] * key.shape[0])
        if kernel == backend:
            return None
        numbers = scale.tolist()
        compressed = self._compressed
        if compressed is None or compressed.w != numbers:
            tensors = prepared.compress(kernel, key, value, scale, key_weight)
            compressed = self._compressed = _Compressed(numbers, tensors)
        if not compressed.tensors:
            return None
        if features == 1:
            return prepared.predict(kernel, compressed.tensors, query, drop)
        out, lse, left = prepared.predict_several(compressed.tensors, query, drop)
        if len(left):
            out[left], lse[left] = nadaraya_watson(
                query[left],
                *self._held[:2],
                w,
                key_weight=self._held[2],
                method=self.method,
                backend=self.backend,
                return_lse=True,
            )
        return out, lse


torch.serialization.add_safe_globals([KeyIndex])  # it is made of tensors and strings, and checks them
