"""Data that is not kind to kernels: offsets, numbers of one sign, and scales side by side that are far apart."""

import torch
from torch import Tensor

KINDS = ("values of one sign", "values of mixed scales", "keys with an offset", "weights of mixed scales")


def unkind(kind: str, inputs: list) -> list:
    """Query, key, value, w and key_weight (tensors; w may be a number, key_weight None), one of them changed.

    Places go with the last dimension but one of what has channels, or the last: so each kind is in every batch element.
    """
    query, key, value, w, key_weight = inputs
    if kind == "values of one sign":
        value = -2 - value.abs()
    elif kind == "values of mixed scales":
        value = value * decades(value, -3, 2)
    elif kind == "keys with an offset":
        query, key = query + 20, key + 20
    elif kind == "weights of mixed scales":
        key_weight = (
            torch.ones(key.shape[-1 if query.ndim == 1 else -2]) if key_weight is None else key_weight
        )
        key_weight = key_weight.to(key) * decades(key_weight, -4, 3).to(key)
    else:
        raise ValueError(kind)
    return [query, key, value, w, key_weight]


def decades(tensor: Tensor, first: int, last: int) -> Tensor:
    """Factors from 10^first to 10^last, of neighbours far apart, in the order of memory."""
    steps = torch.arange(tensor.numel(), device=tensor.device) * 5 % (last - first + 1) + first
    return (10.0**steps).reshape(tensor.shape).to(tensor.dtype)
