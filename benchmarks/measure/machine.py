"""Where and on what code something was measured: stored with every result."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import torch

import nwfast

ROOT = Path(__file__).resolve().parents[2]


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint(packages: Iterable[str] = ()) -> dict:
    """Device, processor, cores, threads, instruction set, memory, operating system and versions, also of `packages`."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "memory_GB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": _version("numba"),
            "nwfast": nwfast.__version__,
            "numpy": _version("numpy"),
            **{name: _version(name) for name in sorted(set(packages) - {"torch", "numba"})},
        },
        "extension_is_current": extension_is_current(),
    }


def name(place: dict) -> str:
    """A file name of the device or the processor, its cores and its instruction set."""
    device = f"{place['processor']} {place['cores']} cores {place['instruction_set']}"
    return re.sub(
        r"[^a-z0-9]+", "-", (device if place["device"] == "cpu" else place["device"]).lower()
    ).strip("-")


def processor() -> str:
    """The name the processor gives itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """What the C++ kernels use, or torch where there are none."""
    from nwfast.backends import extension

    if extension.NATIVE_WHY_NOT:
        return torch.backends.cpu.get_cpu_capability()
    return extension.instruction_set()


def extension_is_current() -> bool:
    """Whether the extension is younger than every C++ source; otherwise what is timed is not what is checked out."""
    extensions = [path.stat().st_mtime for path in (ROOT / "nwfast").glob("_C.*")]
    sources = [path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    return bool(extensions) and min(extensions) >= max(sources, default=0.0)


def commit() -> dict:
    """The commit of the checkout, and whether the package or its C++ sources differ from it."""
    revision = _git("rev-parse", "HEAD")
    return {
        "commit": revision or "unknown",
        "date": _git("log", "-1", "--format=%cI"),
        "dirty": bool(_git("status", "--porcelain", "--", "nwfast", "csrc", "setup.py")),
    }


class Neighbours:
    """How many cores other processes keep busy, from here to `cores`: a comparison means nothing on a busy machine."""

    def __init__(self):
        self.start = self._now()

    def cores(self) -> float | None:
        """The mean number of cores since the start; None where the system does not tell."""
        if self.start is None:
            return None
        busy, own, clock = (now - then for now, then in zip(self._now(), self.start, strict=True))
        return max(0.0, (busy - own) / max(clock, 1e-9))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: of all processors at work, of this process and its children, and of the clock."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(
                int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
            )
        except (OSError, ValueError):
            return None
        own = os.times()
        at_work = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return at_work, sum(own[:4]), time.perf_counter()


def today() -> str:
    """The date in ISO format, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""  # an unpacked archive


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
