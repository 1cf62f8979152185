"""The C++ extension `nwfast._C`: importing it registers the CPU kernels of `csrc/cpu` with the dispatcher."""

from .extension import load

_extension, why_not = load("_C")


def instruction_set() -> str:
    """The instruction set of the kernels on this processor: "AVX-512", "AVX2" or "baseline"."""
    if _extension is None:
        raise RuntimeError(why_not)
    return _extension.instruction_set()
