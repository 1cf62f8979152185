"""One call of the op: which kernel it takes, and how it gets there.

One call is routed by what surrounds it:

* forward-mode AD (jvp, jacfwd, dual tensors), compiling a functorch transform, or export to ONNX: the plain-PyTorch
  reference. No kernel computes jvps, inside a transform compilation would drop an autograd.Function's formula, and
  ONNX has no such operators;
* compiling otherwise: the operator, which carries a fake and an autograd formula (`schema`);
* eager, nothing to differentiate: the operator, below autograd;
* eager, reverse mode: an autograd.Function around the same operators (`autograd`), at half the cost of the operator's
  own formula; both of these take small calls in one feature a short way past the canonical form, see `short_way`;
* eager, inside functorch transforms (grad, vmap): an autograd.Function with a rule for vmap, which costs more a call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from ..backends import is_captured, reference
from ..constants import CHOICE_PAIRS
from . import by_reference
from .autograd import drop_last, is_single
from .schema import KERNELS


def nadaraya_watson(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    key_weight: Tensor | None,
    exclude_self: bool,
    return_lse: bool,
    drop: int,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of canonical inputs by a named kernel or "reference", differentiable; lse is None unless asked for.

    `drop` dimensions of size 1 are dropped at the end of out, and one less at the end of lse.
    """
    compiling = is_captured()
    functorch, forward_mode = torch._C._are_functorch_transforms_active(), forward_ad._current_level >= 0
    if forward_mode or kernel == "reference" or (compiling and (functorch or _is_for_onnx())):
        if forward_mode and not compiling:
            by_reference.require_memory("forward-mode derivative", query, key, value)
        out, lse = reference.forward(query, key, value, w, key_weight, exclude_self)
        return drop_last(out, drop), drop_last(lse, drop - 1) if return_lse else None
    kernels = KERNELS[kernel]
    differentiate = _needs_gradient(query, key, value, w, key_weight)
    if functorch and not _is_differentiated(query, key, value, w, key_weight):
        out, lse = kernels.mapped.apply(query, key, value, w, key_weight, exclude_self, return_lse)
    elif functorch:
        tangents = not return_lse and is_single(query, key, value)
        out, lse = kernels.transformable.apply(
            query, key, value, w, key_weight, exclude_self, tangents, tangents
        )[:2]
    elif compiling:
        # What torch.jit.trace writes down serves with and without gradients.
        differentiate = differentiate and torch.compiler.is_compiling()
        tangents = differentiate and not return_lse and is_single(query, key, value)
        tangent_w, tangent_q = tangents and w.requires_grad, tangents and query.requires_grad
        out, lse = kernels.forward(query, key, value, w, key_weight, exclude_self, tangent_w, tangent_q)[:2]
    elif differentiate:
        outputs = kernels.eager.apply(query, key, value, w, key_weight, exclude_self, return_lse, drop)
        return outputs if return_lse else (outputs, None)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            inputs = query, key, value, w, key_weight, exclude_self
            if kernels.stateless is None:
                out, lse, *_ = kernels.forward(*inputs, False, False)
            else:
                out, lse, *_ = kernels.stateless(*inputs, return_lse, False, False)
            return drop_last(out, drop), drop_last(lse, drop - 1) if return_lse else None
    return drop_last(out, drop), drop_last(lse, drop - 1) if return_lse else None


def choose_kernel(backend: str, method: str, features: int, pairs: int) -> str:
    """The kernel of a resolved backend for this method and so many pairs of a query and a key.

    Which method is faster depends on the data, so the choice itself is in the kernels. Only where it cannot matter, and
    the look at the data would, is it made here: by shapes, which under compilation would become guards.
    """
    if (
        "fgt" not in backends.METHODS.get(backend, ())
        or method == "dense"
        or (features > backends.FGT_FEATURES[backend] and method == "auto")
    ):
        return backend
    if method == "fgt":
        most = backends.FGT_FEATURES[backend]
        if features > most:
            serves = "one feature" if most == 1 else f"up to {most} features"
            raise ValueError(
                f"method='fgt' is for data of {serves} on backend={backend!r}, got query and key of "
                f"D = {features} features"
            )
        return f"{backend}_fgt"
    if not is_captured() and pairs <= CHOICE_PAIRS:
        return backend
    return f"{backend}_auto"


