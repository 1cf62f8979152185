"""Tests of what only a GPU can show. Without one they are skipped; with one, they make their tensors on it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import nwfast

HERE = Path(__file__).resolve().parent
BACKENDS = "cuda", "triton"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this directory where torch finds no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    """Make tensors on the GPU, whatever the tests beside this directory run on."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> str:
    """Each backend that has kernels for the GPU; one that should work and does not fails the test."""
    name = request.param
    chosen = request.config.getoption("--backend").split(",")
    if set(chosen) & set(BACKENDS) and name not in chosen:
        pytest.skip(f"--backend {','.join(chosen)} leaves {name} out")
    answer = nwfast.backends.available()[name]
    if answer is not True:
        pytest.fail(f"backend {name!r} should work here: {answer}")
    return name


# Shapes of query, key, value, w and key_weight (None: a number for w, no weights), and exclude_self: every kernel.
FORMS = {
    "1-D": ((300,), (400,), (400,), (1,), None, False),
    "1-D, weights": ((300,), (400,), (400,), (), (400,), False),
    "leave-one-out": ((400,), (400,), (400,), (1,), None, True),
    "few queries": ((3,), (20000,), (20000,), (1,), None, False),
    "per-query keys": ((50,), (50, 49), (50, 49), (1,), None, False),
    "features": ((300, 3), (400, 3), (400, 1), (3,), (400,), False),
    "channels": ((300, 3), (400, 3), (400, 64), (3,), None, False),
    "crossed batch": ((2, 1, 70, 2), (1, 3, 90, 2), (2, 3, 90, 4), (3, 2), (1, 3, 90), False),
    "number w": ((300,), (400,), (400, 2), None, None, False),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """The name of each of FORMS in turn."""
    return request.param


@pytest.fixture
def problem() -> Callable:
    """A function of (form, dtype) that makes query, key, value, w, key_weight on the GPU, and exclude_self."""

    def make(form: str, dtype: torch.dtype = torch.float32) -> tuple[list, bool]:
        *shapes, exclude_self = FORMS[form]
        draw = torch.Generator("cpu").manual_seed(3)
        tensors = []
        for place, shape in enumerate(shapes):
            if shape is None:
                tensors.append(6.0 if place == 3 else None)
                continue
            drawn = torch.rand(shape, generator=draw, dtype=torch.float64, device="cpu")
            if place >= 3:
                drawn = 6 * (0.7 + 0.6 * drawn) if place == 3 else drawn + 0.1
            tensors.append(drawn.to("cuda", dtype))
        return tensors, exclude_self

    return make


@pytest.fixture
def call(kernels: str) -> Callable:
    """The op on the backend under test, as a function of (tensors, exclude_self)."""

    def run(tensors: list, exclude_self: bool = False, backend: str = kernels, **options):
        query, key, value, w, key_weight = tensors
        return nwfast.nadaraya_watson(
            query, key, value, w, key_weight=key_weight, exclude_self=exclude_self, backend=backend, **options
        )

    return run


@pytest.fixture
def differentiate(call: Callable) -> Callable:
    """out and the gradients of all tensors, as a function of (tensors, exclude_self)."""

    def run(tensors: list, exclude_self: bool = False, **options) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in tensors]
        out = call(leaves, exclude_self, **options)
        required = [x for x in leaves if isinstance(x, torch.Tensor)]
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), required)]

    return run
