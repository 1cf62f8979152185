"""The op: schemas, fakes, autograd, transforms. The only module that knows torch.library.

For each kernel (`nwfast.backends.operators`) there are two operators, `nwfast::<kernel>_forward` and
`nwfast::<kernel>_backward`, with the contract of `nwfast.backends`. Implementations come from the C++ extensions
(native, cuda) or from Python (numba, triton). The CPU's kernels have a third, `nwfast::<kernel>_output`, a forward
pass without the state that only gradients of keys, values and key weights need.

One call is routed by what surrounds it:

* forward-mode AD (jvp, jacfwd, dual tensors), compiling a functorch transform, or export to ONNX: the plain-PyTorch
  reference. No kernel computes jvps, inside a transform compilation would drop an autograd.Function's formula, and
  ONNX has no such operators;
* compiling otherwise: the operator, which carries a fake and an autograd formula;
* eager, nothing to differentiate: the operator, below autograd;
* eager, reverse mode: an autograd.Function around the same operators, at half the cost of the operator's own formula;
  both of these take small calls in one feature a short way past the canonical form, see `direct`;
* eager, inside functorch transforms (grad, vmap): an autograd.Function with a rule for vmap, which costs more a call.

All share one formula, `_formula`. Second derivatives differentiate the reference.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from ..backends import is_captured, reference
from ..backends.reference import arithmetic_dtype
from . import by_reference
from .by_reference import NEEDS

_FORWARD_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor w, Tensor? key_weight, bool exclude_self, bool tangent_w, "
    "bool tangent_q) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_OUTPUT_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor w, Tensor? key_weight, bool exclude_self, bool lse, "
    "bool tangent_w, bool tangent_q) -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor w, Tensor? key_weight, "
    "Tensor out, Tensor state, Tensor tangent_w, Tensor tangent_q, bool exclude_self, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


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
        return _drop(out, drop), _drop(lse, drop - 1) if return_lse else None
    kernels = _KERNELS[kernel]
    differentiate = torch.is_grad_enabled() and (
        w.requires_grad
        or query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (key_weight is not None and key_weight.requires_grad)
    )
    if functorch:  # a wrapped tensor may hide that it needs a gradient
        tangents = not return_lse and _scalar(query, key, value)
        out, lse = kernels.transformable.apply(
            query, key, value, w, key_weight, exclude_self, tangents, tangents
        )[:2]
    elif compiling:
        # What torch.jit.trace writes down serves with and without gradients.
        differentiate = differentiate and torch.compiler.is_compiling()
        tangents = differentiate and not return_lse and _scalar(query, key, value)
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
            return _drop(out, drop), _drop(lse, drop - 1) if return_lse else None
    return _drop(out, drop), _drop(lse, drop - 1) if return_lse else None


def choose_kernel(backend: str, method: str, features: int, pairs: int) -> str:
    """The kernel of a resolved backend for this method and so many pairs of a query and a key.

    Which method is faster depends on the data, so the choice itself is in the kernels. Only where it cannot matter, and
    the look at the data would, is it made here: by shapes, which under compilation would become guards.
    """
    if (
        "fgt" not in backends.METHODS.get(backend, ())
        or method == "dense"
        or (features != 1 and method == "auto")
    ):
        return backend
    if method == "fgt":
        if features != 1:
            raise ValueError(
                f"method='fgt' is for data of one feature, got query and key of D = {features} features"
            )
        return f"{backend}_fgt"
    if not is_captured() and pairs <= _DENSE_PAIRS:
        return backend
    return f"{backend}_auto"


# Up to so many pairs the dense method is as fast as any.
_DENSE_PAIRS = 1 << 16


def compress(kernel: str, key: Tensor, value: Tensor, w: Tensor, key_weight: Tensor | None) -> list[Tensor]:
    """Ascending keys (N, 1) with their values (N, C), compressed for one w; empty where that cannot serve.

    It is done in the arithmetic dtype.
    """
    dtype = arithmetic_dtype(key.dtype)
    key, value, w = key.detach().to(dtype), value.detach().to(dtype), w.detach().to(dtype)
    key_weight = key_weight if key_weight is None else key_weight.detach().to(dtype)
    if kernel.startswith("numba"):
        return backends.load("numba_fgt").compress(key, value, key_weight, w)
    compressed = torch.ops.nwfast.native_fgt_compress(key.squeeze(-1), value, w, key_weight)
    return list(compressed) if compressed[-1].numel() else []


def predict(kernel: str, compressed: list[Tensor], query: Tensor, drop: int) -> tuple[Tensor, Tensor] | None:
    """(out, lse) at queries (M, 1), in any order, from compressed keys, not differentiable; None if it cannot serve."""
    x = query.detach().to(arithmetic_dtype(query.dtype))
    if kernel.startswith("numba"):
        out, lse = backends.load("numba_fgt").predict(compressed, x)
    else:
        try:
            out, lse = torch.ops.nwfast.native_fgt_predict(x.squeeze(-1), *compressed)
        except RuntimeError as error:  # queries at 1e60 and beyond
            if _BEYOND_PREPARED in str(error):
                return None
            raise
    return _drop(out, drop).to(query.dtype), _drop(lse, drop - 1)


def _is_for_onnx() -> bool:
    """Whether the program is for ONNX, which knows torch's own operators alone."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    return torch.onnx.is_in_onnx_export()


