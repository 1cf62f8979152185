"""Local linear regression as one pair of operators over the kernels of all backends.

With weights p of a row (those of the Nadaraya-Watson fit) and D features,

    m = E[v],  e = E[k] - q,  S = Cov(k, k),  B = Cov(k, v),  slope = S^+ B,  fit = m - e . slope

Native, in linear time, two and three features: one pass that solves most rows itself, in float32 for inputs in that
(`csrc/cpu/grid/local_linear.cpp`). All else is in float64. The kernels give E of v and k, and B and S are d out / d q
/ w^2 for the values [v, k]: one query-side pass for each column, or, native in linear time, tangents that come with
the means. Where w is next to 0 it is raised until scores differ by less than rounding.

First derivatives (functions of p alone but for q) are those of a Nadaraya-Watson fit with the values v, k v, k and k k,
whose cotangents make of them, with s the cotangent of the slope and g that of the fit,

    Psi_j = (g + U . (k_j - E[k])) (v_j - m - slope . (k_j - E[k])),   U = S^+ (s - g e)

so that every backend, in its own time and O(M + N) memory, gives them. The squares in it cancel: where keys extend over
so many bandwidths that this shows, and for second derivatives, the reference is differentiated.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import is_captured
from ..backends import local_linear as formula
from . import by_reference
from .autograd import reduce_to, reduce_weights
from .by_reference import NEEDS
from .schema import KERNELS, LINES, define

# Bandwidths over which keys may extend for the squares of their coordinates to carry first derivatives to some 1e-8.
MOST_EXTENT = 6000.0
# What is solved for each row is solved for so many at once, such that nothing on the way leaves the cache.
_ROWS = 1 << 14


def local_linear(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    key_weight: Tensor | None,
    exclude_self: bool,
) -> tuple[Tensor, Tensor]:
    """(fit (*B, M, C), slope (*B, M, D, C)) of canonical inputs, differentiable; in float64 or float32."""
    inputs = query, key, value, w, key_weight
    plain = kernel in LINES and _is_plain(*inputs)
    if plain:
        found = _in_one_pass(kernel, *inputs, exclude_self, False)
        if found is not None:
            return found[:2]
    if query.dtype != torch.float64:  # narrower coordinates have products in float64
        return _local_linear(kernel, query, key, value, w, key_weight, exclude_self, plain)
    unit = formula.extreme_unit(key, w.double(), key_weight)
    seen = (
        query.device.type == "cpu" and not is_captured() and not torch._C._are_functorch_transforms_active()
    )
    if seen and bool((unit == 1).all()):
        return _local_linear(kernel, query, key, value, w, key_weight, exclude_self, plain)
    most = torch.finfo(torch.float64).max
    w = (w.double() * unit.squeeze(-2)).clamp(-most, most)
    fit, slope = _local_linear(kernel, query / unit, key / unit, value, w, key_weight, exclude_self, False)
    return fit, slope / unit.mT.unsqueeze(-3)


def _local_linear(kernel, query, key, value, w, key_weight, exclude_self, plain):
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if kernel == "reference" or forward_mode or torch._C._are_functorch_transforms_active():
        if not is_captured():
            by_reference.require_memory("forward-mode derivative", query, key, value)
        return formula.forward(query, key, value, w, key_weight, exclude_self)
    query, key, value, w = query.double(), key.double(), value.double(), w.double()
    key_weight = key_weight if key_weight is None else key_weight.double()
    if plain:  # what the operator would try first did not serve
        return _by_passes(query, key, value, w, key_weight, exclude_self, kernel)[:2]
    return _LOCAL_LINEAR(query, key, value, w, key_weight, exclude_self, kernel)[:2]


class Rows(NamedTuple):
    """What the fit at each query is made of."""

    fit: Tensor  # (*B, M, C)
    slope: Tensor  # (*B, M, D, C)
    offset: Tensor  # e, (*B, M, D)
    inverse: Tensor  # S^+, (*B, M, D, D)


def rows(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    key_weight: Tensor | None,
    exclude_self: bool,
) -> Rows:
    """Fit, slope and the geometry of the keys around each query, in float64, without derivatives."""
    query, key, value, w = query.double(), key.double(), value.double(), w.double()
    key_weight = key_weight if key_weight is None else key_weight.double()
    fit, slope, means, inverse = _LOCAL_LINEAR(query, key, value, w, key_weight, exclude_self, kernel)
    offset = means[..., value.shape[-1] :] - formula.frame(query, key, w, key_weight).query
    return Rows(fit, slope, offset, inverse)


def _is_plain(*inputs: Tensor | None) -> bool:
    """Whether a call is eager, of plain tensors, and nothing to differentiate."""
    if (
        is_captured()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return False
    differentiable = torch.is_grad_enabled()
    return torch.autograd.forward_ad._current_level < 0 and all(
        x is None or (type(x) in (Tensor, torch.nn.Parameter) and not (differentiable and x.requires_grad))
        for x in inputs
    )


def _in_one_pass(kernel, query, key, value, w, key_weight, exclude_self, moments):
    """What `_forward` returns, in the arithmetic dtype, means and inverse only if asked for; None if it does not serve.

    Rows of which the pass has the moments alone are solved here; those that it leaves go the general way, alone where
    they do not leave a key out by their number.
    """
    features, channels = query.shape[-1], value.shape[-1]
    if kernel not in LINES or features not in (2, 3):
        return None
    *found, left, weak, sums = LINES[kernel](query, key, value, w, key_weight, exclude_self, moments)
    if left.numel() > 0 and (left[0] < 0 or exclude_self):
        return None
    if left.numel() == 0 and weak.numel() == 0:
        return found
    rows = query.shape[-2]
    batch = backends.batch_shape(query, key, value)
    count = math.prod(batch)

    def of_element(tensor, b, dims):
        """One batch element, in float64."""
        full = tensor.expand(*batch, *tensor.shape[-dims:]).reshape(count, *tensor.shape[-dims:])
        return full[b].double()

    def put(b, own, some):
        for whole, part in zip(found, some, strict=True):
            if whole.numel() > 0:
                whole.view(count, rows, *part.shape[1:])[b, own] = part.to(whole.dtype)

    sums = sums.view(weak.numel(), -1) if weak.numel() > 0 else sums
    for b in range(count):
        of_left, of_weak = (
            slice(*torch.searchsorted(some, torch.tensor([b * rows, (b + 1) * rows])).tolist())
            for some in (left, weak)
        )
        if of_left.start == of_left.stop and of_weak.start == of_weak.stop:
            continue
        places, keys, values, scale = (
            of_element(x, b, dims) for x, dims in ((query, 2), (key, 2), (value, 2), (w, 1))
        )
        weight = key_weight if key_weight is None else of_element(key_weight, b, 1)
        own = left[of_left] - b * rows
        if own.numel() > 0:
            put(b, own, _by_passes(places[own], keys, values, scale, weight, False, kernel))
        own = weak[of_weak] - b * rows
        if own.numel() > 0:
            frame = formula.frame(places[own], keys, scale, weight)
            put(b, own, _by_moments(frame, sums[of_weak], features, channels))
    return found


def _by_moments(frame, sums, features, channels):
    """(fit, slope, means, inverse) from E[v], E[k] - q, Cov(k, k) and Cov(k, v) of rows, side by side."""
    mean, offset, spread, common = sums.split([channels, features, features**2, features * channels], -1)
    inverse = torch.cat(
        [
            formula.inverse_of(frame, *parts)
            for parts in zip(
                offset.split(_ROWS), spread.unflatten(-1, (features, features)).split(_ROWS), strict=True
            )
        ]
    )
    slope = inverse @ common.unflatten(-1, (features, channels))
    return formula.fit_of(mean, offset, slope), slope, torch.cat([mean, offset + frame.query], -1), inverse


def _forward(query, key, value, w, key_weight, exclude_self, kernel):
    found = _in_one_pass(kernel, query, key, value, w, key_weight, exclude_self, True)
    if found is not None:
        return tuple(found)
    return _by_passes(query, key, value, w, key_weight, exclude_self, kernel)


def _by_passes(query, key, value, w, key_weight, exclude_self, kernel):
    kernels = KERNELS[kernel]
    features, channels = query.shape[-1], value.shape[-1]
    frame = formula.frame(query, key, w, key_weight)
    w = torch.maximum(w.abs(), 2.0**-27 / frame.reach)
    batch = backends.batch_shape(query, key, value)
    columns = torch.cat([part.expand(*batch, *part.shape[-2:]) for part in (value, frame.key)], -1)
    none = query.new_empty(0)
    at_once = features <= backends.FGT_FEATURES["native"] and kernel.startswith("native_")
    means, _, state, _, tangents = kernels.forward(
        query, key, columns, w, key_weight, exclude_self, False, at_once
    )
    at_once = at_once and tangents.numel() == features * means.numel()
    if at_once:
        by_query = tangents.unflatten(-1, (features, features + channels))
    else:
        by_query = query.new_empty(*means.shape[:-1], features, features + channels)
    for c in range(0 if at_once else features + channels):
        column, mean = columns[..., c : c + 1].contiguous(), means[..., c : c + 1].contiguous()
        by_query[..., c] = kernels.backward(
            torch.ones_like(mean), None, query, key, column, w, key_weight, mean, state, none, none, exclude_self,
            backends.NEEDS_QUERY,
        )[0]  # fmt: skip
    fit, slope, _, inverse = _fake_forward(query, key, value, w, key_weight, exclude_self, kernel)
    scale = w[..., None, :, None]
    for begin in range(0, query.shape[-2], _ROWS):
        rows = slice(begin, begin + _ROWS)
        moments = by_query[..., rows, :, :] / scale / scale
        mean = means[..., rows, :channels]
        offset = means[..., rows, channels:] - frame.query[..., rows, :]
        inverse[..., rows, :, :] = some = formula.inverse_of(frame, offset, moments[..., channels:])
        some = some @ moments[..., :channels]
        slope[..., rows, :, :] = some = torch.where(mean.isnan().unsqueeze(-2), torch.nan, some)
        fit[..., rows, :] = formula.fit_of(mean, offset, some)
    return fit, slope, means, inverse


def _fake_forward(query, key, value, w, key_weight, exclude_self, kernel):
    rows = (*backends.batch_shape(query, key, value), query.shape[-2])
    features, channels = query.shape[-1], value.shape[-1]
    shapes = (channels,), (features, channels), (channels + features,), (features, features)
    return tuple(query.new_empty((*rows, *shape)) for shape in shapes)


def _backward(
    grad_fit, grad_slope, query, key, value, w, key_weight, slope, means, inverse, exclude_self, kernel, needs
):
    features, channels = query.shape[-1], value.shape[-1]
    batch = backends.batch_shape(query, key, value)
    frame = formula.frame(query, key, w, key_weight)
    only_value = needs == backends.NEEDS_VALUE
    if not only_value and bool((w.abs().unsqueeze(-2) * frame.extent > MOST_EXTENT).any()):
        by_reference.require_memory("second derivative", query, key, value)
        inputs = query, key, value, w, key_weight
        return _by_reference(grad_fit, grad_slope, *inputs, exclude_self, needs)
    idle = ((grad_fit == 0).all(-1) & (grad_slope == 0).all(-1).all(-1))[..., None]

    def of_key(part):
        return part.expand(*batch, *part.shape[-2:])

    key_place = of_key(frame.key)
    centre = value.masked_fill(~(frame.counted.unsqueeze(-1) & value.isfinite()), 0.0).mean(-2, keepdim=True)
    height = of_key((value - centre).masked_fill(~frame.counted.unsqueeze(-1), 0.0))
    offset = means[..., channels:] - frame.query
    charge = inverse @ (grad_slope - offset.unsqueeze(-1) * grad_fit.unsqueeze(-2))  # U, (*B, M, D, C)
    charge = charge.masked_fill(~charge.isfinite(), 0.0)
    slope = slope.masked_fill(~slope.isfinite(), 0.0)
    middle = means[..., channels:].unsqueeze(-2)
    grad = grad_fit - (middle @ charge).squeeze(-2)
    level = (middle @ slope).squeeze(-2) - (means[..., :channels] - centre)
    pairs = torch.triu_indices(features, features, device=query.device)
    columns = [height, (key_place.unsqueeze(-1) * height.unsqueeze(-2)).flatten(-2)]
    factors = [grad, charge.flatten(-2)]
    if not only_value:
        columns += [key_place, key_place[..., pairs[0]] * key_place[..., pairs[1]]]
        linear = (charge * level.unsqueeze(-2) - slope * grad.unsqueeze(-2)).sum(-1)
        square = charge @ slope.mT
        square = (
            torch.where(pairs[0] == pairs[1], 1.0, 2.0) * (square + square.mT)[..., pairs[0], pairs[1]] / 2
        )
        factors += [linear, -square]
    values = torch.cat(columns, -1)
    cotangent = torch.cat(factors, -1)
    kernels = KERNELS[kernel]
    out, lse, state, *_ = kernels.forward(query, key, values, w, key_weight, exclude_self, False, False)
    cotangent = cotangent.masked_fill(idle | (lse == -torch.inf).unsqueeze(-1), 0.0)
    asked = needs | (backends.NEEDS_VALUE if needs & backends.NEEDS_KEY else 0)
    none = query.new_empty(0)
    found = list(
        kernels.backward(
            cotangent, None, query, key, values, w, key_weight, out, state, none, none, exclude_self, asked
        )
    )
    if needs & backends.NEEDS_QUERY:
        alive = ~(idle | (lse == -torch.inf).unsqueeze(-1))
        found[0] = found[0] + torch.where(alive, (slope * grad_fit.unsqueeze(-2)).sum(-1), 0.0)
    if asked & backends.NEEDS_VALUE:
        sums = found[2]
        by_value, by_product = sums[..., :channels], sums[..., channels : channels * (1 + features)]
        by_product = by_product.unflatten(-1, (features, channels))
        if needs & backends.NEEDS_KEY:
            by_key = sums[..., channels * (1 + features) :]
            by_pair = sums.new_zeros(*sums.shape[:-1], features, features)
            by_pair[..., pairs[0], pairs[1]] = by_key[..., features:]
            by_pair = by_pair + by_pair.mT
            explicit = by_key[..., :features] + (by_product @ height.unsqueeze(-1)).squeeze(-1)
            found[1] = found[1] + explicit + (by_pair @ key_place.unsqueeze(-1)).squeeze(-1)
        found[2] = by_value + (key_place.unsqueeze(-2) @ by_product).squeeze(-2)
    return tuple(
        full if needs & flag else query.new_empty(0) for full, flag in zip(found, NEEDS, strict=True)
    )


def _by_reference(grad_fit, grad_slope, query, key, value, w, key_weight, exclude_self, needs):
    """What the backward operator returns, as a plain differentiable function."""
    batch = backends.batch_shape(query, key, value)

    def full(tensor: Tensor) -> Tensor:
        return tensor.expand(*batch, *tensor.shape[len(batch) :])

    inputs = [full(query), full(key), full(value), w]
    if key_weight is not None:
        inputs.append(full(key_weight))

    def outputs(query, key, value, w, key_weight=None):
        return formula.forward(query, key, value, w, key_weight, exclude_self)

    found = torch.func.vjp(outputs, *inputs)[1]((grad_fit, grad_slope))
    return tuple(found[place] if needs & flag else query.new_empty(0) for place, flag in enumerate(NEEDS))


def _fake_backward(
    grad_fit, grad_slope, query, key, value, w, key_weight, slope, means, inverse, exclude_self, kernel, needs
):
    batch = backends.batch_shape(query, key, value)
    shapes = (
        (*batch, *query.shape[-2:]),
        (*batch, *key.shape[-2:]),
        (*batch, *value.shape[-2:]),
        w.shape,
        (*batch, key.shape[-2]),
    )
    return tuple(
        query.new_empty(shape if needs & flag else 0) for shape, flag in zip(shapes, NEEDS, strict=True)
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.exclude_self, ctx.kernel = inputs[5:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _formula(ctx, grad_fit, grad_slope, *_):
    *inputs, slope, means, inverse = ctx.saved_tensors
    if grad_fit is None and grad_slope is None:
        return (None,) * 7
    if grad_fit is None:
        grad_fit = slope.new_zeros(*slope.shape[:-2], slope.shape[-1])
    if grad_slope is None:
        grad_slope = torch.zeros_like(slope)
    needed = ctx.needs_input_grad[:5]
    needs = sum(flag for need, flag in zip(needed, NEEDS, strict=True) if need)
    full = _LOCAL_LINEAR_BACKWARD(
        grad_fit, grad_slope, *inputs, slope, means, inverse, ctx.exclude_self, ctx.kernel, needs
    )
    reduce = (reduce_to,) * 4 + (reduce_weights,)
    gradients = [reduce[i](full[i], inputs[i]) if needed[i] else None for i in range(5)]
    return *gradients, None, None


def _save_for_second(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.exclude_self, _, ctx.needs = inputs[10:]
    ctx.mark_non_differentiable(
        *(gradient for gradient, flag in zip(output, NEEDS, strict=True) if not ctx.needs & flag)
    )
    ctx.set_materialize_grads(False)


def _second(ctx, *grads):
    inputs = ctx.saved_tensors
    by_reference.require_memory("second derivative", *inputs[2:5])

    def gradients(grad_fit, grad_slope, query, key, value, w, key_weight):
        inputs = query, key, value, w, key_weight
        return _by_reference(grad_fit, grad_slope, *inputs, ctx.exclude_self, ctx.needs)

    return *by_reference.pull_back(gradients, inputs, grads), *(None,) * 6


_LOCAL_LINEAR = define(
    "local_linear",
    "(Tensor query, Tensor key, Tensor value, Tensor w, Tensor? key_weight, bool exclude_self, str kernel) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _formula,
    _save,
)
_LOCAL_LINEAR_BACKWARD = define(
    "local_linear_backward",
    "(Tensor grad_fit, Tensor grad_slope, Tensor query, Tensor key, Tensor value, Tensor w, Tensor? key_weight, "
    "Tensor slope, Tensor means, Tensor inverse, bool exclude_self, str kernel, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _second,
    _save_for_second,
)
