"""KeOps: LazyTensors, reduced by sumsoftmaxweight. It compiles each formula when it is first used."""

import functools

import torch
from torch import Tensor

from benchmarks.problems.workloads import Call, Data

from .own import differentiate
from .peer import Peer, missing, no_compiler


def why_not() -> str:
    return no_compiler() or missing("pykeops")


def lazy(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
    """The two lines on symbolic matrices: softmax over the keys, weighted by the values."""
    from pykeops.torch import LazyTensor

    q, k, v = (tensor[:, None] if tensor.ndim == 1 else tensor for tensor in (query * w, key * w, value))
    scores = -((LazyTensor(q[:, None]) - LazyTensor(k[None])) ** 2).sum(-1) / 2
    out = scores.sumsoftmaxweight(LazyTensor(v[None].contiguous()), dim=1)
    return out[:, 0] if value.ndim == 1 else out


def _forward(given: Data) -> Call:
    def call() -> tuple[Tensor]:
        with torch.no_grad():
            return (lazy(*given.inputs),)

    return call


PEERS = (
    Peer(
        name="KeOps",
        about="`LazyTensor`, `sumsoftmaxweight`; w is multiplied into queries and keys beforehand",
        why_not=functools.cache(why_not),
        compiles=True,
        package="pykeops",
        forward=_forward,
        gradients=functools.partial(differentiate, lazy),
        seconds_per_pair=1e-8,
    ),
)