def is_transformed() -> bool:
    """Whether a functorch transform or forward-mode AD surrounds the call (private API, pinned by a test)."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def direct(
    query: Any,
    key: Any,
    value: Any,
    w: Any,
    key_weight: Any,
    exclude_self: bool,
    method: str,
    return_lse: bool,
) -> Any:
    """The result, out or (out, lse), of a call that the native operators take as it is; None for any other.

    That is a call on plain tensors in a form of one feature. With 50 queries the sums take a quarter of the time of
    the checks and views that a general call needs. The operator refuses what is not exactly of such a
    form, and the checks of `validation` then say what was wrong.
    """
    if not (
        type(query) in _PLAIN
        and type(key) in _PLAIN
        and type(value) in _PLAIN
        and type(w) in _PLAIN
        and (key_weight is None or type(key_weight) in _PLAIN)
        and query.ndim == 1
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
        and not backends._why_not("native")
    ):
        return None
    kernels = _KERNELS[
        choose_kernel("native", method, 1, key.numel() * (query.numel() if key.ndim == 1 else 1))
    ]
    try:
        if torch.is_grad_enabled() and (
            w.requires_grad
            or query.requires_grad
            or key.requires_grad
            or value.requires_grad
            or (key_weight is not None and key_weight.requires_grad)
        ):
            return kernels.eager.apply(query, key, value, w, key_weight, exclude_self, return_lse, 0)
        with torch._C._AutoDispatchBelowAutograd():
            outputs = kernels.stateless(
                query, key, value, w, key_weight, exclude_self, return_lse, False, False
            )
        return outputs[:2] if return_lse else outputs[0]
    except RuntimeError as error:
        if _REFUSED in str(error) or any(x.layout != torch.strided for x in (query, key, value, w)):
            return None
        raise  # a failure of the kernel, as memory that it does not get


# How the native operators begin their refusals of tensors in other forms, before they allocate or compute anything.
_REFUSED = "nwfast: operators take"
# How native_fgt_predict begins its refusal.
_BEYOND_PREPARED = "nwfast: queries beyond"


def _drop(result: Tensor, dims: int) -> Tensor:
    if dims <= 0:
        return result
    return result.squeeze(-1) if dims == 1 else result.reshape(result.shape[:-2])


def _scalar(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tangents have a value for each feature and channel: worth their memory for one of each.

    They are derivatives of out alone, so a call that returns lse too goes without.
    """
    if query.ndim == 1:  # of a direct call
        return value.ndim == key.ndim
    return query.shape[-1] == 1 and value.shape[-1] == 1