def _is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a transform, or the graph outside of all, may ask for derivatives (private API, pinned by a test)."""
    if not torch.is_grad_enabled():
        return False
    functorch = torch._C._functorch
    if any(at.key() != functorch.TransformType.Vmap for at in functorch.get_interpreter_stack()):
        return True
    for tensor in tensors:
        while tensor is not None and functorch.is_batchedtensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _is_for_onnx() -> bool:
    """Whether the program is for ONNX, which knows torch's own operators alone."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    return torch.onnx.is_in_onnx_export()


def is_transformed() -> bool:
    """Whether a functorch transform or forward-mode AD surrounds the call (private API, pinned by a test)."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
# How the native operators begin their refusals of tensors in other forms, before they allocate or compute anything.
_REFUSED = "nwfast: operators take"


def goes_short(query: Any, key: Any, value: Any, w: Any, key_weight: Any, most: int = 1) -> bool:
    """Whether these are plain CPU tensors of an eager call, outside of all transforms; query of `most` dimensions."""
    return (
        type(query) in _PLAIN
        and type(key) in _PLAIN
        and type(value) in _PLAIN
        and type(w) in _PLAIN
        and (key_weight is None or type(key_weight) in _PLAIN)
        and 0 < query.ndim <= most
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and w.is_cpu
        and (key_weight is None or key_weight.is_cpu)
        and (query.dtype is torch.float32 or query.dtype is torch.float64)
        and not is_captured()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


def is_refusal(error: RuntimeError, *tensors: Tensor) -> bool:
    """Whether a native operator refused the form of its tensors: any other error is a failure of the kernel."""
    return _REFUSED in str(error) or any(x.layout != torch.strided for x in tensors)


def short_way(
    backend: str,
    query: Any,
    key: Any,
    value: Any,
    w: Any,
    key_weight: Any,
    exclude_self: bool,
    method: str,
    return_lse: bool,
) -> Any:
    """The result, out or (out, lse), of a call that a CPU backend takes as it is; None for any other.

    That is a call on plain tensors in a form of one feature. With 50 queries the sums take a quarter of the time of
    the checks and views that a general call needs. What is not exactly of such a form is refused, by the native
    operators themselves, and the checks of `validation` then say what was wrong.
    """
    if not goes_short(query, key, value, w, key_weight):
        return None
    if backend == "numba" or backends._why_not("native"):
        return _short_way_of_numba(
            backend, query, key, value, w, key_weight, exclude_self, method, return_lse
        )
    kernels = KERNELS[
        choose_kernel("native", method, 1, key.numel() * (query.numel() if key.ndim == 1 else 1))
    ]
    try:
        if _needs_gradient(query, key, value, w, key_weight):
            return kernels.eager.apply(query, key, value, w, key_weight, exclude_self, return_lse, 0)
        with torch._C._AutoDispatchBelowAutograd():
            outputs = kernels.stateless(
                query, key, value, w, key_weight, exclude_self, return_lse, False, False
            )
        return outputs[:2] if return_lse else outputs[0]
    except RuntimeError as error:
        if is_refusal(error, query, key, value, w):
            return None
        raise  # a failure of the kernel, as memory that it does not get


def _short_way_of_numba(backend, query, key, value, w, key_weight, exclude_self, method, return_lse) -> Any:
    """Keys (N,) and values (N,): the module's functions, past the dispatcher, which takes a third of such a call."""
    m, n, dtype = query.numel(), key.numel(), query.dtype
    if (
        backends._why_not("numba")
        or not key.ndim == value.ndim == 1
        or not value.numel() == n > 0
        or w.numel() != 1
        or w.ndim > 1
        or not key.dtype is value.dtype is w.dtype is dtype
        or (key_weight is not None and not (key_weight.dtype is dtype and key_weight.shape == key.shape))
        or (exclude_self and m != n)
        or any(x.layout is not torch.strided for x in (query, key, value, w))
    ):
        return None
    if backend == "auto":
        backends.say_fallback("numba")
    function, output = KERNELS[choose_kernel("numba", method, 1, m * n)].direct
    needs_gradient = _needs_gradient(query, key, value, w, key_weight)
    query, key, value = query.unsqueeze(-1), key.unsqueeze(-1), value.unsqueeze(-1)
    w = w if w.ndim else w.unsqueeze(0)
    if needs_gradient:
        return function.apply(query, key, value, w, key_weight, exclude_self, return_lse, 1)
    out, lse, *_ = output(query, key, value, w, key_weight, exclude_self, return_lse, False, False)
    return (out.squeeze(-1), lse) if return_lse else out.squeeze(-1)


def _needs_gradient(query: Tensor, key: Tensor, value: Tensor, w: Tensor, key_weight: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        w.requires_grad
        or query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (key_weight is not None and key_weight.requires_grad)
    )
