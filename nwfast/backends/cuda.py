"""The C++ extension `nwfast._C_cuda`: importing it registers the CUDA kernels of `csrc/cuda` with the dispatcher."""

from .extension import load

_extension, why_not = load("_C_cuda")
