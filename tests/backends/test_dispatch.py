"""Which backend serves a device, and where that can be seen; no GPU is needed, nor a tensor on one."""

import pytest
import torch

from nwfast import backends, cli

GPU = torch.device("cuda", 0)


@pytest.fixture
def installed(monkeypatch):
    """A function that says which backends can run; all others say that they are missing."""

    def install(*names):
        monkeypatch.setattr(
            backends, "_why_not", lambda name: "" if name in (*names, "reference") else f"{name} is missing"
        )

    return install


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cuda", "triton", "native", "numba"), "cuda"),
        (("cuda", "native"), "cuda"),
        (("triton", "native", "numba"), "triton"),
        (("native", "numba"), "reference"),
        ((), "reference"),
    ],
)
@pytest.mark.parametrize("method", ["auto", "dense"])
def test_auto_on_a_gpu(installed, names, expected, method):
    """The CUDA extension where it is built, else Triton, else the reference: never a backend of the CPU."""
    installed(*names)
    assert backends.resolve("auto", GPU, method) == expected
    assert backends.resolve("auto", torch.device("cuda", 3), method) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cuda", "triton", "native", "numba"), "native"),
        (("cuda", "triton", "numba"), "numba"),
        (("cuda", "triton"), "reference"),
    ],
)
def test_auto_on_the_cpu(installed, names, expected):
    installed(*names)
    assert backends.resolve("auto", torch.device("cpu")) == expected


def test_a_named_backend_runs_or_says_why_not(installed):
    installed("triton")
    assert backends.resolve("triton", GPU) == "triton"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: cuda is missing"):
        backends.resolve("cuda", GPU)
    installed("cuda", "native")
    assert backends.resolve("cuda", GPU) == "cuda"
    with pytest.raises(ValueError, match="backend='native' serves tensors on cpu, got tensors on cuda:0"):
        backends.resolve("native", GPU)
    with pytest.raises(ValueError, match="backend='cuda' serves tensors on cuda, got tensors on cpu"):
        backends.resolve("cuda", torch.device("cpu"))


@pytest.mark.parametrize("names", [("cuda", "triton"), ("triton",)])
def test_info_says_which_runs_on_the_gpu(installed, monkeypatch, names):
    installed(*names, "numba")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Some GPU")
    lines = dict(line.split("  ", 1) for line in cli.info().splitlines())
    assert lines["used on the GPU"].strip() == names[0]
    assert lines["used on the CPU"].strip() == "numba"
    assert lines["GPU"].strip() == "Some GPU"
    assert lines["backend triton"].strip() == "available"
