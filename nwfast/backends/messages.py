"""What nwfast tells a user unasked, as warnings; `NWFAST_QUIET=1` in the environment silences all of it."""

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

_OWN = (str(Path(__file__).resolve().parents[1]), str(Path(__file__).parents[1]), "<frozen importlib")


def is_quiet() -> bool:
    """Whether the user wants to hear nothing."""
    return os.environ.get("NWFAST_QUIET", "0") not in ("", "0")


def warn(message: str) -> None:
    """Warn, at the line of the caller's own code."""
    if is_quiet():
        return
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"nwfast: {message} (NWFAST_QUIET=1 silences this)", stacklevel=level)


def how_to_install(extra: str) -> str:
    """The command that installs an extra: of a checkout, where this is one, or of the package."""
    in_checkout = (Path(__file__).resolve().parents[2] / "pyproject.toml").exists()
    return (
        f"pip install --no-build-isolation '.[{extra}]'" if in_checkout else f"pip install 'nwfast[{extra}]'"
    )
