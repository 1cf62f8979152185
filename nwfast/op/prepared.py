"""Keys prepared for a fixed w: compressed once by the linear method, they serve any number of predictions."""

from torch import Tensor

from .. import backends
from ..backends.reference import arithmetic_dtype
from .autograd import drop_last
from .schema import COMPRESS, GRID_COMPRESS, GRID_PREDICT, PREDICT

# How native_fgt_predict begins its refusal.
_BEYOND_PREPARED = "nwfast: queries beyond"
# Weights that are all below it are for the op itself, which rescales them.
_LEAST_WEIGHT = 2.0**-960


def compress(kernel: str, key: Tensor, value: Tensor, w: Tensor, key_weight: Tensor | None) -> list[Tensor]:
    """Keys (N, D) with their values (N, C), compressed for one w (D,); empty where that cannot serve, or does not pay.

    With one feature keys have to ascend. It is done in the arithmetic dtype.
    """
    dtype = arithmetic_dtype(key.dtype)
    key, value, w = key.detach().to(dtype), value.detach().to(dtype), w.detach().to(dtype)
    key_weight = key_weight if key_weight is None else key_weight.detach().to(dtype)
    if kernel.startswith("numba"):
        return backends.load("numba_fgt").compress(key, value, key_weight, w)
    if key_weight is not None and not (key_weight >= _LEAST_WEIGHT).any():
        return []
    if key.shape[1] > 1:
        if key_weight is not None:
            counted = key_weight != 0
            key, value, key_weight = key[counted], value[counted], key_weight[counted]
        compressed = (
            GRID_COMPRESS(key, value, w.expand(key.shape[1]).contiguous(), key_weight) if len(key) else ()
        )
        return list(compressed) if compressed and compressed[-1].numel() else []
    compressed = COMPRESS(key.squeeze(-1), value, w, key_weight)
    return list(compressed) if compressed[-1].numel() else []


def predict(kernel: str, compressed: list[Tensor], query: Tensor, drop: int) -> tuple[Tensor, Tensor] | None:
    """(out, lse) at queries (M, 1), in any order, from compressed keys, not differentiable; None if it cannot serve."""
    x = query.detach().to(arithmetic_dtype(query.dtype))
    if kernel.startswith("numba"):
        out, lse = backends.load("numba_fgt").predict(compressed, x)
    else:
        try:
            out, lse = PREDICT(x.squeeze(-1), *compressed)
        except RuntimeError as error:  # queries at 1e60 and beyond
            if _BEYOND_PREPARED in str(error):
                return None
            raise
    return drop_last(out, drop).to(query.dtype), drop_last(lse, drop - 1)


def predict_several(compressed: list[Tensor], query: Tensor, drop: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse) at queries (M, D), D = 2 or 3, as `predict`; and the rows that need the keys, which have no result."""
    x = query.detach().to(arithmetic_dtype(query.dtype))
    out, lse, left = GRID_PREDICT(x.T.contiguous(), *compressed)
    return drop_last(out, drop).to(query.dtype), drop_last(lse, drop - 1), left
