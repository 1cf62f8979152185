"""The op: schemas, fakes, autograd, transforms. The only module that knows torch.library.

For each kernel backend there are two operators, `nwfast::<backend>_forward` and `nwfast::<backend>_backward`, with the
contract of `nwfast.backends`. Implementations come from the C++ extension (native) or from Python (numba).

One call is routed by what surrounds it:

* compiling: the operator itself, which carries a fake and an autograd formula (`torch.library`);
* compiling a functorch transform or forward-mode AD: the plain-PyTorch reference. Inside a transform, compilation would
  drop an autograd.Function's formula, and an operator's formula gives no forward-mode tangents;
* eager, nothing to differentiate: the operator, below autograd;
* eager otherwise: an autograd.Function with vmap and jvp rules around the same operators. It costs half of what the
  operator's own formula does, and works under torch.func.

All paths share one formula, `_Kernels.gradients`. What has no kernel (second derivatives, forward mode) differentiates
the reference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .backends import reference
from .backends.reference import arithmetic_dtype

_FORWARD_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor w, Tensor? key_weight, bool exclude_self, bool tangent_w, "
    "bool tangent_q) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor w, Tensor? key_weight, "
    "Tensor out, Tensor state, Tensor tangent_w, Tensor tangent_q, bool exclude_self, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# In the order of the differentiable inputs: query, key, value, w, key_weight.
_NEEDS = (
    backends.NEEDS_QUERY,
    backends.NEEDS_KEY,
    backends.NEEDS_VALUE,
    backends.NEEDS_W,
    backends.NEEDS_KEY_WEIGHT,
)


def nadaraya_watson(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    key_weight: Tensor | None,
    exclude_self: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of canonical inputs on a resolved backend, differentiable; lse is differentiable if return_lse."""
    if backend == "reference":
        return reference.forward(query, key, value, w, key_weight, exclude_self)
    transformed = _transform_active()
    compiling = torch.compiler.is_compiling()
    if compiling and transformed:
        return reference.forward(query, key, value, w, key_weight, exclude_self)
    kernels = _KERNELS[backend]
    differentiate = transformed or (
        torch.is_grad_enabled()
        and (
            query.requires_grad
            or key.requires_grad
            or value.requires_grad
            or w.requires_grad
            or (key_weight is not None and key_weight.requires_grad)
        )
    )
    if not differentiate:
        if compiling:
            return kernels.forward(query, key, value, w, key_weight, exclude_self, False, False)[:2]
        with torch._C._AutoDispatchBelowAutograd():
            return kernels.forward(query, key, value, w, key_weight, exclude_self, False, False)[:2]
    # Tangents have a value for each feature and channel: worth their memory for one of each. They belong to out alone.
    scalar = query.shape[-1] == 1 and value.shape[-1] == 1 and not return_lse
    tangent_w = scalar and (transformed or w.requires_grad)
    tangent_q = scalar and (transformed or query.requires_grad)
    run = kernels.forward if compiling else kernels.function.apply
    return run(query, key, value, w, key_weight, exclude_self, tangent_w, tangent_q)[:2]


def _transform_active() -> bool:
    """Whether a functorch transform or forward-mode AD surrounds the call (private API, pinned by a test)."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Kernels:
    """One backend's two operators, and around them two autograd.Functions for eager mode and functorch."""

    def __init__(self, name: str):
        forward_name, backward_name = f"nwfast::{name}_forward", f"nwfast::{name}_backward"
        torch.library.define(forward_name, _FORWARD_SCHEMA)
        torch.library.define(backward_name, _BACKWARD_SCHEMA)
        torch.library.register_fake(forward_name)(_fake_forward)
        torch.library.register_fake(backward_name)(_fake_backward)
        self.forward: Callable = getattr(torch.ops.nwfast, f"{name}_forward").default
        self.backward: Callable = getattr(torch.ops.nwfast, f"{name}_backward").default
        self.function: Any
        self.backward_function: Any
        self.function, self.backward_function = _make_functions(self)
        torch.library.register_autograd(
            forward_name,
            lambda ctx, *grads: (*_formula(ctx, self.backward, grads), None, None, None),
            setup_context=_save,
        )
        torch.library.register_autograd(
            backward_name, _backward_of_backward, setup_context=_save_for_second
        )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    out, _, state, tangent_w, tangent_q = output
    ctx.save_for_backward(*inputs[:5], out, state, tangent_w, tangent_q)
    ctx.exclude_self = inputs[5]
    ctx.mark_non_differentiable(state, tangent_w, tangent_q)
    ctx.set_materialize_grads(False)


