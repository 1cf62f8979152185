"""What all Numba kernels share: compile options, the cache on disk, typed pointers, strided batches.

Kernels get one int64 array, the *description* of a call, with sizes, addresses and strides at the places named below.
One small array costs less per call than a dozen array arguments, and one compiled kernel serves every number of
dimensions and every layout. float32 and float64 data are told apart by `example`, an empty array of that dtype.
"""

import gc
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.core.compiler import Compiler
from numba.extending import intrinsic

from ... import constants
from ...constants import HALF_LOG2E, LN2, ROOT

__all__ = ["HALF_LOG2E", "LN2", "ROOT"]  # handed on to the kernels, with what stands here

# Of all sources: see _Cache.
DIGEST = hashlib.sha256(
    b"".join(
        source.read_bytes()
        for source in (*sorted(Path(__file__).parent.rglob("*.py")), Path(constants.__file__))
    )
).hexdigest()

# Neither nnan nor ninf: NaN and inf are data here. The flags stay with a function's own operations when it is inlined,
# so a difference q - k is written in a function without reassoc (EXACT) and only sums are free to be reordered (SUMS).
# Only entry points get the wrappers by which Python calls a function: they cost about a fifth of the compile time.
# Constants in the arguments of an inner function make a version of it for each (Numba's literal types), as do variables
# that begin as constants: where such a function is large, they begin as int64(0) instead. Rewrites are for array
# expressions, which are loops here. Large functions of one caller are inlined by Numba: else they would be optimised
# and assembled alone first, and then again within it.
_INSIDE = {
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "no_rewrites": True,
}
EXACT = {**_INSIDE, "fastmath": {"nsz", "contract"}}
SUMS = {**_INSIDE, "fastmath": {"nsz", "contract", "reassoc"}}

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
int64: Any = np.int64


def _say_once(what: str, seen: list[bool]) -> None:
    if not seen:
        seen.append(True)
        warnings.warn(
            f"nwfast's Numba kernels cannot be cached on disk ({what}), so each process compiles them anew; set "
            "NUMBA_CACHE_DIR to a folder that can be written",
            stacklevel=3,
        )


_SAID: list[bool] = []


class _Cache(FunctionCache):
    """Numba's cache of one function, for these sources, and without the failures of the disk.

    Numba looks at the file of an entry point alone: here a change in any file is a new entry. What cannot be read is
    compiled.
    """

    def _index_key(self, *about: Any) -> tuple:
        return *super()._index_key(*about), DIGEST

    def load_overload(self, *about: Any) -> Any:
        try:
            return super().load_overload(*about)
        except (OSError, EOFError, UnpicklingError):
            return None

    def save_overload(self, *about: Any) -> None:
        try:
            super().save_overload(*about)
        except OSError as error:
            _say_once(str(error), _SAID)


class _Compiler(Compiler):
    """Numba's, without searches for cyclic garbage: they would go through all that it holds again and again."""

    def compile_extra(self, func: Callable) -> Any:
        collects = gc.isenabled()
        gc.disable()
        try:
            return super().compile_extra(func)
        finally:
            if collects:
                gc.enable()


def entry(function: Callable) -> Callable:
    """Compile an entry point, which takes the units first .. last of a call; all else is compiled into these.

    Cached on disk where a place for that can be written.
    """
    compiled = njit(**(EXACT | {"no_cpython_wrapper": False, "pipeline_class": _Compiler}))(function)
    try:
        compiled._cache = _Cache(function)
    except (RuntimeError, OSError) as error:  # no folder that can be written
        _say_once(str(error), _SAID)
    return compiled


@intrinsic
def pointer(typingctx, address, example):
    """The address as a pointer to the dtype of `example`, an array or a dtype."""
    result = types.CPointer(example.dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.int64, example), codegen


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


class Inputs(NamedTuple):
    """The inputs as pointers, and where those of one batch element start, in elements."""

    query: Any
    key: Any
    value: Any
    weight: Any
    w: Any
    at_query: int
    at_key: int
    at_value: int
    at_weight: int
    at_w: int


@njit(**EXACT)
def inputs_of(example, about, b):
    """The inputs of batch element b."""
    return Inputs(
        pointer(about[QUERY], example),
        pointer(about[KEY], example),
        pointer(about[VALUE], example),
        pointer(about[WEIGHT], example),
        pointer(about[W], example),
        offset(about, b, int64(0)),
        offset(about, b, int64(1)),
        offset(about, b, int64(2)),
        offset(about, b, int64(3)),
        offset(about, b, int64(4)),
    )


@njit(**EXACT)
def lse_gradient(example, about, row):
    """The gradient of a row's lse in float64, 0 where there is none."""
    return double(pointer(about[GRAD_LSE], example)[row]) if about[GRAD_LSE] != 0 else 0.0
