"""The GPU that something was measured on: its name, clocks and power, and the ceiling that its clock sets."""

import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field

import torch

from benchmarks.measure import machine

# Results of ex2 that a multiprocessor delivers per clock: CUDA C++ Programming Guide, table "Throughput of Native
# Arithmetic Instructions", the same from compute capability 8.0 to 10.0.
EXPONENTIALS_PER_CLOCK = 16
SLOWED = "sw_power_cap", "hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown"


@dataclass
class Clocks:
    """Clocks and power of the device while it works, in MHz and watts, from NVML or nvidia-smi, whichever is there."""

    device: torch.device
    maximum: float | None = None
    busy: list[float] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        answer = self._ask("clocks.max.sm")
        self.maximum = answer[0] if answer else None

    def look(self) -> None:
        """Note the clock and the power of this moment; for when the device is at work."""
        if self.device.type != "cuda":
            return
        try:  # microseconds; to start nvidia-smi takes longer than what is timed
            answer = [torch.cuda.clock_rate(self.device), torch.cuda.power_draw(self.device) / 1000]
        except (
            Exception
        ):  # no NVML for Python, or none that answers: several kinds of error, all mean the same
            answer = self._ask("clocks.sm", "power.draw")
        if answer:
            self.busy.append(float(answer[0]))
            self.watts += answer[1:]

    def _ask(self, *names: str) -> list[float]:
        return [float(text) for text in ask(self.device, *names) if text.replace(".", "", 1).isdigit()]

    def ceiling(self) -> tuple[float | None, float | None]:
        """Exponentials per second at the clock seen at work (its median) and at the highest clock there is."""
        if self.device.type != "cuda":
            return None, None
        per_clock = (
            EXPONENTIALS_PER_CLOCK * torch.cuda.get_device_properties(self.device).multi_processor_count
        )
        seen = sorted(self.busy)[len(self.busy) // 2] if self.busy else None
        return tuple(None if mhz is None else per_clock * mhz * 1e6 for mhz in (seen, self.maximum))

    def as_dict(self) -> dict:
        seen, highest = self.ceiling()
        return {
            "sm_mhz_at_work": sorted(self.busy),
            "sm_mhz_maximum": self.maximum,
            "watts_at_work": sorted(self.watts),
            "exponentials_per_second_at_work": seen,
            "exponentials_per_second_maximum": highest,
            "reasons_for_a_lower_clock": ask(
                self.device, *[f"clocks_event_reasons.{name}" for name in SLOWED]
            ),
        }


def ask(device: torch.device, *names: str) -> list[str]:
    """What `nvidia-smi --query-gpu` answers; empty where there is none."""
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return []
    # By its identity where it can be had: CUDA_VISIBLE_DEVICES may number the devices otherwise.
    identity = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    for known_as in [f"GPU-{identity}"] * (identity is not None) + [str(device.index or 0)]:
        command = [
            "nvidia-smi",
            f"--id={known_as}",
            f"--query-gpu={','.join(names)}",
            "--format=csv,noheader,nounits",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return []
        if done.returncode == 0:
            return [part.strip() for part in done.stdout.split(",")]
    return []


def fingerprint(device: torch.device) -> dict:
    """Device, driver and versions."""
    found = {
        "device": machine.processor(),
        "cores": os.cpu_count(),
        "processor": machine.processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: machine._version(name) for name in ("triton", "numba", "nwfast")},
        },
        "extension_is_current": machine.extension_is_current(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = ask(device, "driver_version")
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": driver[0] if driver else "unknown",
        }
    return found


def commit() -> dict:
    """The commit of the checkout; where there is no .git, that of the environment variable NWFAST_COMMIT."""
    found = machine.commit()
    if found["commit"] == "unknown":
        found["commit"] = os.environ.get("NWFAST_COMMIT") or "unknown"
    return found


def missing(package: str) -> str:
    """Empty if the package is installed, else a reason."""
    return "" if importlib.util.find_spec(package) else f"the package {package} is not installed"
