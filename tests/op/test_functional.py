"""The public functions against the oracle: every form of input, dtype and option, values and gradients."""

import itertools

import pytest
import torch
from conftest import every_other, pairwise
from exact import BOXES, assert_accurate, solve
from oracle import assert_weights_matter, gradients, scores, textbook

import nwfast

NAMES = "query", "key", "value", "w", "key_weight"

# Shapes of query, key, value, w and key_weight (None: w a number, no key weight), and exclude_self.
FORMS = {
    "1-D": ((37,), (41,), (41,), (1,), None, False),
    "1-D, channels": ((37,), (41,), (41, 3), (), None, False),
    "1-D, weights": ((37,), (41,), (41,), (), (41,), False),
    "1-D, leave-one-out": ((41,), (41,), (41,), (1,), None, True),
    "1-D, leave-one-out, channels, weights": ((41,), (41,), (41, 2), (1,), (41,), True),
    "per-query keys": ((37,), (37, 29), (37, 29), (1,), None, False),
    "per-query keys, weights": ((37,), (37, 29), (37, 29), (), (37, 29), False),
    "per-query keys, shared weights": ((37,), (37, 29), (37, 29), (), (29,), False),
    "per-query keys, bandwidths": ((37,), (37, 29), (37, 29), (37, 1), None, False),
    "features": ((37, 3), (41, 3), (41, 4), (3,), None, False),
    "features, no channels": ((37, 3), (41, 3), (41,), (), None, False),
    "features, weights, leave-one-out": ((41, 2), (41, 2), (41, 3), (1,), (41,), True),
    "batch": ((2, 3, 17, 2), (2, 3, 19, 2), (2, 3, 19, 4), (2,), None, False),
    "batch, no channels": ((2, 3, 17, 2), (2, 3, 19, 2), (2, 3, 19), (1,), (2, 3, 19), False),
    "batch, one feature": ((4, 17, 1), (4, 19, 1), (4, 19, 1), (1,), None, False),
    "heads": ((2, 3, 17, 2), (2, 3, 19, 2), (2, 3, 19, 4), (3, 2), None, False),
    "heads, one w each": ((2, 3, 17, 2), (2, 3, 19, 2), (2, 3, 19, 4), (2, 3, 1), (2, 1, 19), False),
    "shared keys": ((5, 17, 2), (1, 19, 2), (1, 19, 3), (1,), (19,), False),
    "shared queries": ((1, 17, 2), (5, 19, 2), (5, 19, 3), (5, 2), (1, 19), False),
    "shared values": ((5, 19, 1), (5, 19, 1), (1, 19, 1), (5, 1), (5, 19), True),
    "crossed": ((2, 1, 17, 1), (1, 3, 19, 1), (2, 3, 19, 2), (3, 1), (1, 3, 19), False),
}


def make(shapes, dtype, w_scale=6.0):
    """Random inputs: keys on (0, 1), queries a little beyond, weights in (0, 1.1)."""
    query, key, value, w, key_weight = shapes
    return [
        (1.2 * torch.rand(query, dtype=torch.float64) - 0.1).to(dtype),
        torch.rand(key, dtype=torch.float64).to(dtype),
        torch.randn(value, dtype=torch.float64).to(dtype),
        (w_scale * (0.7 + 0.6 * torch.rand(w, dtype=torch.float64))).to(dtype),
        None if key_weight is None else (torch.rand(key_weight, dtype=torch.float64) + 0.1).to(dtype),
    ]


