"""How this package was built: what setup.py left out and why, and which sources an extension was compiled from.

setup.py runs this file, too, where torch may be absent: it needs the standard library alone.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

_RECORD = "_build.json"


def digest(root: Path) -> str:
    """A digest of what the extensions are compiled from, in a folder of nwfast's sources; empty where it is none."""
    paths = [
        path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py")
    ]
    if not paths or not (root / "setup.py").exists():
        return ""
    found = hashlib.sha256()
    for path in sorted([*paths, root / "setup.py"]):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


def write(package: Path, root: Path, left_out: dict[str, str]) -> None:
    """Leave beside the package's modules which sources it is of, and why extensions are left out."""
    text = json.dumps({"sources": digest(root), "left_out": left_out}, indent=1)
    (package / _RECORD).write_text(text + "\n", encoding="utf-8")


def _read(package: Path) -> dict[str, Any]:
    try:
        return json.loads((package / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def why_left_out(package: Path, name: str) -> str:
    """Why the build of this package left the extension out; empty where nothing is known."""
    return _read(package).get("left_out", {}).get(name, "")


def hidden(package: Path, name: str, known: Iterable[Path] = ()) -> tuple[Path, ModuleSpec, bool] | None:
    """The extension of another nwfast, in the folders `known` or further on in sys.path, which this one hides.

    Returns
    -------
    tuple or None
        The other package's folder, how to load its extension, and whether it was compiled from the very sources that
        stand beside this one, as it would be if it were built here.
    """
    for other in dict.fromkeys([*known, *(Path(entry).resolve() / "nwfast" for entry in sys.path)]):
        spec = None if other == package else PathFinder.find_spec(f"nwfast.{name}", [str(other)])
        if spec is not None:
            sources = _read(other).get("sources")
            return other, spec, bool(sources) and sources == digest(package.parent)
    return None
