"""The Numba backend against the contract in nwfast.backends: values, gradients, hard numbers, threads, processes.

One file, since nearly all its tests are a few lines over one comparison, `check`: forward and backward against the
reference in float64, whatever is special about the arguments.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import fresh
import pytest
import torch
from torch import Tensor

from nwfast import backends
from nwfast.backends import reference

pytest.importorskip("numba")
numba_backend = backends.load("numba")

ALL = (
    backends.NEEDS_QUERY
    | backends.NEEDS_KEY
    | backends.NEEDS_VALUE
    | backends.NEEDS_W
    | backends.NEEDS_KEY_WEIGHT
)
FLAGS = {
    "query": backends.NEEDS_QUERY,
    "key": backends.NEEDS_KEY,
    "value": backends.NEEDS_VALUE,
    "w": backends.NEEDS_W,
    "key_weight": backends.NEEDS_KEY_WEIGHT,
}


def run_forward(query, key, value, w, key_weight=None, exclude_self=False, tangents=False):
    return numba_backend.forward(query, key, value, w, key_weight, exclude_self, tangents, tangents)


def run_backward(grad_out, grad_lse, inputs, results, exclude_self=False, needs=ALL):
    query, key, value, w, key_weight = inputs
    out, _, state, tangent_w, tangent_q = results
    if key_weight is None:
        needs &= ~backends.NEEDS_KEY_WEIGHT
    gradients = numba_backend.backward(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        w,
        key_weight,
        out,
        state,
        tangent_w,
        tangent_q,
        exclude_self,
        needs,
    )
    return dict(zip(FLAGS, gradients, strict=True))


def oracle(inputs, exclude_self, grad_out, grad_lse):
    """out, lse and all gradients of the reference in float64."""
    inputs = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in inputs]
    out, lse = reference.forward(*inputs, exclude_self)
    loss = (out * grad_out.double()).sum()
    if grad_lse is not None:
        loss = loss + (lse * grad_lse.double()).sum()
    present = [name for name, tensor in zip(FLAGS, inputs, strict=True) if tensor is not None]
    gradients = torch.autograd.grad(loss, [tensor for tensor in inputs if tensor is not None])
    return out.detach(), lse.detach(), dict(zip(present, gradients, strict=True))


def assert_near(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` of the largest entry; a gradient of broadcast input is summed first."""
    tiny = torch.finfo(got.dtype).tiny
    if got.shape != expected.shape:
        got = got.double().sum_to_size(expected.shape)
    assert torch.equal(got.isnan(), expected.isnan()), name
    scale = expected.nan_to_num().abs().max().item() if expected.numel() else 0.0
    error = (got.double() - expected).nan_to_num().abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale + tiny, f"{name}: error {error:.2e}, scale {scale:.2e}"


def check(inputs, exclude_self=False, with_lse=True, tangents=False, tolerance=None, signs=None):
    """Forward and backward against the oracle; returns the results of forward.

    With `signs`, those of the derivatives of out by w, no terms of the gradient of w cancel.
    """
    double = inputs[0].dtype == torch.float64
    tolerance = tolerance or (1e-12 if double else 2e-5)
    results = run_forward(*inputs, exclude_self, tangents)
    grad_out = torch.randn(results[0].shape, dtype=results[0].dtype)
    grad_lse = torch.randn(results[1].shape, dtype=results[1].dtype) if with_lse else None
    if signs is not None:
        grad_out = -signs.reshape(grad_out.shape) * grad_out.abs()
        grad_lse = grad_lse.abs() if with_lse else None
    gradients = run_backward(grad_out, grad_lse, inputs, results, exclude_self)
    out, lse, expected = oracle(inputs, exclude_self, grad_out, grad_lse)
    assert_near("out", results[0], out, tolerance)
    assert_near("lse", results[1], lse, tolerance)
    shift, total = results[2].unbind(-1)
    assert_near("state", math.log(2) * (total.log2() - shift), lse, tolerance)
    for name, gradient in expected.items():
        assert_near(name, gradients[name], gradient, tolerance)
    assert gradients["w"].shape == inputs[3].shape and gradients["w"].dtype == inputs[3].dtype
    return results


