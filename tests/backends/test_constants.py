"""The numbers that all kernels share come from one file, are what it says, and weigh equal scores with exactly 1."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import nwfast
from nwfast import constants

ROOT = Path(__file__).resolve().parents[2]


def test_the_header_is_written_from_the_numbers():
    written = runpy.run_path(str(ROOT / "csrc" / "common" / "write_constants.py"))["header"]()
    assert (ROOT / "csrc" / "common" / "constants.h").read_text() == written, (
        "run python csrc/common/write_constants.py"
    )


@pytest.mark.parametrize("name", sorted(constants.EXP2_ERRORS))
def test_polynomials(name):
    """The error is the one that is stated: not larger, and no number is a digit off that would make it smaller."""
    coefficients = getattr(constants, name)
    low, high = (0, 1) if "FLOOR" in name else (-0.5, 0.5)
    f = np.linspace(low, high, 20001, dtype=np.longdouble)
    p = np.zeros_like(f)
    for coefficient in reversed(coefficients):
        p = p * f + coefficient
    error = float(np.abs(p / np.exp2(f) - 1).max())
    assert 0.5 * constants.EXP2_ERRORS[name] <= error <= constants.EXP2_ERRORS[name]
    assert coefficients[0] == 1
    if name.endswith("FLOAT"):
        assert all(float(np.float32(coefficient)) == coefficient for coefficient in coefficients)


def test_logarithms():
    ln2 = np.log(np.longdouble(2))
    assert float(ln2) == constants.LN2
    assert float(1 / (2 * ln2)) == constants.HALF_LOG2E
    assert float(np.sqrt(1 / (2 * ln2))) == constants.ROOT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("features", [1, 2])
def test_equal_scores_weigh_exactly_one(backend, features, channels, dtype):
    """A key at the query: lse is 0 to the bit; many of them, or w = 0: that of their number."""
    for n in (1, 7, 64):
        x = torch.full((n, features), 0.7, dtype=dtype)
        value = torch.arange(n * channels, dtype=dtype).reshape(n, channels)
        methods = nwfast.backends.METHODS.get(backend, ("dense",)) if features == 1 else ("dense",)
        for method in methods:
            for query, w in ((x[:1], 3.0), (x[:1], 1e4), (x[:1] - 5, 0.0)):
                out, lse = nwfast.nadaraya_watson(
                    query, x, value, w, backend=backend, method=method, return_lse=True
                )
                # A logarithm has its own rounding, but none at 1.
                rounding = 0 if n == 1 else torch.finfo(dtype).eps
                assert abs(lse.item() - math.log(n)) <= 2 * rounding * math.log(n)
                # A mean of small whole numbers: its sum is exact, if every weight is.
                torch.testing.assert_close(
                    out, (value.sum(0) / n)[None], rtol=4 * torch.finfo(dtype).eps, atol=0
                )
