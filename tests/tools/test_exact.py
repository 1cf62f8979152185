"""The oracle in long double: right by the textbook, and its bounds neither refuse rounding nor let errors through."""

import numpy as np
import pytest
import torch
from exact import UNIT, assert_accurate, solve
from op.test_functional import FORMS, NAMES, make
from oracle import gradients, textbook

SINGLE, DOUBLE = torch.float32, torch.float64


def computed(inputs, grad_out, grad_lse, exclude_self, dtype):
    """All results by name, of the textbook in a dtype."""
    cast = [x if x is None else x.to(dtype) for x in inputs]
    out, lse = textbook(*cast, exclude_self)
    found = gradients(inputs, grad_out, grad_lse, exclude_self, dtype)
    by_name = {name: x for name, x in zip(NAMES, found, strict=True) if x is not None}
    return {"out": out, "lse": lse, **by_name}


def problem(form, seed=0):
    """Float32 inputs and cotangents of a form."""
    torch.manual_seed(seed)
    *shapes, exclude_self = FORMS[form]
    inputs = make(shapes, SINGLE)
    out, lse = textbook(*inputs, exclude_self)
    return inputs, torch.randn(out.shape), torch.randn(lse.shape), exclude_self


@pytest.mark.parametrize("form", FORMS)
def test_the_textbook_agrees(form):
    """In float64 to the rounding of float64, by the bounds of float64."""
    inputs, grad_out, grad_lse, exclude_self = problem(form)
    inputs = [x if x is None else x.double() for x in inputs]
    right = solve(*inputs, grad_out, grad_lse, exclude_self)
    for name, found in computed(inputs, grad_out.double(), grad_lse.double(), exclude_self, DOUBLE).items():
        assert_accurate(found, right[name], name)


@pytest.mark.parametrize("form", FORMS)
def test_no_draw_decides(form):
    """The textbook in float32 is within the bounds for every draw: they hold what rounding must cost."""
    for seed in range(5):
        inputs, grad_out, grad_lse, exclude_self = problem(form, seed)
        right = solve(*inputs, grad_out, grad_lse, exclude_self)
        for name, found in computed(inputs, grad_out, grad_lse, exclude_self, SINGLE).items():
            assert_accurate(found, right[name], f"{name}, seed {seed}")


def wrong(right, of_largest=0.0):
    """What is right, in float32, but for the last entry."""
    found = torch.from_numpy(right.value.astype(np.float64)).float()
    last = found.reshape(-1)[-1:]
    last += of_largest * found.abs().max()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_small_errors_are_caught(form):
    """Errors of one entry by a thousandth of the largest, and of out by some hundred units of its values' last place.

    The gradient of w is one sum over all pairs, whose terms cancel: a few percent there.
    """
    inputs, grad_out, grad_lse, exclude_self = problem(form)
    right = solve(*inputs, grad_out, grad_lse, exclude_self)
    for name, result in right.items():
        assert_accurate(wrong(result), result, name)
        with pytest.raises(AssertionError, match=f"{name}: "):
            assert_accurate(wrong(result, of_largest=0.03 if name == "w" else 1e-3), result, name)
    unit = UNIT[SINGLE] * float(inputs[2].abs().max() / right["out"].value.max())
    with pytest.raises(AssertionError, match="out: "):
        assert_accurate(wrong(right["out"], of_largest=300 * unit), right["out"], "out")


@pytest.mark.parametrize(
    "fault", ["a key left out", "own key kept", "weights ignored", "the wrong bandwidth"]
)
def test_faults_are_caught(fault):
    inputs, grad_out, grad_lse, exclude_self = problem("1-D, leave-one-out, channels, weights")
    right = solve(*inputs, grad_out, grad_lse, exclude_self)
    query, key, value, w, key_weight = inputs
    if fault == "a key left out":
        key_weight = torch.cat([key_weight[:-1], key_weight[-1:] * 1e-9])
    elif fault == "own key kept":
        exclude_self = False
    elif fault == "weights ignored":
        key_weight = torch.ones_like(key_weight)
    else:
        w = w * 1.001
    found = computed([query, key, value, w, key_weight], grad_out, grad_lse, exclude_self, DOUBLE)
    for name, result in found.items():
        with pytest.raises(AssertionError, match=f"{name}: "):
            assert_accurate(result.float(), right[name], name)


