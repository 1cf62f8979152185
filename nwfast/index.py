"""`KeyIndex`: keys and values that many calls share, sorted once and, for a fixed bandwidth, compressed once."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import backends, ops
from .functional import nadaraya_watson
from .validation import canonical, check_method


class _Compressed(NamedTuple):
    """Compressed keys and the bandwidth that they are for."""

    w: float
    tensors: list[Tensor]


class KeyIndex:
    r"""Keys and values in one feature, prepared for calls that repeat: training over epochs, predictions in portions.

    ``index(query, w)`` computes what ``nadaraya_watson(query, key, value, w)`` does. The keys are sorted once, when the
    index is made. For a fixed w they are also compressed once, at the first call with that w that asks for no gradient,
    and from then on the time of a call does not depend on N.

    Parameters
    ----------
    key : Tensor
        Observed inputs, (N,) or (N, 1).
    value : Tensor
        Observed outputs, (N,) or (N, C); the dtype and device of key.
    key_weight : Tensor, optional
        Weights a_j >= 0, (N,); 0 masks a key out.
    method, backend : str
        As for `nwfast.nadaraya_watson`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `nwfast.nadaraya_watson`; ValueError also for keys of more than one feature or with batch dimensions.

    Notes
    -----
    Memory: a sorted copy of what is given, the order (8 bytes a key) and the compressed keys of the last w: most where
    a box holds about 8 keys, then up to 24 bytes a key for each channel and one more. Gradients reach key, value and
    key_weight as well as w and query; calls that need one visit all keys, in their sorted order. The tensors that were
    given must not be changed in place afterwards.

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
        check_method(method)
        if not isinstance(key, Tensor):
            raise TypeError(f"key must be a torch.Tensor, got {type(key).__name__}")
        if key.ndim not in (1, 2) or (key.ndim == 2 and key.shape[1] != 1):
            raise ValueError(f"key must have shape (N,) or (N, 1), one feature, got {tuple(key.shape)}")
        canonical(key[:1], key, value, 1.0, key_weight, exclude_self=False)
        backends.resolve(backend, key.device, method)
        self.method, self.backend = method, backend
        self._given = key, value, key_weight
        self._versions = self._count_changes()
        flat = key.detach().reshape(-1)
        self._order: Tensor | None = None  # None where the keys are in order as they are
        if not bool((flat[1:] >= flat[:-1]).all()):
            self._order = flat.argsort(stable=True)
        self._sorted = None if self._needs_gradient() else self._in_order()
        self._compressed: _Compressed | None = None

    def __len__(self) -> int:
        """The number of keys N."""
        return self._given[0].shape[0]

    def is_of(self, key: Tensor, value: Tensor) -> bool:
        """Whether the index was made of these very tensors, without a key weight, and they have not changed since."""
        return (
            key is self._given[0]
            and value is self._given[1]
            and self._given[2] is None
            and self._count_changes() == self._versions
        )

    def __repr__(self) -> str:
        key, value, key_weight = self._given
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

    def __call__(
        self,
        query: Tensor,
        w: float | Tensor = 1.0,
        *,
        exclude_self: bool = False,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Regress the values on the keys at the queries.

        Parameters
        ----------
        query : Tensor
            (M,), or (M, 1) where the keys are (N, 1). To leave each key out for its own query pass the keys as they
            were given to the index: that tensor itself is recognised and not sorted again.
        w : float or Tensor
            Inverse bandwidth, a scalar or (1,).
        exclude_self : bool
            Leave key i out for query i, in the order of the keys as they were given; needs M == N.
        return_lse : bool
            Also return lse.

        Returns
        -------
        out, lse
            As of `nwfast.nadaraya_watson`.

        Raises
        ------
        RuntimeError
            A tensor that the index was made of has been changed in place since.
        """
        if not torch.compiler.is_compiling():
            self._require_unchanged()
        if not exclude_self:
            predicted = self._predict(query, w)
            if predicted is not None:
                return predicted if return_lse else predicted[0]
        key, value, key_weight = self._in_order() if self._sorted is None else self._sorted
        restore = None
        if self._order is not None and isinstance(query, Tensor) and query.shape[:1] == key.shape[:1]:
            if query is self._given[0]:
                query, restore = key, self._order
            elif exclude_self:
                query, restore = query[self._order], self._order
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
        if restore is None:
            return result
        places = torch.empty_like(restore).scatter_(
            0, restore, torch.arange(len(restore), device=restore.device)
        )
        if isinstance(result, tuple):
            out, lse = result
            return out[places], lse[places]
        return result[places]

    def __getstate__(self) -> dict[str, Any]:
        self._require_unchanged()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._versions = self._count_changes()  # copies of tensors count anew

    def _require_unchanged(self) -> None:
        if self._count_changes() != self._versions:
            raise RuntimeError("KeyIndex: key, value or key_weight were changed in place; make a new index")

    def _in_order(self) -> tuple[Tensor, Tensor, Tensor | None]:
        key, value, key_weight = self._given
        if self._order is None:
            return key, value, key_weight
        order = self._order
        return key[order], value[order], key_weight if key_weight is None else key_weight[order]

    def _needs_gradient(self) -> bool:
        return any(tensor is not None and tensor.requires_grad for tensor in self._given)

    def _count_changes(self) -> tuple[int, ...]:
        """How often each tensor was changed in place; inference tensors do not count."""
        return tuple(
            tensor._version for tensor in self._given if tensor is not None and not tensor.is_inference()
        )

    def _predict(self, query: Tensor, w: float | Tensor) -> tuple[Tensor, Tensor] | None:
        """(out, lse) from compressed keys, or None where the call is one for the op."""
        if self._sorted is None or ops.is_transformed():
            return None
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (query, w)):
            return None
        query, key, value, w, key_weight, drop = canonical(
            query, *self._sorted[:2], w, self._sorted[2], False
        )
        backend = backends.resolve(self.backend, query.device, self.method)
        kernel = ops.choose_kernel(backend, self.method, 1, query.shape[0] * key.shape[0])
        if kernel == backend:
            return None
        number = w.item()
        compressed = self._compressed
        if compressed is None or compressed.w != number:
            compressed = self._compressed = _Compressed(
                number, ops.compress(kernel, key, value, w, key_weight)
            )
        return ops.predict(kernel, compressed.tensors, query, drop) if compressed.tensors else None
