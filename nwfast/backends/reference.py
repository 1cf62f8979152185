"""The textbook formula in plain PyTorch: the oracle, and the fallback where no kernel can serve.

    s   = -((query - key) * w)^2 / 2,   out = softmax(s + log a) @ value,   lse = logsumexp(s + log a)

It builds the (M, N) matrix, so time and memory are O(M N). **It computes in float64 whatever the input dtype** and
returns float32 for inputs narrower than that (see `arithmetic_dtype`): float64 scores neither overflow nor lose the
nearest key for any float32 input. Being plain PyTorch it composes with every transform and to any order.

Scores are taken relative to the nearest key r of the row that counts, by products in which no distance to the query
cancels, so that a row far from all keys is as exact as one among them:

    s_j - s_r = -sum_f w_f^2 (k_rf - k_jf)(2 q_f - k_rf - k_jf) / 2,   s_r = -sum_f ((q_f - k_rf) w_f)^2 / 2

As functions of q, k_j and w, with k_r held fixed, these add up to the scores for any r: their derivatives of any order
are those of the formula.

Numbers that are not finite are taken out before anything is computed, and what they make of a row is put into the
result: so no product of zero and infinity reaches another row, or a gradient. A key that is left out (weight 0) has no
part in anything but the gradient of its own weight.

All functions take the canonical form described in `nwfast.backends`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import is_captured


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels compute and return: float64 for float64, float32 for all narrower storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Of a nearest key further than this, in bandwidths, distances are scaled to this before they are squared and added.
_LARGEST_ROOT = 1e140
# And cut off here.
_LARGEST_SQUARED = 1e150
# Exponents of e are cut off here, where exp is still finite.
_LARGEST_EXPONENT = 709.0


class _Terms(NamedTuple):
    """What both results are made of."""

    terms: Tensor  # a_j exp(s_ij - m_i), (*B, M, N)
    total: Tensor  # their row sums, (*B, M, 1)
    top: Tensor  # m, the largest score of a key that counts, (*B, M, 1)
    poisoned: Tensor  # rows that a NaN, or a weight that is none, makes NaN, (*B, M, 1)
    empty: Tensor  # rows that have no key left, or a query at infinity, (*B, M, 1)
    counted: Tensor  # which keys count, (*B, 1, N)
    value: Tensor  # without what left-out keys hold; key where there is none


class _Poison(torch.autograd.Function):
    """`filled` where `mask` says so; gradients are NaN there, but for a cotangent of 0, which adds nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(result, mask, filled):
        return torch.where(mask, filled, result)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return torch.where(mask & (grad != 0), torch.nan, torch.where(mask, 0.0, grad)), None, None


class _Replace(torch.autograd.Function):
    """0 where `mask` says so; the gradient passes as it is, NaN where it is poisoned."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor, mask):
        return torch.where(mask, 0.0, tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _at_most(tensor: Tensor, bound: float) -> Tensor:
    """The tensor cut off; the derivative is 1 at the bound, where nearest keys are: clamp of torch 2.14 has 0."""
    return torch.where(tensor > bound, bound, tensor)


class _Weighted(torch.autograd.Function):
    """lift weight exp(score) for weights (*B, N) and scores (*B, M, N), at most 0 where the weight is not 0.

    The gradient of a weight of 0 is a sum of products with exp(score), which may be beyond all numbers: it is taken
    relative to the largest one that has a part in it, so that no infinities of either sign meet. Beyond `largest` that
    number stands.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, scores, lift, largest):
        return (weight * lift).unsqueeze(-2) * scores.clamp(max=0.0).exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.largest = inputs[3]

    @staticmethod
    def backward(ctx, grad):
        weight, scores, lift = ctx.saved_tensors
        weight, lift = weight.unsqueeze(-2), lift.unsqueeze(-2)
        by_score = grad * (weight * lift) * _at_most(scores, 0.0).exp()
        if not ctx.needs_input_grad[0] or 0 in grad.shape:
            return torch.zeros_like(weight).squeeze(-2), by_score, None, None
        most = torch.finfo(grad.dtype).max
        scores, highest = scores.clamp(max=most), torch.where(grad == 0, 0.0, scores.detach())
        for dim in range(-grad.ndim, 0):
            if dim == -2 or weight.shape[dim] != grad.shape[dim]:
                highest = highest.amax(dim, keepdim=True)
        highest = highest.clamp(0.0, most)
        scale = 2.0 ** -(math.prod(grad.shape).bit_length() + 1)  # no partial sum overflows
        total = grad.clamp(-most, most) * _at_most(scores - highest, 0.0).exp() * scale
        half = (highest / 2).clamp(max=_LARGEST_EXPONENT).exp()
        total = (total.sum_to_size(weight.shape) * half).clamp(-most, most) * lift * half
        total = total.clamp(-ctx.largest * scale, ctx.largest * scale) / scale
        return total.squeeze(-2), by_score, None, None


