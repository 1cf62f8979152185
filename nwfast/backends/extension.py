"""The C++ extensions: importing one registers its kernels with PyTorch's dispatcher.

`nwfast._C` has the native backend's kernels for the CPU (`csrc/cpu`), `nwfast._C_cuda` those of the CUDA backend
(`csrc/cuda`). Both are imported here, once.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from . import built, messages

PACKAGE = Path(__file__).resolve().parents[1]
_AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation"


def _load(name: str) -> tuple[Any, str]:
    """The extension module `nwfast.<name>` and an empty string, or None and the reason why it cannot be had."""
    module = f"nwfast.{name}"
    spec = importlib.util.find_spec(module)
    if module in sys.modules or (spec is not None and _folder(spec) == PACKAGE):
        try:
            return importlib.import_module(module), ""
        except ImportError as error:
            return None, f"the C++ extension {module} does not load ({error})"
    found = built.hidden(PACKAGE, name, [] if spec is None else [_folder(spec)])
    if found is not None:
        return _load_hidden(module, *found)
    reason = built.why_left_out(PACKAGE, name)
    if not reason:
        return None, f"the C++ extension {module} is not built: there is none in {PACKAGE}"
    where = "." if (PACKAGE.parent / "csrc").is_dir() else "nwfast"
    return None, (
        f"the C++ extension {module} was left out when nwfast was built: {reason}. "
        f"Once that is different install nwfast again: {_AGAIN} {where}"
    )


def _folder(spec: ModuleSpec) -> Path:
    return Path(spec.origin or "").resolve().parent


def _load_hidden(module: str, other: Path, spec: Any, is_same: bool) -> tuple[Any, str]:
    """The extension of an installed nwfast that this folder hides, if it is what a build here would give."""
    reason = (
        f"the C++ extension {module} is not built in {PACKAGE}, which hides the nwfast installed in {other}; that has "
        "one, compiled from other sources. Run Python in another folder to get it, or build one here: "
        "python setup.py build_ext --inplace"
    )
    if is_same:
        try:
            sys.modules[module] = loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
            return loaded, ""
        except ImportError as error:
            return None, f"the C++ extension {module} of {other} does not load ({error})"
    if module == "nwfast._C":
        messages.warn(reason)
    return None, reason


_native, NATIVE_WHY_NOT = _load("_C")
_cuda, CUDA_WHY_NOT = _load("_C_cuda")


def instruction_set() -> str:
    """The instruction set of the native kernels on this processor: "AVX-512", "AVX2" or "baseline"."""
    if _native is None:
        raise RuntimeError(NATIVE_WHY_NOT)
    return _native.instruction_set()


def origin() -> Path | None:
    """The package whose extension serves: of an installed nwfast where this folder hides one; None without any."""
    return None if _native is None else Path(_native.__file__).resolve().parent


def is_unwanted() -> bool:
    """Whether the user asked for a build without the extension."""
    return built.why_left_out(PACKAGE, "_C") == "NWFAST_EXT=0"
