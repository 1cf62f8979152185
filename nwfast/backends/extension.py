"""Loading of the compiled extensions: importing one registers its kernels with the dispatcher."""

import importlib
from typing import Any


def load(name: str) -> tuple[Any, str]:
    """The extension module `nwfast.<name>` and an empty string, or None and the reason why it cannot be had."""
    try:
        return importlib.import_module(f"nwfast.{name}"), ""
    except ImportError as error:
        return None, f"the C++ extension nwfast.{name} is not built, or does not load ({error})"
