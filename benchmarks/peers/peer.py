"""What an adapter offers, and the limits within which it is run."""

import importlib
import importlib.util
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from benchmarks.problems.workloads import TOLERANCE, Call, Data

ROOT = Path(__file__).resolve().parents[2]


def always() -> str:
    """For what needs nothing beyond torch."""
    return ""


@dataclass(frozen=True)
class Peer:
    """One way to compute the regression. Each builder returns the call that is timed; None: the peer cannot do that.

    The arguments of the builders are converted, copied and compiled before the call, so that it holds the work alone.
    The limits keep a benchmark within its time and the machine's memory; they say nothing about correctness.
    """

    name: str
    about: str  # how it is used, for the page that lists the peers
    why_not: Callable[[], str] = always  # empty if it can run here, else the reason
    package: str = ""  # whose version is recorded
    precision: str = "float32"
    tolerance: float = TOLERANCE  # that its results must keep, relative to the largest entry
    several_tolerance: float | None = (
        None  # the same with several features, where it is another; inf: not held to one
    )
    function: Callable[..., Tensor] | None = None  # ours alone: of tensors, differentiable
    forward: Callable[[Data], Call] | None = None  # -> (out,)
    gradients: Callable[[Data, str], Call] | None = None  # wanted, as "w" or "qkvw" -> (out, *gradients)
    small: Callable[[str, tuple[Tensor, ...]], Call] | None = None  # kind, the chapter's tensors
    select: Callable[[Tensor, Tensor], Call] | None = None  # x, y -> (w,)
    minimised_by: str = ""  # the package that `select` needs beside its own
    least_features: int = 1
    most_features: int = 1000
    one_channel: bool = False
    compiles: bool = False  # for seconds, at the first call of each kind
    bytes_per_pair: float = 0.0
    seconds_per_pair: float = 1e-10  # on two cores, in float32 or as `precision` says: rough
    seconds_per_point: float = 0.0  # with one feature

    def takes(self, features: int, channels: int) -> bool:
        """Whether there is a forward pass for so many features and channels."""
        fits = self.least_features <= features <= self.most_features and (
            channels == 1 or not self.one_channel
        )
        return self.forward is not None and fits

    def allowed(self, features: int) -> float:
        """The tolerance with so many features."""
        return self.tolerance if features == 1 else self.several_tolerance or self.tolerance

    def too_much(self, pairs: float, points: float, seconds: float, memory: float) -> str:
        """The reason why a problem is left out: it would take longer than `seconds` or more than `memory` bytes."""
        if self.bytes_per_pair * pairs > memory:
            return f"it would take about {self.bytes_per_pair * pairs / 1e9:.3g} GB"
        needed = self.seconds_per_pair * pairs + self.seconds_per_point * points
        return f"it would take about {needed:.3g} s" if needed > seconds else ""


@cache
def missing(*modules: str) -> str:
    """Why modules cannot be imported; empty if they can."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            return f"the package {name} is not installed"
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever keeps a peer from loading is the reason to report
            return f"the package {name} does not load: {error}"
    return ""


@cache
def no_compiler() -> str:
    """Why what compiles C++ at run time cannot."""
    return runpy.run_path(str(ROOT / "setup.py"))["missing_toolchain"]()
