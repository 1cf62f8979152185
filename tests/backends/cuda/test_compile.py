"""The CUDA sources compiled by nvcc to native code, within their register budgets; no GPU is needed.

Optimised code, which has the budgets, takes minutes: `make test` compiles the kernels of one feature and channel so,
for one target, and takes all others as far as unoptimised PTX. The rest is for `make test-full`.
"""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from backends.cuda import resources as cuda_resources

pytestmark = pytest.mark.skipif(
    bool(cuda_resources.why_not()), reason=cuda_resources.why_not() or "nvcc is there"
)


TARGET = "sm_90"
OTHERS = tuple(target for target in cuda_resources.TARGETS if target != TARGET)
SINGLE = sorted((cuda_resources.SOURCES / "dense" / "single").glob("*.cu"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(((TARGET,), SINGLE), id="single"),
        pytest.param(((TARGET,), cuda_resources.sources()), id="all", marks=pytest.mark.full),
        pytest.param((OTHERS, cuda_resources.sources()), id="other targets", marks=pytest.mark.full),
    ],
)
def compiled(request) -> tuple[tuple[str, ...], list[Path]]:
    """Targets and the sources that are compiled for them."""
    return request.param


@pytest.fixture(scope="module")
def resources(compiled) -> list[cuda_resources.Resource]:
    return cuda_resources.rows(*compiled)


def test_no_spills(resources):
    assert [row for row in resources if row.spill_bytes] == []


def test_registers_are_within_budget(resources):
    assert [row for row in resources if row.registers > row.register_budget] == []


def test_every_kernel_is_there(resources, compiled):
    targets, sources = compiled
    assert {row.target for row in resources} == set(targets)
    names = {row.kernel.split("<")[0] for row in resources}
    written = set()
    for source in sources:
        text = source.read_text()
        for part in text.split("__global__ void ")[1:]:
            part = part.split("\n    ", 1)[1] if part.startswith("__launch_bounds__") else part
            written.add(part.split("(", 1)[0].strip())
    if shutil.which("c++filt"):
        assert names == written


@pytest.mark.parametrize(
    "source",
    [pytest.param(path, marks=[pytest.mark.full] * (path in SINGLE)) for path in cuda_resources.sources()],
    ids=lambda path: "/".join(path.parts[-2:]),
)
def test_it_compiles_without_optimisation(source, tmp_path):
    nvcc = cuda_resources._nvcc()
    options = ["-std=c++17", "-G", f"-arch={TARGET}", "-ptx", "-o", str(tmp_path / "kernels.ptx")]
    process = subprocess.run([nvcc, *options, str(source)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_a_spill_is_found(tmp_path):
    """A kernel that holds more than its registers can, through the same report."""
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) spilling(volatile float* x) {\n"
        "  float held[96];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) held[i] = x[i * 1024 + threadIdx.x];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = held[95 - i];\n"
        "}\n"
    )
    (row,) = cuda_resources.compile_kernels(source, ("sm_90",))
    assert row.spill_bytes > 0


@pytest.mark.full
def test_the_operators_compile_against_this_torch(tmp_path):
    """The stable ABI needs no CUDA build of torch: only its headers. test_emulated.py compiles them with the CPU's
    compiler.
    """
    include = Path(torch.__file__).parent / "include"
    nvcc = cuda_resources._nvcc()
    options = ["-std=c++17", "-arch=sm_90", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    options += ["-DPy_LIMITED_API=0x030a0000", f"-I{include}", f"-I{sysconfig.get_path('include')}"]
    source, target = str(cuda_resources.SOURCES / "register.cu"), str(tmp_path / "register.o")
    process = subprocess.run(
        [nvcc, *options, "-Xcompiler=-fPIC", "-c", source, "-o", target], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
