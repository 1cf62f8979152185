"""What all Numba kernels share: compile options, typed pointers, exp2 and the addressing of strided batches.

Kernels get one int64 array, the *description* of a call, with sizes, addresses and strides at the places named below.
One small array costs less per call than a dozen array arguments, and one compiled kernel serves every number of
dimensions and every layout. float32 and float64 data are told apart by `example`, an empty array of that dtype.
"""

import hashlib
from pathlib import Path

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

# Numba's cache looks at the file of an entry point alone; with this digest of all sources in the entry point's closure
# a changed kernel in another file is a new entry.
DIGEST = hashlib.sha256(
    b"".join(source.read_bytes() for source in sorted(Path(__file__).parent.glob("numba*.py")))
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

# With w scaled by this root the score in base 2 is a plain square: exp(-(w d)^2 / 2) = 2^-((ROOT w) d)^2.
ROOT = 0.84932180028801904272  # sqrt(log2(e) / 2)
LN2 = 0.69314718055994530942
ROUND = 6755399441055744.0  # 1.5 * 2^52


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
    shifted = x + ROUND  # rounds to a whole number, which is then in its low bits
    f = x - (shifted - ROUND)
    p = 4.4352809446103361611e-10
    p = p * f + 7.0741056262456593708e-9
    p = p * f + 1.0178198033328527662e-7
    p = p * f + 1.3215433089594629037e-6
    p = p * f + 0.0000152527334899608046
    p = p * f + 0.00015403530462514613026
    p = p * f + 0.0013333558146789950323
    p = p * f + 0.0096181291075883350833
    p = p * f + 0.055504108664819921483
    p = p * f + 0.24022650695910156205
    p = p * f + 0.69314718055994533046
    p = p * f + 0.9999999999999999971
    return p * np.int64((np.float64(shifted).view(np.int64) + 1023) << 52).view(np.float64)


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
