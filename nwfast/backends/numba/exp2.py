"""2^x and exp(-s / 2) in the kernels: branch-free, so that loops over them become vector code."""

import numpy as np
from numba import njit
from numba.extending import overload

from ...constants import EXP2_FLOOR_DOUBLE, EXP2_FLOOR_FLOAT, HALF_LOG2E
from .base import EXACT

ROUND = 6755399441055744.0  # 1.5 * 2^52
MOST_EXPONENT = (
    1000.0  # in base 2: where larger ones may occur they are cut off here, so that powers stay finite
)

# 2^f on [0, 1), from the constant term on.
_D0, _D1, _D2, _D3, _D4, _D5, _D6, _D7, _D8, _D9, _D10, _D11 = EXP2_FLOOR_DOUBLE
_C0, _C1, _C2, _C3, _C4, _C5 = (np.float32(coefficient) for coefficient in EXP2_FLOOR_FLOAT)

_HIGH = np.float32(HALF_LOG2E)
_LOW = np.float32(HALF_LOG2E - float(_HIGH))
_MOST = np.float32(176.0)  # the power of 2 is that of 0 here
_BIAS, _SHIFT = np.int32(127), np.int32(23)


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


def gauss(s):
    """exp(-s / 2), relative error 1e-7 or 3e-16; 0 where s is above 176 (float32) or 1416 (float64)."""
    raise NotImplementedError


@njit(**EXACT)
def gauss_float(s):
    """exp(-s / 2) in float32: degree 5, and log2(e) / 2 in two parts, since its rounding would bias all terms."""
    s = min(s, _MOST)
    x = s * _HIGH
    whole = np.ceil(x)
    f = (whole - x) - s * _LOW
    p = _C5 * f + _C4
    p = p * f + _C3
    p = p * f + _C2
    p = p * f + _C1
    p = p * f + _C0
    return p * np.int32((_BIAS - np.int32(whole)) << _SHIFT).view(np.float32)


@njit(**EXACT)
def gauss_double(s):
    """exp(-s / 2) in float64."""
    return exp2_double(min(s, 1418.0) * -HALF_LOG2E)


@overload(gauss, inline="always")
def _gauss(s):
    if s.bitwidth == 32:
        return lambda s: gauss_float(s)
    return lambda s: gauss_double(s)
