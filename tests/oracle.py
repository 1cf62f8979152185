"""What the op should return: the textbook's two lines, written out for every option and independently of nwfast.

    scores = -((query - key) * w)^2 / 2,   out = softmax(scores + log key_weight) @ value

Evaluated in float64 it is the oracle; evaluated in float32 it is the baseline whose own error sets the budget.
"""

import torch
from torch import Tensor

ROUNDING = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def scores(query, key, w=1.0, key_weight=None, exclude_self=False) -> Tensor:
    """The exponents, (..., M, N), or (..., M, N - 1) with exclude_self; in the dtype of the inputs."""
    if query.ndim == 1:
        query = query[:, None]
        if key.ndim == 1:
            key = key[:, None]
        else:  # per-query keys (M, N)
            query, key = query[:, None], key[..., None]
    rows = _rows(key, exclude_self)
    w = torch.as_tensor(w, dtype=query.dtype)
    if w.ndim > 1:
        w = w[..., None, None, :]
    result = -(((query.unsqueeze(-2) - rows) * w) ** 2).sum(-1) / 2
    if key_weight is not None:
        result = result + _rows(key_weight.log()[..., None], exclude_self)[..., 0]
    return result


def _rows(tensor: Tensor, exclude_self: bool) -> Tensor:
    """(..., N, X) as rows that queries index: (..., 1, N, X), or (..., N, N - 1, X) by the chapter's (1 - eye)."""
    if not exclude_self:
        return tensor.unsqueeze(-3)
    n = tensor.shape[-2]
    others = torch.arange(n).repeat(n, 1)[(1 - torch.eye(n)).bool()].reshape(n, n - 1)
    return tensor[..., others, :]


def textbook(query, key, value, w=1.0, key_weight=None, exclude_self=False) -> tuple[Tensor, Tensor]:
    """(out, lse) for every accepted combination of shapes, in the dtype of the inputs."""
    exponents = scores(query, key, w, key_weight, exclude_self)
    weights = torch.softmax(exponents, -1)
    has_channels = (
        value.ndim == 2 if query.ndim == key.ndim == 1 else (query.ndim > 1 and value.ndim == key.ndim)
    )
    rows = _rows(value if has_channels else value[..., None], exclude_self)
    out = (weights.unsqueeze(-2) @ rows).squeeze(-2)
    lse = torch.logsumexp(exponents, -1)
    if not has_channels:
        out = out.squeeze(-1)
    if query.ndim == 1 and key.ndim == 2:  # per-query keys
        out, lse = out.squeeze(-1), lse.squeeze(-1)
    return out, lse


def gradients(
    inputs, grad_out, grad_lse=None, exclude_self=False, dtype=torch.float64
) -> list[Tensor | None]:
    """Gradients of query, key, value, w and (if given) key_weight by autograd through the textbook."""
    leaves = [None if tensor is None else tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    out, lse = textbook(*leaves, exclude_self=exclude_self)
    outputs, cotangents = [out], [grad_out.to(dtype)]
    if grad_lse is not None:
        outputs, cotangents = [out, lse], [grad_out.to(dtype), grad_lse.to(dtype)]
    present = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(outputs, present, cotangents))
    return [None if leaf is None else next(found) for leaf in leaves]


def assert_weights_matter(query, key, w=1.0, key_weight=None, exclude_self=False) -> None:
    """Neither uniform nor one-hot: half of the rows average over more than 1.5 and less than 0.9 N keys."""
    exponents = scores(query, key, w, key_weight, exclude_self)
    weights = torch.softmax(exponents.double(), -1)
    effective = 1 / (weights**2).sum(-1)
    assert 1.5 < effective.median() < 0.9 * weights.shape[-1], (
        f"{effective.median():.3g} of {weights.shape[-1]} keys"
    )
