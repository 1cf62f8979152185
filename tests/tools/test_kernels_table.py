"""The table of the GPU kernels' resources: what is read, what it shows, that it fails where a kernel takes too much."""

import kernels
import pytest
from gpu_resources import Resource, from_cuobjdump, from_ptxas
from kernels import Source


def row(**sizes) -> Resource:
    usual = {"registers": 96, "shared_bytes": 16384, "spill_bytes": 0, "register_budget": 128}
    return Resource(**{"kernel": "forward", "target": "sm_90", **usual, **sizes})


MISSING = Source(list, "no nvcc is found")


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onev' for 'sm_80'
ptxas info    : Function properties for _Z3onev
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8224 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3twov' for 'sm_90'
ptxas info    : Function properties for _Z3twov
    24 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, 360 bytes cmem[0]
"""
CUOBJDUMP = """Resource usage:
 Common:
  GLOBAL:0
 Function forward:
  REG:104 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_what_ptxas_says():
    budgets = {"one": 128, "two": 168}
    found = list(from_ptxas(PTXAS, lambda symbol: symbol[3:-1], budgets.__getitem__))
    assert found == [
        Resource("one", "sm_80", 40, 8224, 0, 128),
        Resource("two", "sm_90", 255, 0, 28, 168),
    ]


def test_what_cuobjdump_says():
    assert from_cuobjdump(CUOBJDUMP, "forward", "sm_90", 16384, 128) == row(registers=104, spill_bytes=12)


def of(*rows):
    return Source(lambda: rows)


def test_rows_within_budget(capsys):
    rows = [row(), Resource("keys, D = 3", "sm_100", 128, 0, 0, 128)]
    assert kernels.report({"CUDA": of(*rows)}) == 0
    assert capsys.readouterr().out.splitlines() == [
        "CUDA: 2 kernels",
        "kernel       target  registers  shared memory  spills  budget",
        "forward      sm_90          96          16384       0     128",
        "keys, D = 3  sm_100        128              0       0     128",
        "",
    ]


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (row(registers=129), "128  OVER BUDGET"),
        (row(spill_bytes=4), "128  SPILLS"),
        (row(registers=255, spill_bytes=8), "128  OVER BUDGET, SPILLS"),
    ],
)
def test_a_row_that_takes_too_much_fails(capsys, bad, complaint):
    assert kernels.report({"Triton": of(row(), bad), "CUDA": of(row())}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(complaint) for line in lines].count(True) == 1
    assert lines[-1] == "1 of 3 kernels take more than they may"


def test_a_missing_compiler_leaves_its_kernels_out(capsys):
    assert kernels.report({"CUDA": MISSING, "Triton": of(row())}) == 0
    out = capsys.readouterr().out
    assert "CUDA: left out, no nvcc is found" in out
    assert "Triton: 1 kernels" in out
    assert kernels.report({"CUDA": MISSING, "Triton": of(row(spill_bytes=1))}) == 1


def test_nothing_at_all_is_no_success(capsys):
    assert kernels.report({"CUDA": MISSING}) == 1
    assert "no kernel could be compiled here" in capsys.readouterr().out


def test_kernels_that_do_not_compile_are_an_error():
    def broken():
        raise RuntimeError("rows.cu does not compile for sm_90")
        yield

    with pytest.raises(RuntimeError, match="does not compile"):
        kernels.report({"CUDA": Source(broken), "Triton": of(row())})
