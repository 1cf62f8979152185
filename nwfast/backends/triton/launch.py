"""How a call is laid out over the device: batches as offsets, block sizes, parts of the keys.

Block sizes follow from the shapes alone. Timing candidates at run time (triton.autotune) would let the order of sums,
and so the last bits of a result, differ from one process to the next; and it cannot run while a graph is captured.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import _INTERPRETED, batch_shape

# Products are fused where the kernels say so, and nowhere else: see terms.py. Told a limit, NVIDIA's assembler does
# not spill a register or two to reach the next step of occupancy.
OPTIONS = {"enable_fp_fusion": False, **({} if torch.version.hip else {"maxnreg": 255})}
# The plain sums of one feature fit in as many registers as leave room for three programs of four warps each.
LEAN = {**OPTIONS, **({} if torch.version.hip else {"maxnreg": 168})}
LEAST_PART = 1024  # keys that a part must have for its merge to pay
FAR_KEYS = 256  # keys of one step of a far row


class Blocks(NamedTuple):
    """Sizes of a program's tile and the warps that share it."""

    rows: int
    columns: int
    warps: int


def without_left_out(key: Tensor, value: Tensor, key_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Key and value for forward and query-side kernels: keys of weight 0 hold what one that counts does.

    So they are never nearer than all that count, and no product with their weight is 0 times what is not finite.
    """
    if key_weight is None:
        return key, value
    left_out = (key_weight == 0).unsqueeze(-1)  # (*B, N, 1)
    first = (~left_out).int().argmax(-2, keepdim=True)
    none = left_out.gather(-2, first)  # no key counts

    def replaced(tensor: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(tensor.shape[:-2], left_out.shape[:-2])
        place = first.expand(*batch, 1, tensor.shape[-1])
        anchor = tensor.expand(*batch, *tensor.shape[-2:]).gather(-2, place)
        return torch.where(left_out, torch.where(none, torch.zeros_like(anchor), anchor), tensor)

    return replaced(key), replaced(value)


class Call:
    """Sizes, strides and block counts of one call in canonical form."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, w: Tensor, key_weight: Tensor | None):
        self.batch = batch_shape(query, key, value)
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.device = query.device
        self.m, self.d = query.shape[-2:]
        self.n, self.c = value.shape[-2:]
        self.weighted = key_weight is not None
        # Kernels want a pointer even where they read none.
        self.tensors = query, key, value, w, key_weight if key_weight is not None else w
        inner = 2, 2, 2, 1, 1  # trailing dimensions that are not of the batch
        self.batches = 1
        for size in self.batch:
            self.batches *= size
        self.query_m, self.query_d = query.stride()[-2:]
        self.key_n, self.key_d = key.stride()[-2:]
        self.value_n, self.value_c = value.stride()[-2:]
        self.w_d = 0 if w.shape[-1] == 1 else w.stride(-1)
        self.weight_n = 0 if key_weight is None else key_weight.stride(-1)
        table, self.batch_strides = _offsets(self.batch, self.tensors, inner, self.device)
        self.tabled = table is not None
        self.table = table if table is not None else query
        # Values of half precision have no digits to lose to float32 sums.
        self.centred = self.n > 0 and value.dtype in (torch.float32, torch.float64)
        # In the interpreter products of bfloat16 matrices are wrong.
        self.half_dot = value.dtype not in (torch.float32, torch.float64) and not _INTERPRETED

    @functools.cached_property
    def ranges(self) -> tuple[Tensor, Tensor]:
        """Least and largest value of each channel, (batches, C): see terms.centre_of_values."""
        if not self.centred:
            return self.tensors[2], self.tensors[2]
        low, high = torch.aminmax(self.tensors[2], dim=-2)
        return low.expand(*self.batch, self.c).contiguous(), high.expand(*self.batch, self.c).contiguous()

    @property
    def single_strides(self) -> tuple[int, ...]:
        """The strides that kernels for D = C = 1 take."""
        query_b, key_b, value_b, w_b, weight_b = self.batch_strides
        return query_b, self.query_m, key_b, self.key_n, value_b, self.value_n, w_b, weight_b, self.weight_n

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides that kernels for any D and C take."""
        query_b, key_b, value_b, w_b, weight_b = self.batch_strides
        queries, keys = (query_b, self.query_m, self.query_d), (key_b, self.key_n, self.key_d)
        return *queries, *keys, value_b, self.value_n, self.value_c, w_b, self.w_d, weight_b, self.weight_n

    def empty(self, wanted: bool, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised result, of shape (0,) if it is not wanted."""
        return torch.empty(shape if wanted else (0,), dtype=dtype or self.dtype, device=self.device)

    def parts(self, programs: int, length: int, step: int) -> tuple[int, int]:
        """(parts, length of one, a multiple of step) to cut a loop over `length` into, to keep the device busy."""
        most = min(2 * processors(self.device) // max(programs, 1), length // LEAST_PART, 256)
        if most <= 1:
            return 1, length
        size = triton.cdiv(triton.cdiv(length, most), step) * step
        return triton.cdiv(length, size), size


def _offsets(batch: tuple[int, ...], tensors, inner, device) -> tuple[Tensor | None, list[int]]:
    """One stride a tensor where one can describe the batch; otherwise a table (5, batches) of offsets."""
    dims: list[tuple[int, list[int]]] = []  # from the last: size, and the stride of each tensor
    for dim in range(1, len(batch) + 1):
        size = batch[-dim]
        if size == 1:
            continue
        strides = []
        for tensor, own in zip(tensors, inner, strict=True):
            place = own + dim
            strides.append(tensor.stride(-place) if tensor.ndim >= place and tensor.shape[-place] != 1 else 0)
        if dims and all(s == t * dims[-1][0] for s, t in zip(strides, dims[-1][1], strict=True)):
            dims[-1] = dims[-1][0] * size, dims[-1][1]
        else:
            dims.append((size, strides))
    if not dims:
        return None, [0] * 5
    if len(dims) == 1:
        return None, dims[0][1]
    table = torch.zeros((5, 1), dtype=torch.int64, device=device)
    for size, strides in reversed(dims):
        steps = torch.arange(size, dtype=torch.int64, device=device)
        columns = [(steps * stride if stride else torch.zeros_like(steps)) for stride in strides]
        table = (table[:, :, None] + torch.stack(columns)[:, None, :]).reshape(5, -1)
    return table, [0] * 5


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; the interpreter pretends to a few, so that small tests cut loops too."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_2(size: int, least: int, most: int) -> int:
    """The smallest power of 2 that holds `size`, within bounds that are powers of 2 themselves."""
    return min(max(triton.next_power_of_2(size), least), most)


def single_blocks(m: int, n: int, sums: int) -> Blocks:
    """Of the single kernels for m owned rows, n to walk over and `sums` registers of sums a pair.

    A thread has 32 pairs of two sums or half as many of more, of which a warp shares each row: with 16 rows and 2
    columns a thread, loads and the loop cost half an instruction a pair.
    """
    pairs = 32 if sums <= 2 else 16 if sums <= 6 else 8  # of a thread
    rows = power_of_2(m, 1, 2 * pairs)
    columns = power_of_2(n, 32, max(64, min(1024, 32 * pairs // rows)))
    return Blocks(rows, columns, max(min(rows * columns // (32 * pairs), 4), 1))


def tiled_blocks(m: int, n: int, block_c: int, wide: bool, half_dot: bool, both: bool = False) -> Blocks:
    """Of tiles of m owned rows against n to walk over, with block_c channels; `wide`: float64.

    One channel is summed across the columns: few long rows, so that a thread has several columns of each. Products on
    tensor cores take 64 x 32. Those on the ordinary units hold rows and columns of their operands in registers, so the
    depth (the columns, or the channels) is short; in float64, and where a kernel has two products (`both`), there are
    half as many rows.
    """
    if block_c == 1:
        rows = power_of_2(m, 1, 16)
        columns = power_of_2(n, 32, 32 if wide else 256)
        return Blocks(rows, columns, max(min(rows * columns // (128 if wide else 1024), 4), 1))
    rows = power_of_2(m, 16, (64 if half_dot else 32) // (2 if both or wide else 1))
    columns = power_of_2(n, 16, 32 if half_dot else 16)
    return Blocks(rows, columns, 4)


def channel_block(channels: int, half_dot: bool) -> int:
    """Channels of one program: 1, or the columns of a matrix product."""
    return 1 if channels == 1 else power_of_2(channels, 16, 64 if half_dot else 32)


def feature_block(features: int, wide: bool) -> int:
    """Features whose gradients one program keeps."""
    return power_of_2(features, 1, 8 if wide else 16)
