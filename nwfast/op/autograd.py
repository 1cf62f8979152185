"""How a kernel's results are differentiated: one formula for first derivatives, the reference for second ones.

Nothing here knows which kernel it is, or torch.library: `functions_around` makes the autograd.Functions around any pair
of a forward and a backward operator, with their rules for vmap, and `schema` registers the same `formula` and `second`
for the operators themselves. A backward operator gives gradients the shape of the batch and the arithmetic dtype; the
formula sums them over what was broadcast and brings them to the dtypes of the inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from . import by_reference
from .by_reference import NEEDS


def save_all(ctx: Any, inputs: tuple, output: tuple) -> None:
    """What `formula` needs of a forward operator's arguments and results."""
    out, _, state, tangent_w, tangent_q = output
    ctx.save_for_backward(*inputs[:5], out, state, tangent_w, tangent_q)
    ctx.exclude_self = inputs[5]
    ctx.mark_non_differentiable(state, tangent_w, tangent_q)
    ctx.set_materialize_grads(False)


def formula(ctx: Any, backward: Callable, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
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
        reduce = reduce_weights if place == 4 else reduce_to
        gradients[place] = reduce(full[place], inputs[place])
    return tuple(gradients)


def reduce_to(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Sum the gradient over the leading dimensions in which the input was broadcast."""
    if gradient.shape != tensor.shape:
        if gradient.numel() == tensor.numel():  # of a call on the short way, in canonical form
            gradient = gradient.reshape(tensor.shape)
        else:
            gradient = gradient.sum_to_size(tensor.shape)
    return gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype)


def reduce_weights(gradient: Tensor, weight: Tensor) -> Tensor:
    """As `reduce_to`; of weights of 0 the largest number stands for more, as in what the kernels give."""
    reduced = reduce_to(gradient, weight)
    if gradient.dtype == weight.dtype and gradient.numel() == weight.numel():
        return reduced
    share = 2.0**-40  # of sums that may overflow, on the way too
    most, largest = torch.finfo(gradient.dtype).max, torch.finfo(weight.dtype).max
    sums = reduce_to(gradient * share, weight.to(gradient.dtype)).clamp(-most * share, most * share)
    sums = (sums / share).clamp(-largest, largest).to(weight.dtype)
    return torch.where((weight == 0) & ~reduced.isfinite(), sums, reduced)


def _canonical_views(grad_out, grad_lse, query, key, value, w, key_weight, out, *computed_and_flags):
    """The arguments of a backward operator in canonical form, from those of a call on the short way."""
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


def functions_around(
    forward_kernel: Callable, backward_kernel: Callable, stateless: Callable | None, most_features: int = 1
) -> tuple[Any, Any, Any]:
    """The autograd.Functions around a kernel's operators, for eager calls.

    Outside functorch transforms, inside, and inside where nothing is differentiated. `most_features`: up to which the
    kernel may have tangents.
    """

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
            single = is_single(query, key, value)
            tangents = not return_lse and (
                single or (query.ndim > 1 and query.shape[-1] <= most_features and value.shape[-1] == 1)
            )
            inputs = query, key, value, w, key_weight, exclude_self
            with torch._C._AutoDispatchBelowAutograd():
                if stateless and tangents and single and not (need_key or need_value or need_weight):
                    # lse is not wanted, and empty as the state is to be.
                    out, *computed = stateless(*inputs, False, need_w, need_query)
                else:  # with the state: whether a call of several features has tangents depends on its data
                    out, lse, *computed = forward_kernel(
                        *inputs, tangents and need_w, tangents and need_query
                    )
            ctx.save_for_backward(query, key, value, w, key_weight, out, *computed)
            ctx.exclude_self = exclude_self
            ctx.set_materialize_grads(False)
            return (drop_last(out, drop), drop_last(lse, drop - 1)) if return_lse else drop_last(out, drop)

        @staticmethod
        def backward(ctx, grad_out, grad_lse=None):
            # Training w is what small calls are for: no detour where its gradient, which has its shape, alone is due.
            if (
                ctx.needs_input_grad == _W_ALONE
                and grad_out is not None
                and grad_lse is None
                and not _gradients_need_rules()
            ):
                tensors = ctx.saved_tensors
                with torch._C._AutoDispatchBelowAutograd():
                    if grad_out.ndim != tensors[5].ndim:
                        grad_out = grad_out.reshape(tensors[5].shape)
                    gradients = backward_kernel(grad_out, None, *tensors, ctx.exclude_self, backends.NEEDS_W)
                return None, None, None, gradients[3], None, None, None, None
            return *formula(ctx, run_backward, grad_out, grad_lse), None, None, None

    class TransformableNadarayaWatson(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return forward_kernel(*args)

        setup_context = staticmethod(save_all)

        @staticmethod
        def backward(ctx, *grads):
            return *formula(ctx, run_backward, *grads[:2]), None, None, None

        @staticmethod
        def vmap(info, in_dims, *args):
            flags = args[5:]
            outputs = TransformableNadarayaWatson.apply(*_as_one_batch(info, in_dims, args[:5]), *flags)
            _, tangent_w, tangent_q = flags
            return outputs, (0, 0, 0, 0 if tangent_w else None, 0 if tangent_q else None)

    class NadarayaWatsonOutput(torch.autograd.Function):
        """Under vmap where nothing is differentiated: (out, lse), lse of shape (0,) where it is not asked for."""

        @staticmethod
        def forward(query, key, value, w, key_weight, exclude_self, return_lse):
            inputs = query, key, value, w, key_weight, exclude_self
            with torch._C._AutoDispatchBelowAutograd():
                if stateless is None:
                    return tuple(forward_kernel(*inputs, False, False)[:2])
                return tuple(stateless(*inputs, return_lse, False, False)[:2])

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.mark_non_differentiable(*output)

        @staticmethod
        def vmap(info, in_dims, *args):
            outputs = NadarayaWatsonOutput.apply(*_as_one_batch(info, in_dims, args[:5]), *args[5:])
            return outputs, (0, 0 if outputs[1].ndim > 1 else None)

    class NadarayaWatsonBackward(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return backward_kernel(*args)

        setup_context = staticmethod(save_for_second)
        backward = staticmethod(second)

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

    return NadarayaWatson, TransformableNadarayaWatson, NadarayaWatsonOutput


def _as_one_batch(info: Any, in_dims: tuple, tensors: tuple) -> list[Any]:
    """The inputs of a call on all elements that vmap maps over: what they share keeps a leading dimension of 1."""
    batched: list[Any] = [_lead(tensor, dim) for tensor, dim in zip(tensors, in_dims, strict=False)]
    batched[3] = _lead_w(tensors[3], in_dims[3], batched[0].ndim - 1)
    if in_dims[:3] == (None, None, None):  # w and key_weight do not make the batch larger
        batched[0] = batched[0].expand(info.batch_size, *tensors[0].shape)
    return batched


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


def save_for_second(ctx: Any, inputs: tuple, output: tuple) -> None:
    """What `second` needs of a backward operator's arguments."""
    ctx.save_for_backward(*inputs[:7])
    ctx.exclude_self, ctx.needs = inputs[11:]
    ctx.mark_non_differentiable(
        *(gradient for gradient, flag in zip(output, NEEDS, strict=True) if not ctx.needs & flag)
    )
    ctx.set_materialize_grads(False)


def second(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments of a backward operator."""
    inputs = ctx.saved_tensors
    by_reference.require_memory("second derivative", *inputs[2:5])

    def gradients(grad_out, grad_lse, query, key, value, w, key_weight):
        return by_reference.gradients(
            grad_out, grad_lse, query, key, value, w, key_weight, ctx.exclude_self, ctx.needs
        )

    return *by_reference.pull_back(gradients, inputs, grads), *(None,) * 6


def drop_last(result: Tensor, dims: int) -> Tensor:
    """Without the last `dims` dimensions, at most 2, which are of size 1."""
    if dims <= 0:
        return result
    return result.squeeze(-1) if dims == 1 else result.reshape(result.shape[:-2])


def is_single(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Of one feature and one channel, for which all kernels have tangents.

    These are derivatives of out alone, so a call that returns lse too goes without.
    """
    if query.ndim == 1:  # of a call on the short way
        return value.ndim == key.ndim
    return query.shape[-1] == 1 and value.shape[-1] == 1
