"""The C++ extension `nwfast._C`: importing it registers the CPU kernels of `csrc/cpu` with the dispatcher."""

import importlib
from typing import Any

why_not = ""
_extension: Any = None
try:
    _extension = importlib.import_module("nwfast._C")
except ImportError as error:
    why_not = f"the C++ extension nwfast._C is not built, or does not load ({error})"


def instruction_set() -> str:
    """The instruction set of the kernels on this processor: "AVX-512", "AVX2" or "baseline"."""
    if _extension is None:
        raise RuntimeError(why_not)
    return _extension.instruction_set()