class _Unscaled(torch.autograd.Function):
    """sum_f (a_f w_f) (b_f w_f) / -2, (*B, M, N), of differences (*B, M, N, D) and w, by products with root^2 w.

    These are finite where their sum is. The division by root^4 would overflow in the backward pass, and meet
    differences of 0: there w is taken as it is.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b, w, root):
        scaled = w * root.unsqueeze(-1) * root.unsqueeze(-1)  # root^2 alone may be 0
        return _summed(_product(a, b, scaled, True), True) / root / root / root / root

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx, grad):
        a, b, w = ctx.saved_tensors
        of_a = grad.unsqueeze(-1) * _bandwidths(b, w / -2, True)
        of_b = grad.unsqueeze(-1) * _bandwidths(a, w / -2, True)
        of_w = torch.where(of_a.isinf() & (a == 0), 0.0, of_a * a) + torch.where(
            of_b.isinf() & (b == 0), 0.0, of_b * b
        )
        found = (of_a * w, a), (of_b * w, b), (of_w, w)
        return *(part.sum_to_size(tensor.shape) for part, tensor in found), None


def _plain() -> bool:
    """Whether only what torch itself differentiates will do: for forward mode, and for what is compiled."""
    return is_captured() or forward_ad._current_level >= 0


def _poison(result: Tensor, mask: Tensor, filled: Tensor) -> Tensor:
    return torch.where(mask, filled, result) if _plain() else _Poison.apply(result, mask, filled)


def _finite(tensor: Tensor) -> Tensor:
    """The tensor with 0 for what is not finite."""
    mask = ~tensor.isfinite()
    return torch.where(mask, 0.0, tensor) if _plain() else _Replace.apply(tensor, mask)


def _unnormalised(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    key_weight: Tensor | None,
    exclude_self: bool,
) -> _Terms:
    wide = query.dtype == torch.float64
    query, key, value, w = query.double(), key.double(), value.double(), w.double()

    bad_key, far_key = key.isnan().any(-1), key.isinf().any(-1)
    counted = ~far_key | bad_key  # a key at infinity is infinitely far
    left_out: Any = None
    no_weight: Any = None
    lift: Any = None
    log_lift: Any = 0.0
    weight = None
    if key_weight is not None:
        left_out = key_weight == 0
        weight = key_weight.double()
        # Sums of the smallest numbers would have few digits.
        highest = weight.detach().amax(-1, keepdim=True)
        lift = torch.ones_like(highest).masked_fill(highest < 2.0**-500, 2.0**500)
        log_lift = lift.log().unsqueeze(-1)
        bad_weight = ~weight.isfinite() | (weight < 0)
        bad_key = (bad_key | bad_weight) & ~left_out
        counted = counted & ~left_out
        odd = ~key.isfinite().all(-1) | ~value.isfinite().all(-1)
        value = torch.where(left_out.unsqueeze(-1), torch.where(value.isfinite(), value, 0.0).detach(), value)
        no_weight = (left_out & odd) | bad_weight
        weight = torch.where(no_weight, 0.0, weight)  # and no gradient, in a row that is NaN either
        key = torch.where(left_out.unsqueeze(-1), torch.where(key.isfinite(), key, 0.0).detach(), key)
    key = torch.where(far_key.unsqueeze(-1), torch.where(key.isfinite(), key, 0.0).detach(), key)

    poisoned = query.isnan().any(-1, keepdim=True) | ~w.isfinite().all(-1)[..., None, None]
    poisoned = poisoned | _any_other(bad_key.unsqueeze(-1), exclude_self)
    away = query.isinf().any(-1, keepdim=True)
    query, key, w = _finite(query), _finite(key), _finite(w)
    if wide:
        query, key, w = _with_finite_differences(query, key, w)
    counted = counted.unsqueeze(-2)
    keep = counted
    if exclude_self:
        others = ~torch.eye(query.shape[-2], dtype=torch.bool, device=query.device)
        keep = counted & others
    w = w.unsqueeze(-2)
    nearest, root = _nearest(query.detach(), key.detach(), w.detach(), keep, wide)
    if key.shape[-1] == 1 or not wide:
        scores = _relative_scores(query, key, w, nearest, wide)
    elif _plain():
        scores = _relative_scores(query, key, w * root * root, nearest, wide) / root / root / root / root
    else:
        scores = _Unscaled.apply(*_differences(query, key, nearest), w.unsqueeze(-2), root)
    # Of keys that rounding cannot tell apart the largest score is 0: cutting one off would take its derivatives.
    above = torch.where(keep, scores.detach(), 0.0).clamp(0.0, torch.finfo(scores.dtype).max)
    above = above.amax(-1, keepdim=True)
    scores = scores - above
    to_nearest = _bandwidths(query - nearest, w, wide)
    top = -(to_nearest * (to_nearest / 2)).sum(-1, keepdim=True) - log_lift + above
    empty = ~keep.any(-1, keepdim=True) | away
    if key_weight is None or weight is None:
        terms = torch.where(keep, _at_most(scores, 0.0).exp(), 0.0)
    else:
        # Left-out keys stay in, with weight 0, for the gradient of that weight.
        present = counted | left_out.unsqueeze(-2)
        present = (present & others if exclude_self else present) & ~no_weight.unsqueeze(-2)
        scores = torch.where(present, scores, -torch.inf)
        if _plain():
            terms = (weight * lift).unsqueeze(-2) * _at_most(scores, _LARGEST_EXPONENT).exp()
        else:
            terms = _Weighted.apply(weight, scores, lift, torch.finfo(key_weight.dtype).max)
    return _Terms(terms, terms.sum(-1, keepdim=True), top, poisoned, empty, counted, value)


def _with_finite_differences(query: Tensor, key: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same problem in other units if coordinates are so large that sums of two differences may overflow."""
    most = torch.finfo(query.dtype).max
    large = (query.abs() > most / 4).any() | (key.abs() > most / 4).any()
    unit = torch.where(large, 0.25, 1.0).to(query.dtype)
    return query * unit, key * unit, (w / unit).clamp(-most, most)


