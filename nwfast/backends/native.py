"""The C++ extension `nwfast._C`: importing it registers the CPU kernels of `csrc/cpu` with the dispatcher."""

why_not = ""
try:
    from nwfast import _C  # noqa: F401
except ImportError as error:
    why_not = f"the C++ extension nwfast._C is not built, or does not load ({error})"