_LIBRARY = torch.library.Library("nwfast", "FRAGMENT")


def _register_fake(name: str, fake: Callable) -> None:
    """As torch.library.register_fake, which takes half a millisecond to find out who calls it."""
    registry = torch._library.simple_registry.singleton  # private API, which the tests of fake tensors use
    registry.find(name).fake_impl.register(fake, __name__, lib=_LIBRARY)


def _register_autograd(operator: Any, backward: Callable, setup_context: Callable) -> None:
    """As torch.library.register_autograd, whose kernel takes a millisecond to make: made when it is first called."""

    @functools.cache
    def kernel() -> Callable:
        registration = torch._library.autograd  # private API, which compiled calls in the tests use
        return registration.make_autograd_impl(operator, registration.Info(backward, setup_context))

    def run(keyset, *args, **kwargs):
        return kernel()(keyset, *args, **kwargs)

    _LIBRARY.impl(operator._opname, run, "Autograd", with_keyset=True)


class _Kernels:
    """A kernel's operators, and the autograd.Functions around them."""

    def __init__(self, name: str):
        self.name = name
        forward_name, backward_name = f"nwfast::{name}_forward", f"nwfast::{name}_backward"
        torch.library.define(forward_name, _FORWARD_SCHEMA)
        torch.library.define(backward_name, _BACKWARD_SCHEMA)
        _register_fake(forward_name, _fake_forward)
        _register_fake(backward_name, _fake_backward)
        self.forward: Callable = getattr(torch.ops.nwfast, f"{name}_forward").default
        self.backward: Callable = getattr(torch.ops.nwfast, f"{name}_backward").default
        self.stateless: Any = None
        if name.startswith(("native", "numba")):
            torch.library.define(f"nwfast::{name}_output", _OUTPUT_SCHEMA)
            _register_fake(f"nwfast::{name}_output", _fake_output)
            self.stateless = getattr(torch.ops.nwfast, f"{name}_output").default
        _register_autograd(
            self.forward,
            lambda ctx, *grads: (*_formula(ctx, self.backward, *grads[:2]), None, None, None),
            _save_all,
        )
        _register_autograd(self.backward, _second, _save_for_second)

    def __getattr__(self, name: str) -> Any:
        # Made at the first call that needs them: they would take a quarter of the time of an import.
        if name not in ("eager", "transformable"):
            raise AttributeError(name)
        stateless = self.stateless if self.name.startswith("native") else None
        self.eager, self.transformable = _functions(self.forward, self.backward, stateless)
        return self.__dict__[name]


def _save_all(ctx: Any, inputs: tuple, output: tuple) -> None:
    out, _, state, tangent_w, tangent_q = output
    ctx.save_for_backward(*inputs[:5], out, state, tangent_w, tangent_q)
    ctx.exclude_self = inputs[5]
    ctx.mark_non_differentiable(state, tangent_w, tangent_q)
    ctx.set_materialize_grads(False)


