"""The textbook formula in plain PyTorch: the oracle, and the fallback where no kernel can serve.

    s   = -((query - key) * w)^2 / 2,   out = softmax(s + log a) @ value,   lse = logsumexp(s + log a)

It builds the (M, N) matrix, so time and memory are O(M N). **It computes in float64 whatever the input dtype** and
returns float32 for inputs narrower than that (see `arithmetic_dtype`): float64 scores neither overflow nor lose the
nearest key for any float32 input. Being plain PyTorch it composes with every transform and to any order.

All functions take the canonical form described in `nwfast.backends`.
"""

import torch
from torch import Tensor


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels compute and return: float64 for float64, float32 for all narrower storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _unnormalised(
    query: Tensor, key: Tensor, w: Tensor, key_weight: Tensor | None, exclude_self: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms a_j exp(s_ij - m_i) (*B, M, N), their row sums (*B, M, 1) and the row maxima m (*B, M, 1), in float64."""
    query, key, w = query.double(), key.double(), w.double()
    if key.shape[-1] == 1:  # keeps the largest temporary at (*B, M, N)
        scores = -(((query - key.mT) * w.unsqueeze(-2)) ** 2) / 2
    else:
        scores = -(((query.unsqueeze(-2) - key.unsqueeze(-3)) * w[..., None, None, :]) ** 2).sum(-1) / 2
    keep = None
    if key_weight is not None:
        weight = key_weight.double().unsqueeze(-2)
        # A negative weight has no logarithm; the multiplicative form below would accept it silently.
        weight = torch.where(weight < 0, torch.nan, weight)
        keep = weight != 0
    if exclude_self:
        others = ~torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        keep = others if keep is None else keep & others
    kept = scores if keep is None else torch.where(keep, scores, -torch.inf)
    top = kept.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    # A key of weight 0 may lie nearer than all others: the clamp keeps 0 * exp(.) from becoming 0 * inf.
    terms = (scores - top).clamp(max=350.0).exp()
    if key_weight is not None:
        terms = terms * weight
    if exclude_self:
        terms = torch.where(others, terms, 0.0)
    return terms, terms.sum(-1, keepdim=True), top


def attention_weights(
    query: Tensor, key: Tensor, w: Tensor, key_weight: Tensor | None, exclude_self: bool
) -> Tensor:
    """Weights p (*B, M, N); a row that has no key left is NaN."""
    terms, total, _ = _unnormalised(query, key, w, key_weight, exclude_self)
    empty = total == 0
    weights = torch.where(empty, torch.nan, terms / torch.where(empty, 1.0, total))
    return weights.to(arithmetic_dtype(query.dtype))


def forward(
    query: Tensor, key: Tensor, value: Tensor, w: Tensor, key_weight: Tensor | None, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """Outputs (*B, M, C) and log-sums lse (*B, M); a row that has no key left is (NaN, -inf) with zero gradient."""
    dtype = arithmetic_dtype(query.dtype)
    terms, total, top = _unnormalised(query, key, w, key_weight, exclude_self)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    out = torch.where(empty, torch.nan, (terms @ value.double()) / total)  # autocast leaves float64 alone
    lse = torch.where(empty, -torch.inf, top + total.log()).squeeze(-1)
    return out.to(dtype), lse.to(dtype)
