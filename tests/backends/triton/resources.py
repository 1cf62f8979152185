"""Registers, shared memory and spills of the Triton kernels, compiled without a GPU for what the backend launches.

The backend is called with its kernels replaced by recorders, so block sizes, warps, dtypes and options are those of
real calls. `rows()` compiles what was recorded for each target and reads the sizes off the machine code.
"""

import functools
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_resources import Resource, from_cuobjdump
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nwfast.backends.triton import call as backend

TARGETS = 80, 90, 100
KERNELS = (
    "single_forward",
    "single_merge",
    "single_keys",
    "tiled_forward",
    "tiled_merge",
    "tiled_keys",
    "query_side",
    "describe_rows",
    "tangent_products",
)
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments, and its call's name."""

    case: str
    kernel: Any
    arguments: tuple
    options: tuple  # of pairs


def _inputs(query, key, value, dtype, w=(1,), key_weight=None):
    shapes = query, key, value, w, key_weight
    return [None if shape is None else torch.ones(shape, dtype=dtype) for shape in shapes]


def _cases() -> dict[str, tuple]:
    """Shapes and flags of calls: (inputs, exclude_self, tangents, into_lse)."""
    single, double, half = torch.float32, torch.float64, torch.float16
    n = 65536
    return {
        "": (_inputs((n, 1), (n, 1), (n, 1), single), False, False, True),
        "tangents": (_inputs((n, 1), (n, 1), (n, 1), single), False, True, False),
        "float64, weights": (_inputs((n, 1), (n, 1), (n, 1), double, (1,), (n,)), True, True, True),
        "one query each": (_inputs((n, 1, 1), (n, 50, 1), (n, 50, 1), single), False, True, False),
        "few queries": (_inputs((40, 1), (n, 1), (n, 1), single), False, True, False),
        "D=3 C=64 float16": (_inputs((n, 3), (n, 3), (n, 64), half), False, False, False),
        "D=3 C=64 float16, few": (_inputs((40, 3), (n, 3), (n, 64), half), False, False, False),
        "D=3 C=4": (_inputs((n, 3), (n, 3), (n, 4), single, (3,), (n,)), True, False, False),
        "D=2 C=1 float64": (_inputs((n, 2), (n, 2), (n, 1), double), False, False, True),
        "D=20 C=100 float64": (_inputs((n, 20), (n, 20), (n, 100), double), False, False, False),
        "heads": (_inputs((2, 9, n, 2), (2, 9, n, 2), (2, 9, n, 2), single, (9, 2)), False, False, False),
    }


@functools.cache
def launches() -> tuple[Launch, ...]:
    """Every launch of every case, forward and backward, without duplicates."""
    recorded: list[Launch] = []
    kernels = {name: getattr(backend, name) for name in KERNELS}

    class Recorder:
        def __init__(self, case: str, name: str):
            self.case, self.kernel = case, kernels[name]

        def __getitem__(self, grid):
            return lambda *arguments, **options: recorded.append(
                Launch(self.case, self.kernel, arguments, tuple(options.items()))
            )

    try:
        for case, (inputs, exclude_self, tangents, into_lse) in _cases().items():
            for name in KERNELS:
                setattr(backend, name, Recorder(case, name))
            out, lse, *computed = backend.forward(*inputs, exclude_self, tangents, tangents)
            needs = 15 if inputs[4] is None else 31
            backend.backward(out, lse if into_lse else None, *inputs, out, *computed, exclude_self, needs)
    finally:
        for name, kernel in kernels.items():
            setattr(backend, name, kernel)
    return tuple(recorded)


def _source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """As Triton's own launcher would specialise it: ones are constants, multiples of 16 are known to be."""
    names = launch.kernel.arg_names
    options = dict(launch.options)
    values = dict(zip(names, launch.arguments, strict=False)) | {
        name: options.pop(name) for name in names if name in options
    }
    signature, constants, attributes = {}, {}, {}
    constexprs = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    for place, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in constexprs or value == 1:
            signature[name] = "constexpr"
            constants[(place,)] = value
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), options


def compiled(launch: Launch, target: int) -> Any:
    """The launch's kernel, compiled for the compute capability `target` (90 for sm_90)."""
    source, options = _source(launch)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def budget(threads: int) -> int:
    """Registers that leave room for 8 warps a scheduler's quarter, or for what a thread may have at most."""
    return 255 if threads <= 128 else 128


def measure(launch: Launch, target: int) -> Resource:
    """Compile, and read the sizes from the machine code."""
    kernel = compiled(launch, target)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    name = launch.kernel.__name__ + (f" ({launch.case})" if launch.case else "")
    return from_cuobjdump(
        text,
        f"triton {name}",
        f"sm_{target}",
        kernel.metadata.shared,
        budget(32 * kernel.metadata.num_warps),
    )


def rows(targets: tuple[int, ...] = TARGETS) -> Iterator[Resource]:
    """Every recorded launch on every target."""
    for launch in launches():
        for target in targets:
            yield measure(launch, target)
