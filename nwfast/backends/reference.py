"""The textbook formula in plain PyTorch: the oracle, and the fallback where no kernel can serve.

    s   = -((query - key) * w)^2 / 2,   out = softmax(s + log a) @ value,   lse = logsumexp(s + log a)

It builds the (M, N) matrix, so time and memory are O(M N). **It computes in float64 whatever the input dtype** and
returns float32 for inputs narrower than that (see `arithmetic_dtype`): float64 scores neither overflow nor lose the
nearest key for any float32 input. Being plain PyTorch it composes with every transform and to any order.

Numbers that are not finite are taken out before anything is computed, and what they make of a row is put into the
result: so no product of zero and infinity reaches another row, or a gradient. A key that is left out (weight 0) has no
part in anything but the gradient of its own weight.

All functions take the canonical form described in `nwfast.backends`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import is_captured


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels compute and return: float64 for float64, float32 for all narrower storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Of a left-out key nearer than all others exp(score) is cut off here. It is for the gradient of its weight alone, which
# then is a finite number, also times values and divided by weights of usual sizes.
_LARGEST_EXPONENT = 600.0
# Distances in bandwidths are cut off here: their squares are still finite.
_LARGEST_DISTANCE = 1e150


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


class _Saturate(torch.autograd.Function):
    """The identity; the gradient is at most the largest finite number of `dtype`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, largest):
        return weight.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.largest = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-ctx.largest, ctx.largest), None


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
    query, key, value, w = query.double(), key.double(), value.double(), w.double()

    bad_key, far_key = key.isnan().any(-1), key.isinf().any(-1)
    counted = ~far_key | bad_key  # a key at infinity is infinitely far
    left_out: Any = None
    weight = None
    if key_weight is not None:
        left_out = key_weight == 0
        largest = torch.finfo(key_weight.dtype).max
        weight = key_weight.double()
        if not _plain():
            weight = torch.where(left_out, _Saturate.apply(weight, largest), weight)
        bad_weight = ~weight.isfinite() | (weight < 0)
        bad_key = (bad_key | bad_weight) & ~left_out
        counted = counted & ~left_out
        odd = ~key.isfinite().all(-1) | ~value.isfinite().all(-1)
        value = torch.where(left_out.unsqueeze(-1), torch.where(value.isfinite(), value, 0.0).detach(), value)
        weight = torch.where((left_out & odd) | bad_weight, 0.0, weight)
        key = torch.where(left_out.unsqueeze(-1), torch.where(key.isfinite(), key, 0.0).detach(), key)
    key = torch.where(far_key.unsqueeze(-1), torch.where(key.isfinite(), key, 0.0).detach(), key)

    poisoned = query.isnan().any(-1, keepdim=True) | ~w.isfinite().all(-1)[..., None, None]
    poisoned = poisoned | _any_other(bad_key.unsqueeze(-1), exclude_self)
    away = query.isinf().any(-1, keepdim=True)
    query, key, w = _finite(query), _finite(key), _finite(w)
    if key.shape[-1] == 1:  # keeps the largest temporary at (*B, M, N)
        distances = (query - key.mT) * w.unsqueeze(-2)
        scores = -(distances.clamp(-_LARGEST_DISTANCE, _LARGEST_DISTANCE) ** 2) / 2
    else:
        distances = (query.unsqueeze(-2) - key.unsqueeze(-3)) * w[..., None, None, :]
        scores = -(distances.clamp(-_LARGEST_DISTANCE, _LARGEST_DISTANCE) ** 2).sum(-1) / 2
    del distances
    counted = counted.unsqueeze(-2)
    keep = counted
    if exclude_self:
        others = ~torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        keep = counted & others
    top = torch.where(keep, scores.detach(), -torch.inf).amax(-1, keepdim=True)
    empty = (top == -torch.inf) | away
    top = torch.where(top == -torch.inf, 0.0, top)
    terms = (scores - top).clamp(max=_LARGEST_EXPONENT).exp()
    if weight is None:
        terms = torch.where(keep, terms, 0.0)
    else:
        # Left-out keys stay in, with weight 0, for the gradient of that weight.
        present = counted | left_out.unsqueeze(-2)
        present = present & others if exclude_self else present
        terms = torch.where(present, terms, 0.0) * weight.unsqueeze(-2)
    return _Terms(terms, terms.sum(-1, keepdim=True), top, poisoned, empty, counted, value)


def _any_other(which: Tensor, exclude_self: bool) -> Tensor:
    """Whether any row of `which` (*B, N, X) is true, (*B, 1, X); with exclude_self any but the own, (*B, N, X)."""
    if not exclude_self:
        return which.any(-2, keepdim=True)
    return which.sum(-2, keepdim=True) - which.to(torch.int64) > 0


def attention_weights(
    query: Tensor, key: Tensor, w: Tensor, key_weight: Tensor | None, exclude_self: bool
) -> Tensor:
    """Weights p (*B, M, N); a row that has no key left is NaN."""
    terms, total, _, poisoned, empty, _, _ = _unnormalised(query, key, key, w, key_weight, exclude_self)
    zero = empty | (total == 0)
    weights = torch.where(zero, torch.nan, terms / torch.where(zero, 1.0, total))
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
    out = torch.where(empty, torch.nan, (terms @ _finite(values)) / total)  # autocast leaves float64 alone
    odd_rows = poisoned | _any_other(odd & counted.mT, exclude_self)
    filled = torch.where(poisoned, torch.nan, terms.detach() @ infinite)
    out = _poison(out, odd_rows.expand_as(out), filled.expand_as(out))
    lse = torch.where(empty, -torch.inf, top + total.log())
    lse = _poison(lse, poisoned.expand_as(lse), torch.full_like(lse, torch.nan)).squeeze(-1)
    lse = lse.expand(out.shape[:-1]).contiguous()  # values may have leading dimensions that nothing else has
    return out.to(dtype), lse.to(dtype)
