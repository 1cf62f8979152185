"""Attention of torch: scaled_dot_product_attention on features, and FlexAttention with a score of its own."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.problems.workloads import Call, Data

from .own import differentiate
from .peer import Peer, no_compiler

WIDE = 16  # FlexAttention's smallest head dimension


def _matrices(*tensors: Tensor) -> list[Tensor]:
    return [tensor[:, None] if tensor.ndim == 1 else tensor for tensor in tensors]


def on_features(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
    """-(q - k)^2 w^2 / 2 without its first term, which a softmax drops, is an inner product:

        (w q, -1/2) . (w k, |w k|^2)

    Keys are centred, since the squares cancel. The fused kernel wants as many value channels as features: zeros are
    added.
    """
    q, k, v = _matrices(query, key, value)
    centre = k.detach().mean(0)
    q, k = (q - centre) * w, (k - centre) * w
    left = torch.cat([q, torch.full_like(q[:, :1], -0.5)], 1)
    right = torch.cat([k, (k**2).sum(1, keepdim=True)], 1)
    channels, most = v.shape[1], max(v.shape[1], left.shape[1])
    left, right, v = (pad(tensor, (0, most - tensor.shape[1]))[None, None] for tensor in (left, right, v))
    out = scaled_dot_product_attention(left, right, v, scale=1.0)[0, 0, :, :channels]
    return out[:, 0] if value.ndim == 1 else out


def _on_features(given: Data) -> Call:
    def call() -> tuple[Tensor]:
        with torch.no_grad():
            return (on_features(*given.inputs),)

    return call


@functools.cache
def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _flex(given: Data) -> Call:
    """The score of each pair from captured coordinates; inner products of zeros are what it is added to."""
    query, key, value = _matrices(given.query, given.key, given.value)
    w = given.w
    features, channels = query.shape[1], value.shape[1]
    rows, keys = (torch.zeros(1, 1, len(x), WIDE) for x in (query, key))
    values = pad(value, (0, -channels % WIDE))[None, None].contiguous()
    columns = [(query[:, d].contiguous(), key[:, d].contiguous()) for d in range(features)]

    def score(inner: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        for q, k in columns:
            difference = (q[row] - k[column]) * w
            inner = inner - difference * difference / 2
        return inner

    def call() -> tuple[Tensor]:
        with torch.no_grad():
            out = _flex_attention()(rows, keys, values, score_mod=score, scale=1.0)
        return (out[0, 0, :, :channels],)

    return call


PEERS = (
    Peer(
        name="sdpa",
        about="`scaled_dot_product_attention` on the features (w q, -1/2) and (w k, (w k)^2), centred, padded for "
        "its fused kernel",
        package="torch",
        tolerance=2e-3,  # squares cancel
        forward=_on_features,
        gradients=functools.partial(differentiate, on_features),
        seconds_per_pair=4e-9,
    ),
    Peer(
        name="FlexAttention",
        about="`flex_attention`, compiled, with the score of the pair as `score_mod`; no training on the CPU",
        why_not=no_compiler,
        compiles=True,
        package="torch",
        forward=_flex,
        seconds_per_pair=1e-8,
    ),
)