def test_far_rows_and_ties():
    """No distance costs digits of what is right; and exact ties share."""
    query, key = torch.tensor([1e8, -3e7, 1.5]), torch.tensor([-0.5, 1.0, 2.0])
    value = torch.tensor([1.0, 2.0, 4.0])
    right = solve(query, key, value, 1.0, None, torch.ones(3))
    assert right["out"].value[0] == 4
    assert right["out"].value[1] == 1
    np.testing.assert_allclose(right["out"].value[2], (2 + 4 + np.exp(-15 / 8)) / (2 + np.exp(-15 / 8)))
    np.testing.assert_allclose(float(right["lse"].value[0]), -0.5 * (1e8 - 2) ** 2)
    assert (right["out"].bound < 1e-4).all()


def test_left_out_keys_hold_anything():
    query, grad_out = torch.tensor([0.5, 0.7]), torch.ones(2)
    right = solve(
        query, torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([1.0, torch.inf, 3.0]), 1.0,
        torch.tensor([1.0, 0.0, 1.0]), grad_out,
    )  # fmt: skip
    kept = solve(query, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]), 1.0, torch.ones(2), grad_out)
    np.testing.assert_array_equal(right["out"].value, kept["out"].value)
    assert right["key"].value[1] == right["key_weight"].value[1] == 0
    np.testing.assert_array_equal(right["key"].value[[0, 2]], kept["key"].value)


def test_tiles_have_the_textbooks_distances():
    """Its float64 is within the bounds of several features at all distances where its weights are numbers."""
    generator = torch.Generator().manual_seed(2)
    for apart in (10.0, 20.0, 26.0):  # times the root of 2, and 37 bandwidths give the smallest number
        query = apart + torch.rand(200, 2, generator=generator, dtype=torch.float64)
        key = 1e-2 * torch.rand(5, 2, generator=generator, dtype=torch.float64)
        inputs = [
            query,
            key,
            torch.rand(5, generator=generator, dtype=torch.float64),
            torch.tensor(1.0),
            None,
        ]
        inputs[3] = inputs[3].double()
        grad_out, grad_lse = torch.ones(200, dtype=torch.float64), torch.ones(200, dtype=torch.float64)
        right = solve(*inputs, grad_out, grad_lse)
        for name, found in computed(inputs, grad_out, grad_lse, False, DOUBLE).items():
            assert_accurate(found, right[name], name)


def test_nothing_is_promised_of_which_key_is_nearest_where_long_double_ends():
    """The second key is nearer by 0.24, at a distance of 1e38."""
    query = torch.tensor([[-1.5e38, 0.0]], dtype=torch.float64)
    key = torch.tensor([[0.24, 0.0], [-3e38, 0.88]], dtype=torch.float64)
    value, grad = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for weight in (None, torch.tensor([1.0, 0.17], dtype=torch.float64)):
        right = solve(query, key, value, 3e3, weight, grad)
        for found in (0.0, 1.0):
            assert_accurate(torch.tensor([found], dtype=torch.float64), right["out"], "out")
        for found in ([0.0, 1.0], [1.0, 0.0]):
            assert_accurate(torch.tensor(found, dtype=torch.float64), right["value"], "value")
    # Nor of gradients of keys that might share with another one what all is taken for.
    query = torch.full((1, 4), 5.000000100204387e19)
    key = torch.tensor([[1.0, 0.625, 0.375, 0.375], [0.625, 1e20, 0.625, 0.75], [0.5, 0.625, 0.25, 1.0]])
    right = solve(query, key, torch.tensor([1.0, 1.0, 0.0]), 1.0, None, torch.ones(1))
    shared = torch.tensor([0.25, 0.0, -0.25])[:, None] * query
    assert_accurate(shared, right["key"], "key")
    # Relative to each of the outer keys, the other seems to be the nearer one.
    query = torch.tensor([[1.0, 1.0, 5e99]], dtype=torch.float64)
    key = torch.tensor([[0.0, 0.7, 1e100], [0.0, 0.72, 0.0], [0.0, 0.0, 0.29]], dtype=torch.float64)
    value = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    right = solve(query, key, value, 200.0, None, grad)
    for found in (0.0, 1.0):
        assert_accurate(torch.tensor([found], dtype=torch.float64), right["out"], "out")