def arithmetic(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def call(inputs, backend, **options):
    query, key, value, w, key_weight = inputs
    return nwfast.nadaraya_watson(query, key, value, w, key_weight=key_weight, backend=backend, **options)


def check(inputs, backend, exclude_self=False, with_gradients=True, method="auto"):
    """Values, lse and all gradients (with and without a gradient into lse) against long double."""
    options = dict(exclude_self=exclude_self, method=method)
    dtype = inputs[0].dtype
    boxes = 0.0 if method == "dense" else BOXES
    half_products = backend in ("cuda", "triton") and inputs[2].ndim > 1 and inputs[2].shape[-1] > 1
    out, lse = call(inputs, backend, return_lse=True, **options)
    assert out.dtype == dtype
    assert lse.dtype == arithmetic(dtype)
    grad_out, grad_lse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape).to(lse.dtype)
    for into_lse in (None, grad_lse) if with_gradients else (None,):
        right = solve(*inputs, grad_out, into_lse, exclude_self, boxes=boxes, half_products=half_products)
        if into_lse is None:
            assert_accurate(out, right["out"], "out")
            assert_accurate(lse, right["lse"], "lse")
            assert torch.equal(call(inputs, backend, **options), out)
        if not with_gradients:
            return
        leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
        result = call(leaves, backend, return_lse=into_lse is not None, **options)
        outputs, cotangents = ([result], [grad_out]) if into_lse is None else (result, [grad_out, into_lse])
        torch.autograd.backward(outputs, cotangents)
        for name, leaf in zip(NAMES, leaves, strict=True):
            if leaf is not None:
                assert leaf.grad.dtype == leaf.dtype
                assert_accurate(leaf.grad, right[name], f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms(backend, form, dtype):
    *shapes, exclude_self = FORMS[form]
    inputs = make(shapes, dtype)
    assert_weights_matter(*inputs[:2], *inputs[3:], exclude_self)
    check(inputs, backend, exclude_self)
    features = inputs[0].shape[-1] if inputs[0].ndim > 1 else 1
    if features <= nwfast.backends.FGT_FEATURES.get(backend, 0):
        check(inputs, backend, exclude_self, method="fgt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["1-D, weights", "per-query keys", "heads", "1-D, leave-one-out"])
def test_half_precision_is_storage(backend, form, dtype):
    *shapes, exclude_self = FORMS[form]
    check(make(shapes, dtype), backend, exclude_self)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_w_beside_half_data(backend, dtype):
    query, key, value, _, _ = make(((30,), (40,), (40,), (), None), dtype)
    w = torch.tensor(6.1234567, requires_grad=True)
    out = nwfast.nadaraya_watson(query, key, value, w, backend=backend)
    assert out.dtype == dtype
    right = solve(query, key, value, w, None, torch.ones(30))
    assert_accurate(out, right["out"], "out")
    out.sum().backward()
    assert w.grad.dtype == torch.float32
    assert_accurate(w.grad, right["w"], "gradient of w")


@pytest.mark.parametrize("form", ["1-D", "per-query keys", "features", "shared queries"])
def test_number_w(backend, form):
    query, key, value, _, _ = make(FORMS[form][:5], torch.float64)
    for w in (3, -3.0):
        out = nwfast.nadaraya_watson(query, key, value, w, backend=backend)
        torch.testing.assert_close(out, textbook(query, key, value, 3.0)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_small_size(backend, dtype):
    """Vector tails: all N from 1 to 70, with M going the other way."""
    for n in range(1, 71):
        inputs = make(((71 - n,), (n,), (n,), (), (n,) if n % 2 else None), dtype)
        check(inputs, backend, with_gradients=n % 5 == 0)
        if n > 1 and n % 3 == 0:
            check(make(((n,), (n,), (n, 2), (), None), dtype), backend, exclude_self=True)


@every_other("features, channels", (1, 2, 3, 5, 16), (1, 2, 3, 8, 16, 17, 64))
def test_features_and_channels(backend, features, channels):
    for dtype in (torch.float32, torch.float64):
        shapes = (33, features), (45, features), (45, channels), (features,), None
        inputs = make(shapes, dtype, w_scale=6.0 / features**0.5)
        assert_weights_matter(*inputs[:2], inputs[3])
        check(inputs, backend)


@pairwise("w, order, dtype", (0.3, 30.0, 3000.0), ("sorted", "unsorted"), (torch.float32, torch.float64))
def test_thousands(backend, w, order, dtype):
    query, key, value, _, _ = make(((70,), (2300,), (2300,), (), None), dtype)
    if order == "sorted":
        query, key = query.sort().values, key.sort().values
    w = torch.tensor(w, dtype=dtype)
    if w == 30:
        assert_weights_matter(query, key, w)
    check([query, key, value, w, None], backend, method="dense")


def test_thousands_of_features_and_channels(backend):
    inputs = make(((270, 3), (600, 3), (600, 5), (3,), (600,)), torch.float32)
    assert_weights_matter(*inputs[:2], *inputs[3:])
    check(inputs, backend)


@pytest.mark.parametrize("options", [{}, {"key_weight": True}, {"exclude_self": True}])
def test_strides(backend, options):
    """Transposed, stepped, reversed by flip, expanded and zero-stride inputs give what their copies give."""
    wide = torch.rand(6, 80, 5, dtype=torch.float64)
    query = wide[:, ::2, 1:3]
    key = torch.rand(6, 2, 40, dtype=torch.float64).mT
    value = torch.rand(1, 40, 1, dtype=torch.float64).expand(6, 40, 3)
    key_weight = torch.rand(40, 6, dtype=torch.float64).mT if "key_weight" in options else None
    w = torch.tensor(4.0, dtype=torch.float64).expand(2)
    exclude_self = "exclude_self" in options
    views = [query, key, value, w, key_weight]
    assert not any(x.is_contiguous() for x in views if x is not None)
    copies = [x if x is None else x.contiguous() for x in views]
    assert torch.equal(
        call(views, backend, exclude_self=exclude_self), call(copies, backend, exclude_self=exclude_self)
    )
    check(views, backend, exclude_self)
    x = torch.rand(81, dtype=torch.float64)
    check([x[::2], x.flip(0)[1::2][:40], x[:1].expand(40), w[:1], None], backend)


@pytest.mark.parametrize("which", range(5))
def test_only_what_requires_a_gradient_gets_one(backend, which):
    for form in ("1-D, weights", "1-D, leave-one-out, channels, weights", "heads, one w each"):
        *shapes, exclude_self = FORMS[form]
        inputs = make(shapes, torch.float64)
        inputs[which].requires_grad_()
        grad = torch.randn_like(call(inputs, backend, exclude_self=exclude_self).detach())
        call(inputs, backend, exclude_self=exclude_self).backward(grad)
        right = gradients(inputs, grad, None, exclude_self)[which]
        assert [x.grad is not None for x in inputs] == [place == which for place in range(5)]
        torch.testing.assert_close(inputs[which].grad, right, rtol=1e-10, atol=1e-12)


def test_gradient_into_lse_alone(backend):
    inputs = make(FORMS["1-D, weights"][:5], torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    lse = call(leaves, backend, return_lse=True)[1]
    grad = torch.randn_like(lse)
    lse.backward(grad)
    right = gradients(inputs, torch.zeros_like(lse), grad)
    assert leaves[2].grad is None or not leaves[2].grad.any()
    for place in (0, 1, 3, 4):
        torch.testing.assert_close(leaves[place].grad, right[place], rtol=1e-10, atol=1e-12)


def test_exclude_self_is_the_chapters_construction(backend):
    x, y = torch.rand(50).sort().values * 5, torch.randn(50)
    mask = (1 - torch.eye(50)).bool()
    keys, values = x.repeat(50, 1)[mask].reshape(50, -1), y.repeat(50, 1)[mask].reshape(50, -1)
    assert_weights_matter(x, keys, 2.0)
    rows = nwfast.nadaraya_watson(x, keys, values, 2.0, backend=backend)
    torch.testing.assert_close(
        nwfast.nadaraya_watson(x, x, y, 2.0, exclude_self=True, backend=backend), rows, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merging_disjoint_keys_by_lse(backend, dtype):
    query, key, value, w, key_weight = make(((50,), (90,), (90, 2), (), (90,)), dtype)
    parts = [
        call([query, key[part], value[part], w, key_weight[part]], backend, return_lse=True)
        for part in (slice(0, 31), slice(31, 90))
    ]
    lses = torch.stack([lse for _, lse in parts])
    share = torch.softmax(lses, 0)
    merged = sum(p[:, None] * out for p, (out, _) in zip(share, parts, strict=True))
    whole, lse = call([query, key, value, w, key_weight], backend, return_lse=True)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(merged, whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lses.logsumexp(0), lse, rtol=tolerance, atol=tolerance)


def test_no_queries_and_empty_batch(backend):
    for shapes in (
        ((0,), (7,), (7,), (1,), None),
        ((0,), (7,), (7, 2), (), (7,)),
        ((0,), (0, 7), (0, 7), (1,), None),
        ((2, 0, 3), (2, 7, 3), (2, 7, 4), (3,), (2, 7)),
        ((0, 5, 3), (0, 7, 3), (0, 7, 4), (1,), None),
        ((0, 5, 3), (1, 7, 3), (1, 7, 4), (1,), (1, 7)),
    ):
        leaves = [x if x is None else x.requires_grad_() for x in make(shapes, torch.float32)]
        out, lse = call(leaves, backend, return_lse=True)
        expected, expected_lse = textbook(*leaves)
        assert out.shape == expected.shape
        assert lse.shape == expected_lse.shape
        for result in (out.sum(), out.sum() + lse.sum(), call(leaves, backend).sum()):
            for leaf in leaves:
                if leaf is not None:
                    leaf.grad = None
            result.backward(retain_graph=True)
            assert all(x is None or (x.grad.shape == x.shape and not x.grad.any()) for x in leaves)


def test_attention_weights_are_the_softmax():
    for form in FORMS:
        *shapes, exclude_self = FORMS[form]
        query, key, value, w, key_weight = make(shapes, torch.float64)
        weights = nwfast.attention_weights(query, key, w, key_weight=key_weight, exclude_self=exclude_self)
        out = nwfast.nadaraya_watson(
            query, key, value, w, key_weight=key_weight, exclude_self=exclude_self, backend="reference"
        )
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))
        if query.ndim == key.ndim and value.ndim == max(key.ndim, 2):
            torch.testing.assert_close(weights @ value, out)
        if not exclude_self:
            expected = torch.softmax(scores(query, key, w, key_weight), -1)
            torch.testing.assert_close(weights, expected.reshape(weights.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_for_any_number_of_threads(backend, dtype):
    if backend == "reference":
        pytest.skip("plain PyTorch, whose products of matrices promise no order of additions")
    threads = torch.get_num_threads()
    cases = [
        (((1500,), (1300,), (1300,), (1,), None), False),
        (((1100,), (1100,), (1100, 2), (1,), (1100,)), True),
        (((300, 3), (700, 3), (700, 5), (3,), None), False),
        (((60,), (60, 59), (60, 59), (1,), None), False),
        (((2, 3, 200, 1), (1, 3, 210, 1), (2, 1, 210, 1), (3, 1), (1, 3, 210)), False),
    ]
    try:
        for shapes, exclude_self in cases:
            inputs = make(shapes, dtype)
            runs = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
                out, lse = call(leaves, backend, exclude_self=exclude_self, return_lse=True)
                alone = call(leaves, backend, exclude_self=exclude_self)
                found = torch.autograd.grad(
                    [out.sin().sum() + lse.sum()], [x for x in leaves if x is not None], retain_graph=True
                )
                again = torch.autograd.grad([alone.sin().sum()], [x for x in leaves if x is not None])
                runs.append([out, lse, alone, *found, *again])
            for run, place in itertools.product(runs[1:], range(len(runs[0]))):
                assert torch.equal(run[place], runs[0][place]), f"{shapes}: result {place}"
    finally:
        torch.set_num_threads(threads)


def test_unwritten_memory_is_not_read(backend, poisoned_memory):
    for form in FORMS:
        *shapes, exclude_self = FORMS[form]
        leaves = [x if x is None else x.requires_grad_() for x in make(shapes, torch.float32)]
        out, lse = call(leaves, backend, exclude_self=exclude_self, return_lse=True)
        (out.sum() + lse.sum() + call(leaves, backend, exclude_self=exclude_self).sum()).backward()
        assert all(x is None or x.grad.isfinite().all() for x in leaves)
        assert out.isfinite().all()
        assert lse.isfinite().all()
