"""The two textbook lines: as they stand, in chunks of queries, and under torch.compile."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.problems.workloads import (
    Call,
    Data,
    TextbookModule,
    others,
    per_query_lines,
    small,
    two_lines,
)

from .own import differentiate, minimise, rule_of_thumb
from .peer import Peer, no_compiler

CHUNK = 256  # queries: their scores stay in the caches


def chunked_lines(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
    """The two lines on a few queries at a time: what one writes once the matrix does not fit."""
    return torch.cat([two_lines(part, key, value, w) for part in query.split(CHUNK)])


@functools.cache
def _compiled(lines: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 64  # one for each shape that is timed
    return torch.compile(lines, fullgraph=True, dynamic=False)


def _forward(function: Callable[..., Tensor], given: Data) -> Call:
    def call() -> tuple[Tensor]:
        with torch.no_grad():
            return (function(*given.inputs),)

    return call


def _compiled_forward(given: Data) -> Call:
    return _forward(_compiled(two_lines), given)


def _compiled_gradients(given: Data, wanted: str) -> Call:
    return differentiate(_compiled(two_lines), given, wanted)


def small_call(kind: str, chapter: tuple[Tensor, ...]) -> Call:
    """A call of the chapter's own size."""
    return small(kind, per_query_lines, TextbookModule, chapter)


def _compiled_small(kind: str, chapter: tuple[Tensor, ...]) -> Call:
    def module(w: float) -> TextbookModule:
        net = TextbookModule(w)
        net.compile(fullgraph=True, dynamic=False)
        return net

    return small(kind, _compiled(per_query_lines), module, chapter)


def _select(x: Tensor, y: Tensor) -> Call:
    def call() -> tuple[float]:
        keys, values = others(x, y)
        return minimise(lambda w: ((per_query_lines(x, keys, values, w) - y) ** 2).mean(), rule_of_thumb(x))

    return call


PEERS = (
    Peer(
        name="textbook",
        about="the two lines of the chapter, as they stand; for bandwidths its (n, n - 1) keys and scipy's L-BFGS-B",
        package="torch",
        forward=functools.partial(_forward, two_lines),
        gradients=functools.partial(differentiate, two_lines),
        small=small_call,
        select=_select,
        minimised_by="scipy",
        bytes_per_pair=24,
        seconds_per_pair=2e-8,
    ),
    Peer(
        name="chunked textbook",
        about=f"the two lines on {CHUNK} queries at a time",
        package="torch",
        forward=functools.partial(_forward, chunked_lines),
        gradients=functools.partial(differentiate, chunked_lines),
        seconds_per_pair=5e-9,
    ),
    Peer(
        name="torch.compile",
        about="the two lines, compiled with `fullgraph=True, dynamic=False`",
        why_not=no_compiler,
        compiles=True,
        package="torch",
        forward=_compiled_forward,
        gradients=_compiled_gradients,
        small=_compiled_small,
        seconds_per_pair=2e-9,
    ),
)
