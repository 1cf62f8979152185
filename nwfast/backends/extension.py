"""The C++ extensions: importing one registers its kernels with PyTorch's dispatcher.

`nwfast._C` has the native backend's kernels for the CPU (`csrc/cpu`), `nwfast._C_cuda` those of the CUDA backend
(`csrc/cuda`). Both are imported here, once.
"""

import importlib
from typing import Any


def _load(name: str) -> tuple[Any, str]:
    """The extension module `nwfast.<name>` and an empty string, or None and the reason why it cannot be had."""
    try:
        return importlib.import_module(f"nwfast.{name}"), ""
    except ImportError as error:
        return None, f"the C++ extension nwfast.{name} is not built, or does not load ({error})"


_native, NATIVE_WHY_NOT = _load("_C")
_cuda, CUDA_WHY_NOT = _load("_C_cuda")


def instruction_set() -> str:
    """The instruction set of the native kernels on this processor: "AVX-512", "AVX2" or "baseline"."""
    if _native is None:
        raise RuntimeError(NATIVE_WHY_NOT)
    return _native.instruction_set()
