"""Fixtures that all tests share."""

import functools
import gc
import importlib.util
import itertools
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import nwfast

gc.disable()  # until all tests are collected: what imports and that make stays

# Run in processes of their own.
collect_ignore = ["backends/cuda/emulation/plugin.py", "backends/cuda/emulation/small_case.py", "fuzz"]

ROOT = Path(__file__).resolve().parent.parent
# Files that take longest, in this order: of two workers one begins with Numba's kernels, which all later tests find on
# disk, and the other with what compilers do outside of Python.
FIRST = (
    "backends/numba/test_dense.py",
    "backends/native/test_sanitizers.py",
    "backends/cuda/test_emulated.py",
    "backends/triton/test_triton.py",
    "backends/numba/test_linear.py",
    "tools/test_types.py",
    "op/test_compile.py",
    "backends/native/test_grid.py",
    "estimators/test_bandwidth.py",
    "estimators/test_sklearn.py",
    "op/test_ops.py",
    "backends/cuda/test_compile.py",
    "op/test_functional.py",
    "tools/test_demo.py",
    "docs/test_site.py",
    "benchmarks/test_dense_forward.py",
    "backends/native/test_linear.py",
    "backends/native/test_products.py",
)

if importlib.util.find_spec(
    "hypothesis"
):  # a machine with a GPU may go without: what needs it is left out there
    from hypothesis import settings

    # Timings are noisy, hence no deadline. In CI the examples are the same at every run.
    settings.register_profile("nwfast", deadline=None, derandomize="CI" in os.environ, print_blob=True)
    settings.load_profile("nwfast")


# Budgets must hold whatever is drawn: NWFAST_TEST_SEED=1 (2, ...) gives every test other data.
SEED = int(os.environ.get("NWFAST_TEST_SEED", "0"))


@pytest.fixture(scope="module", autouse=True)
def without_what_came_before() -> None:
    """Collections of garbage pass over what other files have left, compilers and their caches: most of their time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test from the same random state, that of the seed; generators with seeds of their own join in."""
    torch.manual_seed(SEED)
    vary_generators(monkeypatch.setattr)


def vary_generators(put: Callable = setattr) -> None:
    """Let generators with seeds of their own draw what the seed says; for processes that tests start, too."""
    if SEED:
        put(np.random, "default_rng", functools.partial(_seeded, np.random.default_rng))
        put(torch, "Generator", _Generator)


def _seeded(default_rng: Callable, seed: int | None = None) -> np.random.Generator:
    return default_rng(seed if seed is None else [SEED, seed])


class _Generator(torch.Generator):
    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed(seed + 1000 * SEED)


def every_other(names: str, *axes: Sequence) -> pytest.MarkDecorator:
    """All combinations of the axes as parameters, every other one as on a chequered board: the rest is marked full.

    With three axes or more, of two values or more, any two values of two axes still meet.
    """
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(
                *(axis[i] for axis, i in zip(axes, place, strict=True)),
                marks=[pytest.mark.full] * (sum(place) % 2),
            )
            for place in itertools.product(*(range(len(axis)) for axis in axes))
        ],
        ids=str,
    )


def pairwise(names: str, *axes: Sequence) -> pytest.MarkDecorator:
    """As few combinations of the axes as let any two values of two axes meet, as parameters; the rest is marked full.

    Chosen greedily, each to bring together most that have not met, the first of equals.
    """

    def pairs(place: tuple[int, ...]) -> set:
        return set(itertools.combinations(enumerate(place), 2))

    places = list(itertools.product(*(range(len(axis)) for axis in axes)))
    apart, chosen = set().union(*map(pairs, places)), set()
    while apart:
        best = max(places, key=lambda place: len(pairs(place) & apart))
        chosen.add(best)
        apart -= pairs(best)
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(
                *(axis[i] for axis, i in zip(axes, place, strict=True)),
                marks=[] if place in chosen else [pytest.mark.full],
            )
            for place in places
        ],
        ids=str,
    )


@pytest.fixture(scope="session")
def missing_toolchain() -> Callable[[], str]:
    """setup.py's own check: why no extension can be built here, or the empty string."""
    return runpy.run_path(str(ROOT / "setup.py"))["missing_toolchain"]


def build(folder: Path, compile_flags: str, link_flags: str = "") -> Path:
    """A folder that holds the package, its extension compiled with more flags, which takes minutes."""
    process = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-temp", folder / "temp", "--build-lib", folder / "lib"],
        cwd=ROOT,
        env={**os.environ, "NWFAST_EXT": "1", "CXXFLAGS": compile_flags, "LDFLAGS": link_flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    return folder / "lib"


def require(name: str, missing_toolchain: Callable[[], str]) -> str:
    """The backend's name if it works here.

    A backend that should work and does not fails the test. Only the extension may be missing, and only where
    it cannot be built.
    """
    answer = nwfast.backends.available()[name]
    if answer is True:
        return name
    if name == "native" and missing_toolchain():
        pytest.skip(f"{answer}; {missing_toolchain()}")
    pytest.fail(f"backend {name!r} should work here: {answer}")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options to run the tests of the op on other backends than those of the CPU."""
    parser.addoption(
        "--backend", default="native,numba", help="backends that the tests of all backends run on"
    )
    parser.addoption("--device", default="cpu", help="device on which tests make their tensors by default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left with one of them at the end."""

    def place(item: pytest.Item) -> int:
        name = item.path.as_posix()
        return next((i for i, file in enumerate(FIRST) if name.endswith(file)), len(FIRST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Collect garbage from here on."""
    gc.freeze()
    gc.enable()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that takes a backend on every one of them in turn.

    One marked `shared` is of code that all backends share, and long: on all but the first by `make test-full` (on a GPU
    it runs on all).
    """
    if "backend" in metafunc.fixturenames:
        first, *others = metafunc.config.getoption("--backend").split(",")
        shared = metafunc.definition.get_closest_marker("shared")
        marks = [pytest.mark.full] if shared and metafunc.config.getoption("--device") == "cpu" else []
        names = [first, *(pytest.param(name, marks=marks) for name in others)]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, missing_toolchain: Callable[[], str]) -> str:
    """Every backend that the tests run on (those that have kernels for the CPU, unless told), in turn."""
    return require(request.param, missing_toolchain)


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make tensors on the device that the tests run on, with the random numbers that they have on the CPU.

    Devices draw other numbers from the same seed: without this a test that fails on a GPU could not be told from one
    whose data there are unlucky, nor be looked at on a CPU.
    """
    device = request.config.getoption("--device")
    if device == "cpu":  # even then a default device is a mode that functions of torch go through
        yield
        return
    for name in ("rand", "randn", "randint", "randperm"):
        monkeypatch.setattr(torch, name, _drawn_on_the_cpu(getattr(torch, name), torch.device(device)))
    for name in ("rand_like", "randn_like"):
        monkeypatch.setattr(torch, name, _drawn_on_the_cpu(getattr(torch, name)))
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def _drawn_on_the_cpu(function: Callable, default: torch.device | None = None) -> Callable:
    """A function of torch that draws, with its numbers from the CPU; `default` is None for one like another tensor."""

    @functools.wraps(function)
    def draw(*args, device=None, requires_grad=False, **options):
        where = device or default or args[0].device
        return function(*args, device="cpu", **options).to(where).requires_grad_(requires_grad)

    return draw


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that the tests run on."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def native(missing_toolchain: Callable[[], str]) -> str:
    """The C++ backend, for tests of it alone."""
    return require("native", missing_toolchain)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that reading what no kernel wrote shows in the result."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fill_uninitialized_memory is on by default
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