def _bandwidths(difference: Tensor, w: Tensor, wide: bool) -> Tensor:
    """Differences of coordinates in bandwidths: finite, so that no gradient is 0 times infinity.

    `wide` tells of float64 data, which has the range to overflow.
    """
    scaled = difference * w
    most = torch.finfo(scaled.dtype).max
    return scaled.clamp(-most, most) if wide else scaled


def _relative_scores(query: Tensor, key: Tensor, w: Tensor, nearest: Tensor, wide: bool) -> Tensor:
    """s_ij less the score of the key `nearest` (*B, M, D) of row i, (*B, M, N), for w (*B, M or 1, D)."""
    a, b = _differences(query, key, nearest)
    if key.shape[-1] == 1:
        return _product(a, b, w, wide)
    return _summed(_product(a, b, w.unsqueeze(-2), wide), wide)


def _differences(query: Tensor, key: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
    """k_r - k_j and 2 q - k_r - k_j, (*B, M, N, D); with one feature (*B, M, N), the largest temporary there is."""
    if key.shape[-1] == 1:
        key = key.mT
    else:
        query, key, nearest = query.unsqueeze(-2), key.unsqueeze(-3), nearest.unsqueeze(-2)
    # 2 q - k_r in two parts: it cancels against k_j where that lies as far on the other side.
    twice = 2 * query
    mirrored = twice - nearest
    part = (mirrored - twice).detach()
    rest = ((twice - (mirrored - part)) - (nearest + part)).detach()
    return nearest - key, (mirrored - key) + rest


def _product(a: Tensor, b: Tensor, w: Tensor, wide: bool) -> Tensor:
    return _bandwidths(a, w, wide) * _bandwidths(b, w / -2, wide)


def _summed(parts: Tensor, wide: bool) -> Tensor:
    """The sum over features."""
    if wide:
        most = torch.finfo(parts.dtype).max / parts.shape[-1]
        parts = parts.clamp(-most, most)
    return parts.sum(-1)


def _nearest(query: Tensor, key: Tensor, w: Tensor, keep: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """The coordinates (*B, M, D) of the nearest key that each row keeps (of any if it keeps none), and a scale's root.

    By rounded distances first; of keys that they cannot tell apart the differences of their squares choose. With w
    times the scale (*B, M, 1), which may be below all numbers, these are finite but for keys that are much further
    than the nearest.
    """
    widest = w.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    if key.shape[-1] == 1:
        nearer, steps = -(query - key.mT).abs(), 1
        distances = nearer.abs()
    else:
        differences = (query.unsqueeze(-2) - key.unsqueeze(-3)).abs()
        distances = (differences * (w / widest).abs().unsqueeze(-2)).amax(-1)
        steps = 2 if wide else 1  # others leave float64 half of its digits
    least = torch.where(keep, distances, torch.finfo(query.dtype).max).amin(-1, keepdim=True)
    root = ((_LARGEST_ROOT / least).sqrt() / widest.sqrt()).clamp(max=1.0)
    scaled = w * root * root
    if key.shape[-1] > 1:
        parts = _bandwidths(differences, scaled.abs().unsqueeze(-2), wide)
        nearer = -(parts.clamp(max=_LARGEST_SQUARED) ** 2).sum(-1)
        del differences, parts
    for step in range(steps + 1):
        place = torch.where(keep, nearer, -torch.inf).argmax(-1, keepdim=True)
        nearest = torch.take_along_dim(key, place, -2)
        if step < steps:
            nearer = _relative_scores(query, key, scaled, nearest, wide)
    return nearest, root


def _any_other(which: Tensor, exclude_self: bool) -> Tensor:
    """Whether any row of `which` (*B, N, X) is true, (*B, 1, X); with exclude_self any but the own, (*B, N, X)."""
    if not exclude_self:
        return which.any(-2, keepdim=True)
    return which.sum(-2, keepdim=True) - which.to(torch.int64) > 0


def _normalised(terms: Tensor, total: Tensor) -> Tensor:
    """Weights p (*B, M, N). Of a row that has all its weight on one key the gradient is exactly 0, however far it is.

    That takes a sum of exactly 1 in the backward pass, where a division by the sum itself leaves its rounding.
    """
    share = terms / total.detach()
    whole = share.sum(-1, keepdim=True)
    return share / torch.where(whole == 0, 1.0, whole)


def attention_weights(
    query: Tensor, key: Tensor, w: Tensor, key_weight: Tensor | None, exclude_self: bool
) -> Tensor:
    """Weights p (*B, M, N); a row that has no key left is NaN."""
    terms, total, _, poisoned, empty, _, _ = _unnormalised(query, key, key, w, key_weight, exclude_self)
    zero = empty | (total == 0)
    weights = torch.where(zero, torch.nan, _normalised(terms, torch.where(zero, 1.0, total)))
    weights = _poison(weights, poisoned.expand_as(weights), torch.full_like(weights, torch.nan))
    return weights.to(arithmetic_dtype(query.dtype))


def forward(
    query: Tensor, key: Tensor, value: Tensor, w: Tensor, key_weight: Tensor | None, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """Outputs (*B, M, C) and log-sums lse (*B, M); a row that has no key left is (NaN, -inf) with zero gradient."""
    dtype = arithmetic_dtype(query.dtype)
    terms, total, top, poisoned, empty, counted, values = _unnormalised(
        query, key, value, w, key_weight, exclude_self
    )
    empty = empty | (total == 0)
    total = torch.where(empty, 1.0, total)
    odd = ~values.isfinite()  # of those that count: they are in every row, whatever they weigh
    infinite = torch.where(odd, values, 0.0).detach()
    weights = _normalised(terms, total)
    out = torch.where(empty, torch.nan, weights @ _finite(values))  # autocast leaves float64 alone
    odd_rows = poisoned | _any_other(odd & counted.mT, exclude_self)
    filled = torch.where(poisoned, torch.nan, weights.detach() @ infinite)
    out = _poison(out, odd_rows.expand_as(out), filled.expand_as(out))
    lse = torch.where(empty, -torch.inf, top + total.log())
    lse = _poison(lse, poisoned.expand_as(lse), torch.full_like(lse, torch.nan)).squeeze(-1)
    lse = lse.expand(out.shape[:-1]).contiguous()  # values may have leading dimensions that nothing else has
    return out.to(dtype), lse.to(dtype)