def _formula(ctx: Any, backward: Callable, grads: tuple) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, w and key_weight in their shapes and dtypes; None where not needed."""
    grad_out, grad_lse = grads[:2]
    if grad_out is None and grad_lse is None:
        return (None,) * 5
    tensors = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[5])
    needed = ctx.needs_input_grad[:5]
    needs = sum(flag for flag, need in zip(_NEEDS, needed, strict=True) if need)
    full = backward(grad_out, grad_lse, *tensors, ctx.exclude_self, needs)
    return tuple(
        _reduce_to(gradient, tensor) if need else None
        for gradient, tensor, need in zip(full, tensors[:5], needed, strict=True)
    )


def _reduce_to(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Sum the gradient over the leading dimensions in which the input was broadcast."""
    if gradient.shape != tensor.shape:
        gradient = gradient.sum_to_size(tensor.shape)
    return gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype)


def _make_functions(kernels: _Kernels) -> tuple[Any, Any]:
    class NadarayaWatson(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return kernels.forward(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            _save(ctx, inputs, output)
            ctx.save_for_forward(*inputs[:5])

        @staticmethod
        def backward(ctx, *grads):
            if torch.is_grad_enabled():  # the gradients may themselves be differentiated
                return *_formula(ctx, NadarayaWatsonBackward.apply, grads), None, None, None
            with torch._C._AutoDispatchBelowAutograd():
                return *_formula(ctx, kernels.backward, grads), None, None, None

        @staticmethod
        def vmap(info, in_dims, *args):
            tensors, (exclude_self, tangent_w, tangent_q) = args[:5], args[5:]
            batched = [_lead(tensor, dim) for tensor, dim in zip(tensors, in_dims, strict=False)]
            batched[3] = _lead_w(tensors[3], in_dims[3], batched[0].ndim - 1)
            outputs = NadarayaWatson.apply(*batched, exclude_self, tangent_w, tangent_q)
            return outputs, (0, 0, 0, 0 if tangent_w else None, 0 if tangent_q else None)

        @staticmethod
        def jvp(ctx, *tangents):
            inputs = ctx.saved_tensors[:5]
            function = _Reference(ctx.exclude_self).forward
            return *_jvp(function, inputs, tangents[:5]), None, None, None

    class NadarayaWatsonBackward(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return kernels.backward(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            _save_for_second(ctx, inputs, output)
            ctx.save_for_forward(*inputs[:7])

        backward = staticmethod(_backward_of_backward)

        @staticmethod
        def vmap(info, in_dims, *args):
            # Each batch element has its own gradients, also of inputs that all share: hence the expand.
            rank = next(
                tensor.ndim - (dim is not None) for tensor, dim in zip(args[2:5], in_dims[2:5], strict=True)
            )
            expanded = [
                tensor if tensor is None or not tensor.numel() and dim is None else
                _lead(tensor, dim).expand(info.batch_size, *[-1] * (tensor.ndim - (dim is not None)))
                for tensor, dim in zip(args[:11], in_dims, strict=False)
            ]
            w = _lead(args[5], in_dims[5]).expand(info.batch_size, *[-1] * (args[5].ndim - (in_dims[5] is not None)))
            expanded[5] = _lead_w(w, 0, rank)
            gradients = list(NadarayaWatsonBackward.apply(*expanded, *args[11:]))
            needs = args[12]
            if needs & backends.NEEDS_W:
                gradients[3] = gradients[3].reshape(w.shape)
            return tuple(gradients), tuple(0 if needs & flag else None for flag in _NEEDS)

        @staticmethod
        def jvp(ctx, *tangents):
            function = _Reference(ctx.exclude_self, ctx.needs).gradients
            return _jvp(function, ctx.saved_tensors, tangents[:7])

    return NadarayaWatson, NadarayaWatsonBackward


def _lead(tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """Move the dimension that vmap maps over to the front, or put one of size 1 there."""
    if tensor is None:
        return None
    return tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)


def _lead_w(w: Tensor, dim: int | None, rank: int) -> Tensor:
    """As _lead for w, which may have fewer leading dimensions than the other tensors (of `rank` dimensions)."""
    if dim is None:
        return w
    w = w.movedim(dim, 0)
    return w[(slice(None), *(None,) * (rank - w.ndim))]


# Differentiating the reference: second derivatives and forward mode.


class _Reference:
    """The reference's outputs and gradients as plain differentiable functions, shaped as the operators return them."""

    def __init__(self, exclude_self: bool, needs: int = 0):
        self.exclude_self, self.needs = exclude_self, needs

    def forward(self, query, key, value, w, key_weight):
        return reference.forward(query, key, value, w, key_weight, self.exclude_self)

    def gradients(self, grad_out, grad_lse, query, key, value, w, key_weight):
        batch = backends.batch_shape(query, key, value)
        dtype = arithmetic_dtype(query.dtype)
        expanded = [
            None if tensor is None else tensor.expand(*batch, *tensor.shape[len(batch) :])
            for tensor in (query, key, value)
        ]
        weight = None if key_weight is None else key_weight.expand(*batch, key_weight.shape[-1])
        gradients = _vjp(self.forward, (*expanded, w, weight), (grad_out, grad_lse))
        empty = torch.empty(0, dtype=dtype, device=query.device)
        return tuple(
            (gradient if flag == backends.NEEDS_W else gradient.to(dtype)) if self.needs & flag else empty
            for gradient, flag in zip(gradients, _NEEDS, strict=True)
        )


def _save_for_second(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.exclude_self, ctx.needs = inputs[11:]
    ctx.mark_non_differentiable(
        *(gradient for gradient, flag in zip(output, _NEEDS, strict=True) if not ctx.needs & flag)
    )
    ctx.set_materialize_grads(False)


def _backward_of_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    function = _Reference(ctx.exclude_self, ctx.needs).gradients
    return *_vjp(function, ctx.saved_tensors, grads), *(None,) * 6


def _present(function: Callable, inputs: Sequence[Tensor | None]) -> tuple[Callable, list[int], list[Tensor]]:
    """The function of those inputs alone that are not None."""
    places = [place for place, tensor in enumerate(inputs) if tensor is not None]

    def of_present(*present):
        arguments: list[Tensor | None] = [None] * len(inputs)
        for place, tensor in zip(places, present, strict=True):
            arguments[place] = tensor
        return function(*arguments)

    return of_present, places, [tensor for tensor in inputs if tensor is not None]


def _vjp(function: Callable, inputs: Sequence, cotangents: Sequence) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product; inputs may contain None (as their gradients then), cotangents None for zero."""
    function, places, present = _present(function, inputs)
    outputs, pullback = torch.func.vjp(function, *present)
    gradients = pullback(
        tuple(
            torch.zeros_like(output) if cotangent is None else cotangent.to(output.dtype)
            for output, cotangent in zip(outputs, cotangents, strict=False)
        )
    )
    found = dict(zip(places, gradients, strict=True))
    return tuple(found.get(place) for place in range(len(inputs)))


def _jvp(function: Callable, inputs: Sequence, tangents: Sequence) -> tuple[Tensor, ...]:
    """Jacobian-vector product as the transpose of the pullback: inside a dual level no other can be opened."""
    function, places, present = _present(function, inputs)
    outputs, pullback = torch.func.vjp(function, *present)
    _, transpose = torch.func.vjp(
        lambda *cotangents: pullback(cotangents), *[torch.zeros_like(output) for output in outputs]
    )
    return transpose(
        tuple(
            torch.zeros_like(inputs[place]) if tangents[place] is None else tangents[place].to(inputs[place].dtype)
            for place in places
        )
    )


# Fakes and the Python implementations.


def _fake_forward(query, key, value, w, key_weight, exclude_self, tangent_w, tangent_q):
    batch = backends.batch_shape(query, key, value)
    rows = (*batch, query.shape[-2])
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


def _fake_backward(
    grad_out, grad_lse, query, key, value, w, key_weight, out, state, tangent_w, tangent_q, exclude_self, needs
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
    return tuple(
        query.new_empty(
            shape if needs & flag else (0,), dtype=w.dtype if flag == backends.NEEDS_W and needs & flag else dtype
        )
        for shape, flag in zip(shapes, _NEEDS, strict=True)
    )


def _register_python(name: str) -> None:
    """Register a backend that is a Python module, imported at the first call."""

    def forward(*args):
        return backends.load(name).forward(*args)

    def backward(*args):
        return backends.load(name).backward(*args)

    torch.library.impl(f"nwfast::{name}_forward", "CPU", forward)
    torch.library.impl(f"nwfast::{name}_backward", "CPU", backward)


_KERNELS = {name: _Kernels(name) for name in backends.NAMES if name != "reference"}
_register_python("numba")