def _formula(ctx: Any, backward: Callable, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
    """Gradients of query, key, value, w and key_weight in their shapes and dtypes; None where not needed."""
    if grad_out is None and grad_lse is None:
        return (None,) * 5
    query, key, value, w, key_weight, out, *computed = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.ndim != out.ndim:
        grad_out = grad_out.reshape(out.shape)
    if grad_lse is not None and query.ndim > 1 and grad_lse.ndim != out.ndim - 1:
        grad_lse = grad_lse.reshape(out.shape[:-1])
    inputs = query, key, value, w, key_weight
    needed = [place for place, need in enumerate(ctx.needs_input_grad[:5]) if need]
    needs = 0
    for place in needed:
        needs |= NEEDS[place]
    full = backward(grad_out, grad_lse, *inputs, out, *computed, ctx.exclude_self, needs)
    gradients: list[Tensor | None] = [None] * 5
    for place in needed:
        reduce = _reduce_weights if place == 4 else _reduce_to
        gradients[place] = reduce(full[place], inputs[place])
    return tuple(gradients)


def _reduce_to(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Sum the gradient over the leading dimensions in which the input was broadcast."""
    if gradient.shape != tensor.shape:
        if gradient.numel() == tensor.numel():  # of a direct call, in canonical form
            gradient = gradient.reshape(tensor.shape)
        else:
            gradient = gradient.sum_to_size(tensor.shape)
    return gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype)


def _reduce_weights(gradient: Tensor, weight: Tensor) -> Tensor:
    """As `_reduce_to`; of weights of 0 the largest number stands for more, as in what the kernels give."""
    reduced = _reduce_to(gradient, weight)
    if gradient.dtype == weight.dtype and gradient.numel() == weight.numel():
        return reduced
    share = 2.0**-40  # of sums that may overflow, on the way too
    most, largest = torch.finfo(gradient.dtype).max, torch.finfo(weight.dtype).max
    sums = _reduce_to(gradient * share, weight.to(gradient.dtype)).clamp(-most * share, most * share)
    sums = (sums / share).clamp(-largest, largest).to(weight.dtype)
    return torch.where((weight == 0) & ~reduced.isfinite(), sums, reduced)


def _canonical_views(grad_out, grad_lse, query, key, value, w, key_weight, out, *computed_and_flags):
    """The arguments of a backward operator in canonical form, from those of a direct call."""
    *computed, exclude_self, needs = computed_and_flags
    query = query.unsqueeze(-1) if key.ndim == 1 else query[:, None, None]
    value = value.unsqueeze(-1) if value.ndim == key.ndim else value
    key = key.unsqueeze(-1)
    w = w.reshape(1)
    if key_weight is not None and key_weight.ndim < key.ndim - 1:
        key_weight = key_weight.unsqueeze(0)
    rows = query.shape[:-1]
    results = *rows, value.shape[-1]
    grad_out, out = grad_out.reshape(results), out.reshape(results)
    grad_lse = grad_lse if grad_lse is None else grad_lse.reshape(rows)
    state, *tangents = computed
    tangents = [
        tangent.reshape(results) if tangent.numel() == out.numel() else tangent for tangent in tangents
    ]
    state = state.reshape(*rows, 2) if state.numel() else state
    return grad_out, grad_lse, query, key, value, w, key_weight, out, state, *tangents, exclude_self, needs


_W_ALONE = (False, False, False, True, False, False, False, False)


def _gradients_need_rules() -> bool:
    """Whether gradients are themselves differentiated or mapped over; otherwise they need the kernel alone."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _functions(
    forward_kernel: Callable, backward_kernel: Callable, stateless: Callable | None
) -> tuple[Any, Any]:
    def run_backward(*args):
        if not _gradients_need_rules():
            with torch._C._AutoDispatchBelowAutograd():
                return backward_kernel(*args)
        if args[2].ndim == 1:
            args = _canonical_views(*args)
        if forward_ad._current_level >= 0:
            by_reference.require_memory("second derivative", *args[2:5])
            return by_reference.gradients(*args[:7], *args[11:])
        return NadarayaWatsonBackward.apply(*args)

    class NadarayaWatson(torch.autograd.Function):
        """Eager mode: saves and returns as little as possible, and shapes the result as the caller sees it."""

        @staticmethod
        def forward(ctx, query, key, value, w, key_weight, exclude_self, return_lse, drop):
            need_query, need_key, need_value, need_w, need_weight, *_ = ctx.needs_input_grad
            tangents = not return_lse and _scalar(query, key, value)
            inputs = query, key, value, w, key_weight, exclude_self
            with torch._C._AutoDispatchBelowAutograd():
                if stateless and tangents and not (need_key or need_value or need_weight):
                    # lse is not wanted, and empty as the state is to be.
                    out, *computed = stateless(*inputs, False, need_w, need_query)
                else:
                    out, lse, *computed = forward_kernel(
                        *inputs, tangents and need_w, tangents and need_query
                    )
            ctx.save_for_backward(query, key, value, w, key_weight, out, *computed)
            ctx.exclude_self = exclude_self
            ctx.set_materialize_grads(False)
            return (_drop(out, drop), _drop(lse, drop - 1)) if return_lse else _drop(out, drop)

        @staticmethod
        def backward(ctx, grad_out, grad_lse=None):
            # Training w is what small calls are for: no detour where its gradient alone is due and has its shape.
            if ctx.needs_input_grad == _W_ALONE and grad_out is not None and not _gradients_need_rules():
                tensors = ctx.saved_tensors
                if grad_out.ndim == tensors[5].ndim:
                    with torch._C._AutoDispatchBelowAutograd():
                        gradients = backward_kernel(
                            grad_out, grad_lse, *tensors, ctx.exclude_self, backends.NEEDS_W
                        )
                    return None, None, None, gradients[3], None, None, None, None
            return *_formula(ctx, run_backward, grad_out, grad_lse), None, None, None

    class TransformableNadarayaWatson(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return forward_kernel(*args)

        setup_context = staticmethod(_save_all)

        @staticmethod
        def backward(ctx, *grads):
            return *_formula(ctx, run_backward, *grads[:2]), None, None, None

        @staticmethod
        def vmap(info, in_dims, *args):
            tensors, flags = args[:5], args[5:]
            batched: list[Any] = [_lead(tensor, dim) for tensor, dim in zip(tensors, in_dims, strict=False)]
            batched[3] = _lead_w(tensors[3], in_dims[3], batched[0].ndim - 1)
            if in_dims[:3] == (None, None, None):  # w and key_weight do not make the batch larger
                batched[0] = batched[0].expand(info.batch_size, *tensors[0].shape)
            outputs = TransformableNadarayaWatson.apply(*batched, *flags)
            _, tangent_w, tangent_q = flags
            return outputs, (0, 0, 0, 0 if tangent_w else None, 0 if tangent_q else None)

    class NadarayaWatsonBackward(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return backward_kernel(*args)

        setup_context = staticmethod(_save_for_second)
        backward = staticmethod(_second)

        @staticmethod
        def vmap(info, in_dims, *args):
            # Each element of the batch has its own gradients, also of inputs that all share: hence the expand.
            def expand(tensor, dim):
                tensor = _lead(tensor, dim)
                return None if tensor is None else tensor.expand(info.batch_size, *tensor.shape[1:])

            expanded = [expand(tensor, dim) for tensor, dim in zip(args[:9], in_dims, strict=False)]
            for tangent, dim in zip(args[9:11], in_dims[9:11], strict=True):  # of shape (0,): not asked for
                expanded.append(tangent if tangent.ndim == 1 else expand(tangent, dim))
            w = args[5].unsqueeze(0) if in_dims[5] is None else args[5].movedim(in_dims[5], 0)
            w = w.expand(info.batch_size, *w.shape[1:])
            expanded[5] = _lead_w(w, 0, expanded[2].ndim - 1)
            gradients = list(NadarayaWatsonBackward.apply(*expanded, *args[11:]))
            needs = args[12]
            if needs & backends.NEEDS_W:
                gradients[3] = gradients[3].reshape(w.shape)
            return tuple(gradients), tuple(0 if needs & flag else None for flag in NEEDS)

    return NadarayaWatson, TransformableNadarayaWatson


def _lead(tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """Move the dimension that vmap maps over to the front, or put one of size 1 there."""
    if tensor is None:
        return None
    return tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)


def _lead_w(w: Tensor, dim: int | None, rank: int) -> Tensor:
    """As _lead for w, which may have fewer dimensions than all leading ones and the features, `rank`."""
    if dim is None:
        return w
    w = w.movedim(dim, 0)
    return w[(slice(None), *(None,) * (rank - w.ndim))]


def _save_for_second(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.exclude_self, ctx.needs = inputs[11:]
    ctx.mark_non_differentiable(
        *(gradient for gradient, flag in zip(output, NEEDS, strict=True) if not ctx.needs & flag)
    )
    ctx.set_materialize_grads(False)


def _second(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    by_reference.require_memory("second derivative", *inputs[2:5])

    def gradients(grad_out, grad_lse, query, key, value, w, key_weight):
        return by_reference.gradients(
            grad_out, grad_lse, query, key, value, w, key_weight, ctx.exclude_self, ctx.needs
        )

    return *by_reference.pull_back(gradients, inputs, grads), *(None,) * 6


# Fakes and the Python implementations.


def _fake_forward(query, key, value, w, key_weight, exclude_self, tangent_w, tangent_q):
    rows = (*backends.batch_shape(query, key, value), query.shape[-2])
    dtype = arithmetic_dtype(query.dtype)

    def tangent(wanted: bool) -> Tensor:
        return query.new_empty((*rows, value.shape[-1]) if wanted else (0,), dtype=dtype)

    return (
        query.new_empty((*rows, value.shape[-1]), dtype=dtype),
        query.new_empty(rows, dtype=dtype),
        query.new_empty((*rows, 2), dtype=torch.float64),
        tangent(tangent_w),
        tangent(tangent_q),
    )


def _fake_output(query, key, value, w, key_weight, exclude_self, lse, tangent_w, tangent_q):
    out, full_lse, _, *tangents = _fake_forward(
        query, key, value, w, key_weight, exclude_self, tangent_w, tangent_q
    )
    return out, full_lse if lse else full_lse.new_empty(0), *tangents


def _fake_backward(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    w,
    key_weight,
    out,
    state,
    tangent_w,
    tangent_q,
    exclude_self,
    needs,
):
    batch = backends.batch_shape(query, key, value)
    dtype = arithmetic_dtype(query.dtype)
    shapes = (
        (*batch, *query.shape[-2:]),
        (*batch, *key.shape[-2:]),
        (*batch, *value.shape[-2:]),
        w.shape,
        (*batch, key.shape[-2]),
    )
    dtypes = (dtype, dtype, dtype, w.dtype, dtype)
    return tuple(
        query.new_empty(shape, dtype=own) if needs & flag else query.new_empty(0, dtype=dtype)
        for shape, own, flag in zip(shapes, dtypes, NEEDS, strict=True)
    )


def _register_python(name: str, *dispatch_keys: str) -> None:
    """Register a kernel that is a Python module, imported at the first call."""
    functions = ("forward", "output", "backward") if name.startswith("numba") else ("forward", "backward")
    for function in functions:
        for dispatch_key in dispatch_keys:
            torch.library.impl(f"nwfast::{name}_{function}", dispatch_key, _implementation(name, function))


def _implementation(name: str, function: str) -> Callable:
    def kernel(*args):
        return getattr(backends.load(name), function)(*args)

    @functools.cache
    def untraced():
        return torch.compiler.disable(kernel)

    def run(*args):
        # Where Dynamo gives up a frame it goes on with the Python functions called from it, down to these kernels
        # and their data pointers. disable() imports Dynamo, which takes seconds: only if it is there already.
        return (untraced() if "torch._dynamo" in sys.modules else kernel)(*args)

    return run


_COMPRESSED = ("key", "value", "key_weight", "cells", "moments", "matrices", "numbers")
torch.library.define(
    "nwfast::native_fgt_compress",
    f"(Tensor key, Tensor value, Tensor w, Tensor? key_weight) -> ({', '.join(['Tensor'] * len(_COMPRESSED))})",
)
torch.library.define(
    "nwfast::native_fgt_predict",
    f"(Tensor query, {', '.join(f'Tensor {name}' for name in _COMPRESSED)}) -> (Tensor, Tensor)",
)
_KERNELS = {name: _Kernels(name) for name in backends.operators()}
for _name in _KERNELS:
    if _name.startswith("numba"):
        _register_python(_name, "CPU")
_register_python("triton", "CUDA", "CPU")
