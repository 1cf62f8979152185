"""What the processor can do at most: its clock, and how many vector instructions it completes in a second.

Loops in C with nothing but independent instructions in registers, on all cores at once: fused multiply-adds, additions,
and shifts of integers, and all three mixed as the kernels mix them. A kernel that needs n vector instructions for a
vector of pairs can at best reach (mixed instructions per second) / n vectors of pairs per second.
"""

import ctypes
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.measure import machine
from benchmarks.peers.peer import no_compiler

_SOURCE = r"""
typedef float V __attribute__((vector_size(BYTES)));
typedef int I __attribute__((vector_size(BYTES)));
#define KEEP(x) __asm__ volatile("" : "+" CONSTRAINT(x))
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9)
#define DECLARE(i) V a##i = {i};
#define FMA(i) a##i = a##i * b + c; KEEP(a##i);
#define ADD(i) a##i = a##i + c; KEEP(a##i);
#define SHIFT(i) a##i = (V)((I)a##i << 1); KEEP(a##i);
#define END(i) KEEP(a##i);
#define LOOP(name, body) \
  void name(long n) { V b = {0}, c = {0}; KEEP(b); KEEP(c); EACH(DECLARE) \
    for (long k = 0; k < n; ++k) { body } EACH(END) }
LOOP(fma, EACH(FMA))
LOOP(add, EACH(ADD))
LOOP(shift, EACH(SHIFT))
// six multiply-adds, three additions, one integer shift: about what the dense kernels do
LOOP(mixed, FMA(0) ADD(1) FMA(2) FMA(3) ADD(4) FMA(5) SHIFT(6) FMA(7) ADD(8) FMA(9))
void clock_cycles(long n) {
  unsigned long x = 1;
  for (long k = 0; k < n; ++k) {
    __asm__ volatile("add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n"
                     "add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n" : "+r"(x));
  }
}
"""
LANES = {"AVX-512": 16, "AVX2": 8, "baseline": 4}
_FLAGS = {"AVX-512": ["-mavx512f", "-mfma", "-mavx2"], "AVX2": ["-mavx2", "-mfma"], "baseline": []}
_PER_ITERATION = 10
_ITERATIONS = 4_000_000


def measure(rounds: int = 7) -> dict:
    """Clock of one core, and instructions per second of all; or {"absent": why not}."""
    kind = machine.instruction_set()
    if kind not in LANES:
        return {"absent": f"no loops for {kind}"}
    if no_compiler():
        return {"absent": no_compiler()}
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return {"absent": "there is no C compiler (cc)"}
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "ceiling.c", Path(folder) / "ceiling.so"
        source.write_text(_SOURCE)
        lanes = LANES[kind]
        definitions = [f"-DBYTES={4 * lanes}", '-DCONSTRAINT="v"' if lanes == 16 else '-DCONSTRAINT="x"']
        command = [
            compiler,
            "-O2",
            "-shared",
            "-fPIC",
            *_FLAGS[kind],
            *definitions,
            str(source),
            "-o",
            str(library),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return {"absent": f"the loops do not compile: {done.stderr.strip()[:200]}"}
        loaded = ctypes.CDLL(str(library))
    cores = machine.cores()
    rates = {name: _rate(getattr(loaded, name), cores, rounds) for name in ("fma", "add", "shift", "mixed")}
    return {
        "instruction_set": kind,
        "lanes_float32": lanes,
        "cores": cores,
        "clock_GHz": _rate(loaded.clock_cycles, 1, rounds) / 1e9,
        "clock_GHz_all_cores": _rate(loaded.clock_cycles, cores, rounds) / cores / 1e9,
        "instructions_per_second": rates,
    }


def _rate(loop: "ctypes._CFuncPtr", threads: int, rounds: int) -> float:
    """Instructions per second of `threads` threads together: ctypes lets go of Python's lock."""
    loop.argtypes, loop.restype = [ctypes.c_long], None
    found = []
    for _ in range(rounds):
        workers = [threading.Thread(target=loop, args=(_ITERATIONS,)) for _ in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        found.append(threads * _ITERATIONS * _PER_ITERATION / (time.perf_counter() - start))
    return statistics.median(found)
