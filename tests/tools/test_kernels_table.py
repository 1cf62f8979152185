"""The table of the GPU kernels' resources: what it shows, and that it fails where a kernel takes too much."""

from dataclasses import dataclass

import kernels
import pytest
from kernels import Source


@dataclass(frozen=True)
class Row:
    kernel: str = "forward"
    target: str = "sm_90"
    registers: int = 96
    shared_bytes: int = 16384
    spill_bytes: int = 0
    register_budget: int = 128


MISSING = Source(list, "no nvcc is found")


def of(*rows):
    return Source(lambda: rows)


def test_rows_within_budget(capsys):
    rows = [Row(), Row("keys, D = 3", "sm_100", 128, 0, 0, 128)]
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
        (Row(registers=129), "128  OVER BUDGET"),
        (Row(spill_bytes=4), "128  SPILLS"),
        (Row(registers=255, spill_bytes=8), "128  OVER BUDGET, SPILLS"),
    ],
)
def test_a_row_that_takes_too_much_fails(capsys, bad, complaint):
    assert kernels.report({"Triton": of(Row(), bad), "CUDA": of(Row())}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(complaint) for line in lines].count(True) == 1
    assert lines[-1] == "1 of 3 kernels take more than they may"


def test_a_missing_compiler_leaves_its_kernels_out(capsys):
    assert kernels.report({"CUDA": MISSING, "Triton": of(Row())}) == 0
    out = capsys.readouterr().out
    assert "CUDA: left out, no nvcc is found" in out
    assert "Triton: 1 kernels" in out
    assert kernels.report({"CUDA": MISSING, "Triton": of(Row(spill_bytes=1))}) == 1


def test_nothing_at_all_is_no_success(capsys):
    assert kernels.report({"CUDA": MISSING}) == 1
    assert "no kernel could be compiled here" in capsys.readouterr().out


def test_kernels_that_do_not_compile_are_an_error():
    def broken():
        raise RuntimeError("rows.cu does not compile for sm_90")
        yield

    with pytest.raises(RuntimeError, match="does not compile"):
        kernels.report({"CUDA": Source(broken), "Triton": of(Row())})
