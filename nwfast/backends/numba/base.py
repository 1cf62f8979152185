"""What all Numba kernels share: compile options, typed pointers, exp2 and the addressing of strided batches.

Kernels get one int64 array, the *description* of a call, with sizes, addresses and strides at the places named below.
One small array costs less per call than a dozen array arguments, and one compiled kernel serves every number of
dimensions and every layout. float32 and float64 data are told apart by `example`, an empty array of that dtype.
"""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from ... import constants
from ...constants import EXP2_FLOOR_DOUBLE, EXP2_FLOOR_FLOAT, HALF_LOG2E, LN2, ROOT

__all__ = ["HALF_LOG2E", "LN2", "ROOT"]  # handed on to the kernels, with what stands here

# Numba's cache looks at the file of an entry point alone; with this digest of all sources in the entry point's closure
# a changed kernel in another file is a new entry.
DIGEST = hashlib.sha256(
    b"".join(
        source.read_bytes()
        for source in (*sorted(Path(__file__).parent.rglob("*.py")), Path(constants.__file__))
    )
).hexdigest()

# Neither nnan nor ninf: NaN and inf are data here. The flags stay with a function's own operations when it is inlined,
# so a difference q - k is written in a function without reassoc (EXACT) and only sums are free to be reordered (SUMS).
EXACT = {"nogil": True, "error_model": "numpy", "fastmath": {"nsz", "contract"}}
SUMS = {**EXACT, "fastmath": {"nsz", "contract", "reassoc"}}

# Places in the description: sizes, then addresses, then strides (in elements) of the last dimensions.
BATCH, M, N, D, C, SELF = range(6)
QUERY, KEY, VALUE, WEIGHT, W = range(8, 13)  # inputs; address 0: absent
OUT, LSE, STATE, TANGENT_W, TANGENT_Q = range(13, 18)  # contiguous; address 0: not wanted
GRAD_OUT, GRAD_LSE, GRAD_QUERY, GRAD_KEY, GRAD_VALUE, GRAD_W, GRAD_WEIGHT, ROWS, MEANS, KINDS = range(18, 28)
QUERY_M, QUERY_D, KEY_N, KEY_D, VALUE_N, VALUE_C, WEIGHT_N, W_D = range(28, 36)
BATCH_DIMS = 36
BATCHES = (
    37  # for each batch dimension, last first: its size and the strides of query, key, value, weight and w
)
BATCH_ITEMS = 6

# To be written where kernels widen: in them Python's float(x) leaves a float32 as it is, and x - y is rounded to one.
double: Any = np.float64

# With w scaled by ROOT the score in base 2 is a plain square: exp(-(w d)^2 / 2) = 2^-((ROOT w) d)^2.
ROUND = 6755399441055744.0  # 1.5 * 2^52

# 2^f on [0, 1), from the constant term on.
EXP2_FLOAT = tuple(np.float32(coefficient) for coefficient in EXP2_FLOOR_FLOAT)
_D0, _D1, _D2, _D3, _D4, _D5, _D6, _D7, _D8, _D9, _D10, _D11 = EXP2_FLOOR_DOUBLE


def _say_once(what: str, seen: list[bool]) -> None:
    if not seen:
        seen.append(True)
        warnings.warn(
            f"nwfast's Numba kernels cannot be cached on disk ({what}), so each process compiles them anew; set "
            "NUMBA_CACHE_DIR to a folder that can be written",
            stacklevel=3,
        )


_SAID: list[bool] = []


class _Cache:
    """Numba's cache of one function, without the failures of the disk: what cannot be read is compiled."""

    def __init__(self, cache: Any):
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, *about: Any) -> Any:
        try:
            return self._cache.load_overload(*about)
        except (OSError, EOFError, UnpicklingError):
            return None

    def save_overload(self, *about: Any) -> None:
        try:
            self._cache.save_overload(*about)
        except OSError as error:
            _say_once(str(error), _SAID)


def entry(function: Callable) -> Callable:
    """Compile an entry point; cached on disk where a place for that can be written."""
    compiled = njit(**EXACT)(function)
    try:
        compiled.enable_caching()
    except (RuntimeError, OSError) as error:  # no folder that can be written
        _say_once(str(error), _SAID)
    else:
        compiled._cache = _Cache(compiled._cache)
    return compiled


@intrinsic
def pointer(typingctx, address, example):
    """The address as a pointer to the dtype of the array `example`."""
    result = types.CPointer(example.dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.int64, example), codegen


@njit(**EXACT)
def exp2_double(x):
    """2^x for x < 1024, relative error 3e-16; 0 below -1022. Branch-free: loops over it become vector code."""
    x = max(x, -1023.0)
    whole = np.floor(x)
    f = x - whole
    p = _D11 * f + _D10
    p = p * f + _D9
    p = p * f + _D8
    p = p * f + _D7
    p = p * f + _D6
    p = p * f + _D5
    p = p * f + _D4
    p = p * f + _D3
    p = p * f + _D2
    p = p * f + _D1
    p = p * f + _D0
    # Adding ROUND leaves a whole number in the low bits.
    return p * np.int64((np.float64(whole + ROUND).view(np.int64) + 1023) << 52).view(np.float64)


@njit(**EXACT)
def offset(about, b, operand):
    """Where batch element b of an operand (0 query, 1 key, 2 value, 3 weight, 4 w) starts, in elements."""
    where = 0
    for dim in range(about[BATCH_DIMS]):
        place = BATCHES + BATCH_ITEMS * dim
        size = about[place]
        where += (b % size) * about[place + 1 + operand]
        b //= size
    return where
