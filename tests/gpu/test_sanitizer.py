"""The kernels under NVIDIA's compute-sanitizer: accesses out of bounds, reads of what nobody wrote, races."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def sanitizer() -> str | None:
    """The program, on PATH or in the CUDA toolkit."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{toolkit}/bin")


def watch(tool: str, kernels: str) -> subprocess.CompletedProcess:
    program = sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in CUDA_HOME")
    # Tensors side by side in a block of torch's allocator would hide an access beyond one of them.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), environment.get("PYTHONPATH", "")])
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable]
    return subprocess.run(
        [*command, str(HERE / "sanitized_calls.py"), kernels],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_small_calls(tool, kernels):
    if tool == "racecheck" and kernels == "triton":
        pytest.skip(
            "barriers in shared memory are the compiler's there, and racecheck does not know its idioms"
        )
    done = watch(tool, kernels)
    report = done.stdout[-4000:] + done.stderr[-2000:]
    if "Device not supported" in report:
        pytest.skip("compute-sanitizer does not support this device here")
    assert done.returncode == 0, report
    assert "done" in done.stdout, report
