"""How Numba compiles the kernels: machine code is of entry points alone, and Numba repeats less of its own work.

Left to itself, Numba assembles every function inside a kernel too, the smallest included, which nothing ever calls.
Here functions inside stay LLVM's intermediate code, optimised as Numba does, to be linked into the entry points.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from numba import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, Flags

_HASH_OF_FLAGS = hash(Flags())


class _Flags(Flags):
    """As Flags, whose hash (of the options' names) and comparison are a tenth of the time of compiling."""

    def __hash__(self) -> int:
        return _HASH_OF_FLAGS

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, Flags) and self._values == other._values) or super().__eq__(other)


class _Typing:
    """Numba's typing context, which keeps what operators give for which types; it would be found anew at each use."""

    _found: ClassVar[dict] = {}

    def __init__(self, context: Any):
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def resolve_function_type(self, function: Any, arguments: tuple, named: dict) -> Any:
        """The signature of a call."""
        if named or not isinstance(function, types.Function):
            return self._context.resolve_function_type(function, arguments, named)
        key = function, arguments
        if key not in self._found:
            self._found[key] = self._context.resolve_function_type(function, arguments, named)
        return self._found[key]


class _Part(JITCodeLibrary):
    """A function that is only ever linked into others: it has neither an address nor an environment of its own."""

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """What Numba takes for a function that Python cannot call."""
        return 0

    @property
    def codegen(self) -> Any:
        """Where Numba puts the environment."""
        return _Nowhere


class _Nowhere:
    @staticmethod
    def set_env(name: str, env: Any) -> None:
        pass


class EntryCompiler(Compiler):
    """Of entry points."""

    def __init__(self, typingctx, targetctx, library, args, return_type, flags, locals):
        super().__init__(_Typing(typingctx), targetctx, library, args, return_type, _Flags(flags), locals)

    def compile_extra(self, func: Callable) -> Any:
        """Compile."""
        with _without_collections():
            return super().compile_extra(func)


class PartCompiler(EntryCompiler):
    """Of the functions inside."""

    def compile_extra(self, func: Callable) -> Any:
        """Compile."""
        self.state.library = _Part(self.state.targetctx.codegen(), func.__qualname__)
        return super().compile_extra(func)


@contextmanager
def _without_collections() -> Iterator[None]:
    """No search for cyclic garbage, which would go through all that the compiler holds, again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
