"""Says on stderr that Numba compiles the kernels, where that takes long: at first calls, before they are on disk."""

import functools
import sys
import threading
import time
from typing import Any, TextIO

from . import messages

# Seconds of compilation before anything is said, and between one line and the next.
_PATIENCE, _BETWEEN = 2.0, 10.0


class Watch:
    """Numba's events of compilation; what it reads from disk is none of these.

    One function is compiled within another, and Numba compiles one at a time: the outermost is timed.
    """

    def __init__(self, out: TextIO | None, patience: float = _PATIENCE, between: float = _BETWEEN):
        self._out, self._between = out, between
        self._left = patience  # until the next line
        self._spent = 0.0
        self._depth = 0
        self._begin = 0.0
        self._timer: threading.Timer | None = None
        self._has_spoken = False

    def notify(self, event: Any) -> None:
        """Take an event, as `numba.core.event.Listener` does."""
        module = getattr(event.data["dispatcher"].py_func, "__module__", None)
        if not (module or "").startswith("nwfast."):
            return
        if event.is_start:
            self._depth += 1
            if self._depth == 1:
                self._begin = time.monotonic()
                self._wait(self._left)
            return
        self._depth -= 1
        if self._depth == 0:
            taken = time.monotonic() - self._begin
            self._spent += taken
            self._left = max(self._left - taken, 0.0)
            if self._timer is not None:
                self._timer.cancel()

    def _wait(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._say)
        self._timer.daemon = True
        self._timer.start()

    def _say(self) -> None:
        if self._depth == 0 or self._out is None or messages.is_quiet():
            return
        so_far = self._spent + time.monotonic() - self._begin
        first = "" if self._has_spoken else " kernels for the first time; it keeps them on disk"
        self._has_spoken = True
        print(f"nwfast: Numba is compiling{first} ({so_far:.0f} s so far)", file=self._out, flush=True)
        self._left = self._between
        self._wait(self._between)


@functools.cache
def watch() -> None:
    """Listen to Numba from now on."""
    from numba.core import event

    found = Watch(sys.stderr)

    class Listener(event.Listener):
        def on_start(self, event):
            found.notify(event)

        def on_end(self, event):
            found.notify(event)

    event.register("numba:compile", Listener())