def random_inputs(
    features, channels, batches=((), (), (), ()), m=9, n=13, dtype=torch.float64, weighted=False, w=1.3
):
    query_batch, key_batch, value_batch, w_batch = batches
    query = torch.randn(*query_batch, m, features, dtype=dtype)
    key = torch.randn(*key_batch, n, features, dtype=dtype)
    value = torch.randn(*value_batch, n, channels, dtype=dtype)
    rank = len(query_batch)
    key_weight = None
    if weighted:
        key_weight = torch.rand(*[1] * rank, n, dtype=dtype)
        key_weight[..., 3] = 0
    return query, key, value, w * torch.rand(*w_batch, features, dtype=dtype) + 0.2, key_weight


BATCHES = [
    ((), (), (), ()),
    ((3,), (1,), (3,), ()),
    ((2, 1), (1, 3), (2, 3), (2, 1)),
    ((1,), (4,), (1,), (4,)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 17])
@pytest.mark.parametrize("features", [1, 2, 3, 5])
def test_values_and_gradients(features, channels, dtype):
    for batches in BATCHES:
        for weighted, with_lse in ((False, True), (True, False)):
            check(
                random_inputs(features, channels, batches, dtype=dtype, weighted=weighted), with_lse=with_lse
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("features", "channels"), [(1, 1), (1, 3), (3, 1), (2, 5)])
def test_exclude_self(features, channels, dtype):
    for batches in BATCHES[:3]:
        for weighted in (False, True):
            check(
                random_inputs(features, channels, batches, m=11, n=11, dtype=dtype, weighted=weighted), True
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_several_blocks_and_tiles(dtype):
    """More rows than a block and more keys than a tile, neither a multiple of it."""
    for features, w in ((1, 1.0), (1, 30.0), (3, 1.0), (4, 20.0)):
        inputs = random_inputs(features, 1, m=700, n=1100, dtype=dtype, weighted=True, w=w)
        check(inputs, with_lse=False, tangents=features == 1)
    check(random_inputs(1, 1, m=600, n=600, dtype=dtype, w=5.0), True, with_lse=False, tangents=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tangents_give_the_same_gradients(dtype):
    inputs = random_inputs(1, 1, BATCHES[3], dtype=dtype, weighted=True)
    check(inputs, with_lse=False, tangents=True)
    query, key, value, w, key_weight = inputs
    results = run_forward(*inputs, tangents=True)
    for name, tangent in (("w", results[3]), ("query", results[4])):
        assert tangent.shape == results[0].shape
        variable = {"w": w.expand(4, 1), "query": query.expand(4, 9, 1)}[name].double().requires_grad_()
        given = dict(query=query.double(), key=key.double(), value=value.double(), w=w.double())
        given[name] = variable
        out, _ = reference.forward(*given.values(), key_weight.double(), False)
        rows = [torch.autograd.grad(out[:, i].sum(), variable, retain_graph=True)[0] for i in range(9)]
        expected = torch.stack([row if name == "w" else row[:, i] for i, row in enumerate(rows)], dim=1)
        assert_near(name, tangent, expected, 1e-12 if dtype == torch.float64 else 1e-5)


def test_gradients_not_asked_for_are_empty():
    inputs = random_inputs(2, 2, weighted=True)
    results = run_forward(*inputs)
    everything = run_backward(torch.ones_like(results[0]), None, inputs, results)
    for name, flag in FLAGS.items():
        gradients = run_backward(torch.ones_like(results[0]), None, inputs, results, needs=flag)
        assert [key for key, gradient in gradients.items() if gradient.numel()] == [name]
        assert all(gradients[other].shape == (0,) for other in FLAGS if other != name)
        assert torch.equal(gradients[name], everything[name])


def test_per_query_keys():
    query, w = torch.randn(50, 1, 1), torch.tensor([1.5])
    key, value = torch.randn(50, 49, 1), torch.randn(50, 49, 1)
    check((query, key, value, w, None), with_lse=False, tangents=True)


def test_strides():
    """Expanded, transposed and sliced inputs, and a gradient of stride 0."""
    query = torch.randn(1, 2, 9, dtype=torch.float64).mT.expand(4, 9, 2)
    key = torch.randn(4, 26, 6, dtype=torch.float64)[:, ::2, 1::3]
    value = torch.randn(13, 3, 4, dtype=torch.float64).permute(2, 0, 1)
    w = torch.rand(1, dtype=torch.float64).expand(4, 2)
    key_weight = torch.rand(13, 1, dtype=torch.float64).mT.expand(4, 13)
    inputs = (query, key, value, w, key_weight)
    check(inputs)
    results = run_forward(*inputs)
    one = torch.ones((), dtype=torch.float64)
    got = run_backward(one.expand(results[0].shape), one.expand(results[1].shape), inputs, results)
    dense = tuple(tensor.contiguous() for tensor in inputs)
    same = run_backward(torch.ones_like(results[0]), torch.ones_like(results[1]), dense, run_forward(*dense))
    for name in FLAGS:
        assert_near(name, got[name], same[name], 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_storage(dtype):
    inputs = tuple(tensor.to(dtype) for tensor in random_inputs(2, 3, BATCHES[1], weighted=True))
    widened = tuple(tensor.float() for tensor in inputs)
    results, expected = run_forward(*inputs), run_forward(*widened)
    assert results[0].dtype == results[1].dtype == torch.float32 and results[2].dtype == torch.float64
    assert torch.equal(results[0], expected[0])
    gradients = run_backward(torch.ones_like(results[0]), None, inputs, results)
    same = run_backward(torch.ones_like(results[0]), None, widened, expected)
    assert gradients["w"].dtype == dtype and torch.equal(gradients["w"], same["w"].to(dtype))
    assert torch.equal(gradients["key"], same["key"])


def test_half_precision_does_not_materialise_expanded_data():
    key = torch.randn(1, 1, 5, 1, dtype=torch.float16).expand(10**9, 2, 5, 1)
    assert numba_backend._widen(key).untyped_storage().nbytes() == 20


@pytest.mark.parametrize("batches", BATCHES[:2])
def test_no_queries(batches):
    inputs = random_inputs(2, 3, batches, m=0, weighted=True)
    results = run_forward(*inputs)
    assert results[0].shape == (*[3] * len(batches[0]), 0, 3)
    gradients = run_backward(results[0], results[1], inputs, results)
    for name in ("key", "value", "w", "key_weight"):
        assert gradients[name].numel() and torch.equal(gradients[name], torch.zeros_like(gradients[name]))


def test_empty_batch():
    inputs = random_inputs(2, 3, ((0,), (1,), (0,), ()))
    results = run_forward(*inputs)
    assert results[0].shape == (0, 9, 3) and results[1].shape == (0, 9)
    gradients = run_backward(results[0], results[1], inputs, results)
    assert gradients["key"].shape == (0, 13, 2) and torch.equal(gradients["w"], torch.zeros_like(inputs[3]))


# Numbers that break a careless softmax.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("features", [1, 2])
def test_far_queries_get_the_nearest_value(features, dtype):
    key = torch.tensor([0.0, 1.0, 5.0, 3.0], dtype=dtype)[:, None].repeat(1, features)
    value = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=dtype)
    for far, w in ((1e6, 1.0), (1e20, 1e30), (1e4, 1e10), (3e5, 1e-2)):
        query = torch.tensor([-far, far], dtype=dtype)[:, None].repeat(1, features)
        results = run_forward(query, key, value, torch.tensor([w], dtype=dtype))
        torch.testing.assert_close(results[0].flatten(), torch.tensor([1.0, 3.0], dtype=dtype))
        gradients = run_backward(
            torch.ones_like(results[0]),
            None,
            (query, key, value, torch.tensor([w], dtype=dtype), None),
            results,
        )
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        torch.testing.assert_close(gradients["value"].flatten(), torch.tensor([1.0, 0, 1, 0], dtype=dtype))


def test_far_queries_keep_their_digits():
    """At 1e4 bandwidths, where float32 scores differ by less than they round, weights and gradients are right."""
    query, w = torch.tensor([[1e4], [-2e4]]), torch.tensor([1.0])
    key = torch.tensor([[0.0], [5.0], [5.0001], [0.0001]])
    value = torch.tensor([[1.0], [2.0], [4.0], [-1.0]])
    out = check((query, key, value, w, None), with_lse=False, tangents=True)[0]
    assert 2 < out[0] < 4 and -1 < out[1] < 1


def test_narrow_bandwidth_with_gaps():
    key = torch.cat([torch.rand(300, 1), 5 + torch.rand(300, 1)])
    inputs = (torch.rand(500, 1) * 6, key, key.sin(), torch.tensor([3000.0]), None)
    out, _, _ = oracle(inputs, False, torch.ones(500, 1), None)
    torch.testing.assert_close(run_forward(*inputs)[0], out.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiny_w(dtype):
    """w = 0 averages exactly; the tangents of a tiny w do not underflow inside (w d)^2."""
    query, key, value, _, _ = random_inputs(1, 1, dtype=dtype)
    for w in (0.0, 1e-25, 1e-3):
        inputs = (query, key, value, torch.tensor([w], dtype=dtype), None)
        tangent_w, tangent_q = run_forward(*inputs, tangents=True)[3:]
        signs = tangent_w.sign() if w else None
        check(inputs, with_lse=False, tangents=True, signs=signs)
        check(inputs, with_lse=True, tolerance=1e-4, signs=signs)
        if w == 0:
            assert not tangent_w.any() and not tangent_q.any()
        else:
            assert tangent_w.all()
            assert (w < 1e-20 and dtype == torch.float32) or tangent_q.all()
    constant = torch.full_like(value, 1 / 3)
    out = run_forward(query, key, constant, torch.tensor([0.7], dtype=dtype))[0]
    assert torch.equal(out, torch.full_like(out, 1 / 3))


@pytest.mark.parametrize("features", [1, 2])
def test_left_out_and_wildly_weighted_keys(features):
    """Weights over 60 orders of magnitude; the nearest key left out, so that no score may overflow."""
    query = torch.zeros(3, features)
    key = torch.tensor([0.0, 20.0, 30.0, 40.0, 0.5])[:, None].repeat(1, features)
    value = torch.randn(5, 2)
    for weights in (
        [0, 1e-30, 1e30, 1.0, 0],
        [1e-30, 1e30, 1e-5, 0, 1e-35],
        [0, 0, 0, 1e-38, 0],
        [1, 1, 1, 1, 1e-20],
    ):
        for w in (0.1, 1.0, 3.0):
            inputs = (query, key, value, torch.tensor([w]), torch.tensor(weights))
            results = run_forward(*inputs)
            out, lse, _ = oracle(inputs, False, torch.ones(3, 2), None)
            torch.testing.assert_close(results[0], out.float(), rtol=2e-5, atol=1e-6)
            torch.testing.assert_close(results[1], lse.float(), rtol=1e-6, atol=1e-6)
            gradients = run_backward(torch.randn(3, 2), None, inputs, results)
            assert all(gradients[name].isfinite().all() for name in ("query", "key", "value", "w"))


@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_without_keys(features, dtype):
    """out NaN, lse -inf, no gradient, even if the gradient that comes in is NaN."""
    inputs = list(random_inputs(features, 1, ((2,), (2,), (2,), ()), dtype=dtype, weighted=True))
    inputs[4] = torch.ones(2, 13, dtype=dtype)
    inputs[4][0] = 0
    results = run_forward(*inputs, tangents=features == 1)
    assert results[0][0].isnan().all() and (results[1][0] == -math.inf).all()
    assert results[0][1].isfinite().all()
    grad_out = torch.ones_like(results[0])
    grad_out[0] = math.nan
    for grad_lse in (None, grad_out[..., 0]):
        gradients = run_backward(grad_out, grad_lse, inputs, results)
        assert gradients["w"].isfinite().all() and gradients["w"].any()
        for name in ("query", "key", "value", "key_weight"):
            assert not gradients[name][0].any() and gradients[name][1].isfinite().all(), name


def test_single_key_left_out():
    out, lse, *_ = run_forward(
        torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), None, True
    )
    assert out.isnan().all() and lse.item() == -math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("features", "channels"), [(1, 1), (2, 3)])
@pytest.mark.parametrize(
    ("place", "bad"), [*((p, math.nan) for p in range(5)), *((p, math.inf) for p in range(3))]
)
def test_not_finite_as_in_the_reference(place, bad, features, channels, dtype):
    inputs = list(random_inputs(features, channels, dtype=dtype, weighted=True))
    inputs[place] = inputs[place].clone()
    inputs[place][0] = bad
    out, lse, *_ = run_forward(*inputs)
    expected, expected_lse = reference.forward(*inputs, False)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    if place == 0:
        assert out[1:].isfinite().all() and lse[1:].isfinite().all()
    else:
        torch.testing.assert_close(lse, expected_lse, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_negative_weight_is_nan():
    inputs = random_inputs(1, 1, weighted=True)
    inputs[4][2] = -1
    assert run_forward(*inputs)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_of_mixed_magnitude(dtype):
    """An outlier far away must not cost the others their digits, nor leak through a term that should be 0."""
    key = torch.tensor([[0.0], [0.1], [1e6]], dtype=dtype)
    value = torch.tensor([[1.234], [1.236], [1e38]], dtype=dtype)
    out = run_forward(torch.zeros(1, 1, dtype=dtype), key, value, torch.ones(1, dtype=dtype))[0]
    torch.testing.assert_close(out.item(), 1.234 + 0.002 / (1 + math.exp(0.005)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("features", [1, 3])
def test_float32_error_is_that_of_float32(features):
    query, key = torch.rand(200, features) * 5, torch.rand(3000, features) * 5
    value, w = 3 + key.sum(-1, keepdim=True).sin() + 0.3 * torch.randn(3000, 1), torch.tensor([4.0])
    exact, exact_lse = reference.forward(*(tensor.double() for tensor in (query, key, value, w)), None, False)
    scores = -(((query[:, None] - key) * w) ** 2).sum(-1) / 2
    textbook = torch.softmax(scores, 1) @ value
    out, lse, *_ = run_forward(query, key, value, w)
    budget = 2 * (textbook - exact).abs().max() + 2**-23 * exact.abs().max()
    assert (out - exact).abs().max() <= budget
    assert (lse - exact_lse).abs().max() <= 2 * (scores.logsumexp(1) - exact_lse).abs().max() + 2**-22
    assert (out - value.mean()).abs().mean() > 0.01  # the weights are neither uniform


def test_large_offset_costs_nothing():
    """The difference comes before the scale: a translation by a power of two is exact."""
    query, key = torch.randint(0, 64, (40, 1)) / 64, torch.randint(0, 64, (60, 1)) / 64
    value, w = torch.randn(60, 1), torch.tensor([300.0])
    there = run_forward(query + 2.0**17, key + 2.0**17, value, w)[0]
    torch.testing.assert_close(there, run_forward(query, key, value, w)[0], rtol=1e-6, atol=1e-6)


# Threads and processes.


def everything(inputs):
    results = run_forward(*inputs, tangents=False)
    gradients = run_backward(torch.ones_like(results[0]), torch.ones_like(results[1]), inputs, results)
    return (*results[:3], *gradients.values())


def test_bits_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    cases = [
        random_inputs(1, 1, m=1500, n=1100, dtype=torch.float32, weighted=True),
        random_inputs(2, 3, m=900, n=600),
    ]
    try:
        for inputs in cases:
            torch.set_num_threads(1)
            expected = everything(inputs)
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                assert all(map(torch.equal, everything(inputs), expected))
    finally:
        torch.set_num_threads(threads)


def test_concurrent_callers():
    cases = [random_inputs(1, 1, m=600 + 10 * i, n=500, dtype=torch.float32, weighted=True) for i in range(8)]
    expected = [everything(inputs) for inputs in cases]
    with ThreadPoolExecutor(4) as pool:
        for got, alone in zip(pool.map(everything, cases * 3), expected * 3, strict=True):
            assert all(map(torch.equal, got, alone))


def run_script(script: str) -> str:
    done = fresh.run(script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_after_fork():
    """A child has none of its parent's threads: it must not wait for them."""
    script = """
import os, torch
from nwfast import backends
numba = backends.load("numba")
torch.set_num_threads(2)
q, k, v = (torch.rand(1000, 1) for _ in range(3))
call = lambda: numba.forward(q, k, v, torch.ones(1), None, False, False, False)[0]
expected = call()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(call(), expected) else 3)
print(os.waitpid(child, 0)[1], torch.equal(call(), expected))
"""
    assert run_script(script).split() == ["0", "True"]
