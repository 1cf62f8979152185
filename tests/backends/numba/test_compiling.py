"""A user hears that Numba compiles, where that takes long, and nothing otherwise."""

import gc
import io
import time
from types import SimpleNamespace

import fresh
import pytest

from nwfast.backends import compiling


def event(is_start: bool, module: str | None = "nwfast.backends.numba.dense.call") -> SimpleNamespace:
    function = SimpleNamespace(__module__=module)
    return SimpleNamespace(is_start=is_start, data={"dispatcher": SimpleNamespace(py_func=function)})


def wait_for(out: io.StringIO, lines: int) -> list[str]:
    deadline = time.monotonic() + 60
    while out.getvalue().count("\n") < lines and time.monotonic() < deadline:
        time.sleep(0.01)
    return out.getvalue().splitlines()


@pytest.fixture
def out(monkeypatch) -> io.StringIO:
    monkeypatch.delenv("NWFAST_QUIET", raising=False)
    return io.StringIO()


def test_long_compilations_say_so_and_go_on_saying_it(out):
    watch = compiling.Watch(out, patience=0.01, between=0.01)
    watch.notify(event(True))
    watch.notify(event(True))  # one within the other
    watch.notify(event(False))
    lines = wait_for(out, 2)
    watch.notify(event(False))
    assert lines[0].startswith(
        "nwfast: Numba is compiling kernels for the first time; it keeps them on disk (0 s"
    )
    assert lines[1].startswith("nwfast: Numba is compiling (0 s")
    said = out.getvalue()
    time.sleep(0.1)
    assert out.getvalue().count("\n") <= said.count("\n") + 1  # what was on its way
    watch._say()
    assert watch._depth == 0


def test_short_ones_add_up(out):
    watch = compiling.Watch(out, patience=0.05, between=60)
    for _ in range(20):
        watch.notify(event(True))
        time.sleep(0.01)
        watch.notify(event(False))
    watch.notify(event(True))
    assert len(wait_for(out, 1)) == 1
    watch.notify(event(False))


def test_silence(out, monkeypatch):
    patient = compiling.Watch(out, patience=60)
    patient.notify(event(True))
    patient.notify(event(False))
    other = compiling.Watch(out, patience=0)
    other.notify(event(True, module="someone.else"))
    other.notify(event(True, module=None))
    assert other._timer is None
    monkeypatch.setenv("NWFAST_QUIET", "1")
    quiet = compiling.Watch(out, patience=0)
    quiet.notify(event(True))
    quiet._timer.join()
    quiet.notify(event(False))
    assert out.getvalue() == ""


def test_numba_tells_the_watch_what_it_compiles_and_loading_compiles_nothing():
    code = """
import sys
from numba import njit
from nwfast import backends
from nwfast.backends import compiling
seen = []
compiling.Watch.notify = lambda self, event: seen.append(event.data["dispatcher"].py_func.__module__)
backends.load("numba")
backends.load("numba_fgt")
def double(x):
    return 2 * x
double.__module__ = "nwfast.of_a_test"
njit(double)(1.0)
assert seen == ["nwfast.of_a_test"] * 2, seen  # one beginning, one end
"""
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_an_entry_point_compiles(enabled):
    pytest.importorskip("numba")
    from numba.extending import intrinsic

    from nwfast.backends.numba import base

    seen = []

    @intrinsic
    def looked_at(typingctx, x):
        seen.append(gc.isenabled())
        return x(x), lambda context, builder, signature, args: args[0]

    @base.entry
    def of_a_test(x):
        return looked_at(x)

    try:
        gc.enable() if enabled else gc.disable()
        assert of_a_test(3.0) == 3.0
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert seen and not any(seen)
