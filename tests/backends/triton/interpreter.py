"""A pytest plugin for Triton's interpreter, which makes it take half the time.

At every call of a function by a kernel the interpreter looks through the whole language for what to replace by its own,
which has been done since the launch began: here it does so once a launch.
"""

from collections.abc import Callable

from triton import language
from triton.runtime import interpreter


class Once:
    """`interpreter._patch_lang`, but for what has been patched since the launch began."""

    def __init__(self, patch: Callable):
        self.patch, self.patched = patch, set()

    def __call__(self, fn: Callable):
        modules = frozenset(id(x) for x in fn.__globals__.values() if x is language or x is language.core)
        if modules in self.patched:
            return None  # of a call by a kernel, which asks for none
        self.patched.add(modules)
        scope = self.patch(fn)
        restore = scope.restore

        def end_of_launch():
            self.patched.clear()
            restore()

        scope.restore = end_of_launch
        return scope


def pytest_configure() -> None:
    """Replace the interpreter's function."""
    interpreter._patch_lang = Once(interpreter._patch_lang)
