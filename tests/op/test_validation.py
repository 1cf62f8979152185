"""Bad input: every row of the table in the design, by the message."""

import inspect
import re

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import textbook

import nwfast
from nwfast import attention_weights, backends, nadaraya_watson


def t(*shape, dtype=torch.float32, device=None):
    return torch.rand(shape, device=device).to(dtype)


def rejects(error, message, *arguments, function=nadaraya_watson, **options):
    with pytest.raises(error, match=message):
        function(*arguments, **options)


SHAPES = {
    "query without dimensions": ((), (5,), (5,), r"query must have shape \(M,\) or \(..., M, D\), got query \(\)"),
    "value of another length": ((4,), (5,), (6,), "value must have one row a key, N = 5, got 6 rows"),
    "1-D keys, 3-D value": ((4,), (5,), (5, 1, 1), r"value must have shape \(N,\) or \(N, C\), .* value \(5, 1, 1\)"),
    "1-D query, scalar value": ((4,), (5,), (), r"value must have shape \(N,\) or \(N, C\)"),
    "per-query keys, M differs": ((4,), (3, 5), (3, 5), r"key must have shape .*\(M, N\).* query \(4,\), key \(3, 5\)"),
    "per-query keys, shared value": ((4,), (4, 5), (5,), r"value must have shape \(M, N\) as key"),
    "per-query keys, other value": ((4,), (4, 5), (4, 6), r"value must have shape \(M, N\) as key.* value \(4, 6\)"),
    "1-D query, 3-D key": ((4,), (1, 5, 1), (1, 5, 1), r"key must have shape \(N,\) or \(M, N\) with query \(M,\)"),
    "key of fewer dimensions": ((2, 4, 3), (5, 3), (5, 2), r"key must have shape \(..., N, D\), of as many dimensions"),
    "2-D query, 1-D key": ((4, 1), (5,), (5,), r"key must have shape \(..., N, D\), of as many dimensions as query"),
    "other features": ((4, 3), (5, 2), (5, 1), r"key must have shape .* with D = 3 features as query, .* key \(5, 2\)"),
    "no features": ((4, 0), (5, 0), (5, 1), r"query must have shape .* D >= 1"),
    "value of fewer dimensions": ((2, 4, 3), (2, 5, 3), (5,), r"value must have shape \(..., N, C\) or \(..., N\)"),
    "value, rows differ": ((4, 3), (5, 3), (6, 2), "value must have one row a key, N = 5, got 6 rows"),
    "no channels": ((4, 3), (5, 3), (5, 0), "value must have at least one channel, got C = 0"),
    "batches differ": (
        (2, 4, 3), (3, 5, 3), (2, 5, 1),
        r"leading dimensions must broadcast, dimension 0 has sizes 2 \(query\), 3 \(key\), 2 \(value\)",
    ),
    "second batch dimension": ((1, 2, 4, 3), (7, 1, 5, 3), (1, 3, 5, 1), "dimension 1 has sizes 2 .*, 1 .*, 3 "),
    "empty batch against two": ((0, 4, 3), (2, 5, 3), (1, 5, 1), "dimension 0 has sizes 0 .*, 2 .*, 1 "),
    "no keys": ((4,), (0,), (0,), "key must not be empty, got N = 0"),
    "no keys, features": ((2, 4, 3), (2, 0, 3), (2, 0, 1), "key must not be empty, got N = 0"),
    "no keys, per query": ((4,), (4, 0), (4, 0), "key must not be empty, got N = 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("name", ["auto", "native", "numba", "reference"])
def test_shapes(case, name):
    query, key, value, message = SHAPES[case]
    rejects(ValueError, message, t(*query), t(*key), t(*value), backend=name)


@pytest.mark.parametrize(
    ("w", "query", "message"),
    [
        ((2,), (4,), r"w must be a scalar or have shape .* D = 1 .*, got \(2,\)"),
        ((0,), (4,), r"w must be .* got \(0,\)"),
        ((3, 2), (4,), r"D = 1 .*, got \(3, 2\)"),
        ((2,), (2, 4, 3), r"with D = 3 .* broadcast with \(2,\), got \(2,\)"),
        ((4, 3), (2, 4, 3), r"broadcast with \(2,\), got \(4, 3\)"),
        ((5, 4, 3), (2, 4, 3), r"broadcast with \(2,\), got \(5, 4, 3\)"),
    ],
)
def test_shape_of_w(w, query, message):
    rejects(ValueError, message, t(*query), t(*query), t(*query), t(*w))
    rejects(ValueError, message, t(*query), t(*query), t(*w), function=attention_weights)


@pytest.mark.parametrize(
    ("key_weight", "query", "message"),
    [
        ((), (4,), r"key_weight must have shape \(N,\) or \(..., N\) with N = 4 .*, got \(\)"),
        ((5,), (4,), r"key_weight must .* N = 4 .*, got \(5,\)"),
        ((1,), (4,), r"key_weight must .* N = 4 .*, got \(1,\)"),
        ((3, 4), (2, 4, 3), r"key_weight must .* broadcast with \(2,\), got \(3, 4\)"),
        ((4, 1), (2, 4, 3), r"key_weight must .*, got \(4, 1\)"),
    ],
)
def test_shape_of_key_weight(key_weight, query, message):
    rejects(ValueError, message, t(*query), t(*query), t(*query), key_weight=t(*key_weight))
    rejects(ValueError, message, t(*query), t(*query), key_weight=t(*key_weight), function=attention_weights)


X = torch.rand(4)
TAKE_W = {
    "nadaraya_watson": lambda **options: nadaraya_watson(X, X, X, **options),
    "local_linear": lambda **options: nwfast.local_linear(X, X, X, **options),
    "attention_weights": lambda **options: attention_weights(X, X, **options),
    "leave_one_out_loss": lambda **options: nwfast.leave_one_out_loss(X, X, **options),
    "KeyIndex.__call__": lambda **options: nwfast.KeyIndex(X, X)(X, **options),
    "NWKernelRegression": lambda **options: nwfast.NWKernelRegression(**options),
}


@pytest.mark.parametrize("name", TAKE_W)
def test_a_bandwidth_leads_to_its_inverse(name):
    for word in ("bandwidth", "h", "sigma"):
        message = rf"^{re.escape(name)}\(\) got an unexpected keyword argument '{word}': .* w = 1 / {word}$"
        rejects(TypeError, message, function=TAKE_W[name], **{word: 0.3})
    rejects(TypeError, r"w = \(2 \* gamma\) \*\* 0.5$", function=TAKE_W[name], gamma=0.3)
    rejects(TypeError, r"got an unexpected keyword argument 'kernel'$", function=TAKE_W[name], kernel="box")


def test_signatures_show_what_there_is():
    functions = (
        nadaraya_watson,
        nwfast.local_linear,
        attention_weights,
        nwfast.leave_one_out_loss,
        nwfast.KeyIndex(X, X),
    )
    for function in functions:
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_arrays_and_lists_lead_to_tensors_and_to_the_estimator():
    column = pd.Series([1.0, 2.0])
    for data, way in (
        (np.ones(4), r"torch\.from_numpy\({}\)"),
        ([1.0, 2.0], r"torch\.as_tensor\({}\)"),
        (column, r"torch\.tensor\(numpy\.asarray\({}\)\)"),
    ):
        for function, names in (
            (nadaraya_watson, ("query", "key", "value")),
            (nwfast.local_linear, ("query", "key", "value")),
            (attention_weights, ("query", "key")),
            (nwfast.leave_one_out_loss, ("x", "y")),
            (nwfast.KeyIndex, ("key", "value")),
            (nwfast.NWKernelRegression(), ("query", "key", "value")),
        ):
            for place, name in enumerate(names):
                arguments = [t(4) for _ in names]
                arguments[place] = data
                message = (
                    rf"{name} must be a torch\.Tensor, got {type(data).__name__}: {way.format(name)} makes"
                )
                rejects(
                    TypeError,
                    f"{message} it one; .* nwfast.NadarayaWatsonRegressor",
                    *arguments,
                    function=function,
                )
        rejects(
            TypeError, rf"got {type(data).__name__}: {way.format('w')} makes it one$", t(4), t(4), t(4), data
        )
    torch.testing.assert_close(
        torch.tensor(np.asarray(column)), torch.tensor([1.0, 2.0], dtype=torch.float64)
    )


def test_a_missing_value_spreads_unless_it_is_left_out(backend):
    """As the docstring says."""
    query, key, value = torch.linspace(0, 3, 7), torch.arange(4.0), torch.tensor([1.0, torch.nan, 2.0, 0.5])
    assert nadaraya_watson(query, key, value, backend=backend).isnan().all()
    seen = ~value.isnan()
    found = nadaraya_watson(query, key, value, key_weight=seen, backend=backend)
    torch.testing.assert_close(found, nadaraya_watson(query, key[seen], value[seen], backend=backend))


def test_exclude_self_needs_square():
    message = "exclude_self leaves key i out for query i and needs M == N, got M = 4, N = 5"
    rejects(ValueError, message, t(4), t(5), t(5), exclude_self=True)
    rejects(ValueError, message, t(4), t(5), exclude_self=True, function=attention_weights)
    rejects(ValueError, r"exclude_self needs keys that all queries share.*key \(4, 4\)", t(4), t(4, 4), t(4, 4),
            exclude_self=True)  # fmt: skip


@pytest.mark.parametrize("place", range(3))
def test_tensors_of_wrong_kind(place):
    name = ("query", "key", "value")[place]

    def call(error, message, wrong):
        arguments = [t(4), t(4), t(4)]
        arguments[place] = wrong
        rejects(error, message, *arguments)
        if place < 2:
            rejects(error, message, *arguments[:2], function=attention_weights)

    call(TypeError, f"{name} must be a torch.Tensor, got ndarray", np.ones(4))
    call(TypeError, f"{name} must be a torch.Tensor, got list", [1.0, 2.0])
    call(TypeError, f"{name} must be a torch.Tensor, got NoneType", None)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        expected = rf"{name} must have a floating dtype \(float32, float64, float16, bfloat16\), got {dtype}"
        call(TypeError, expected, torch.ones(4, dtype=dtype))
    call(TypeError, f"{name} must be a dense .* torch.sparse_coo", torch.ones(4).to_sparse())


def test_mixed_dtypes():
    message = "{} must have the dtype of query, torch.float32, got torch.float64"
    wide = t(4, dtype=torch.float64)
    rejects(TypeError, message.format("key"), t(4), wide, t(4))
    rejects(TypeError, message.format("value"), t(4), t(4), wide)
    rejects(TypeError, message.format("w"), t(4), t(4), t(4), wide[:1])
    rejects(TypeError, message.format("key_weight"), t(4), t(4), t(4), key_weight=wide)
    rejects(
        TypeError,
        "key must have the dtype of query, torch.float32, got torch.bfloat16",
        t(4),
        t(4).bfloat16(),
        t(4),
    )
    half = [t(4, dtype=torch.float16)] * 3
    rejects(TypeError, "w must have the dtype of query, torch.float16, got torch.float64", *half, wide[:1])
    rejects(TypeError, "key_weight must have the dtype of query", *half, key_weight=t(4))
    rejects(TypeError, "w must have a floating dtype .* got torch.bool", t(4), t(4), t(4), torch.tensor(True))
    rejects(TypeError, "w must have a floating dtype .*torch.complex64", t(4), t(4), t(4), torch.ones(1) * 1j)
    rejects(TypeError, "w must be a number or a torch.Tensor, got bool", t(4), t(4), t(4), np.array(True))
    rejects(TypeError, "w must be a number or a torch.Tensor, got ndarray", t(4), t(4), t(4), np.ones(1))
    rejects(TypeError, "key_weight must have a floating dtype", t(4), t(4), t(4), key_weight=t(4) * 1j)
    rejects(TypeError, "key_weight must be a torch.Tensor, got float", t(4), t(4), t(4), key_weight=1.0)


def test_mixed_devices():
    message = f"{{}} must be on the device of query, {t(4).device}, got meta"
    away = t(4, device="meta")
    rejects(ValueError, message.format("key"), t(4), away, t(4))
    rejects(ValueError, message.format("value"), t(4), t(4), away)
    rejects(ValueError, message.format("w"), t(4), t(4), t(4), away[:1])
    rejects(ValueError, message.format("w"), t(4), t(4), t(4), away[0])
    rejects(ValueError, message.format("key_weight"), t(4), t(4), t(4), key_weight=away)
    half = [t(4, dtype=torch.float16)] * 3
    rejects(ValueError, message.format("w"), *half, away[0])


def test_w_that_is_no_number():
    three = t(4), t(4), t(4)
    rejects(TypeError, "w must be a number or a torch.Tensor, got str", *three, "1")
    rejects(TypeError, "w must be a number or a torch.Tensor, got NoneType", *three, None)
    rejects(TypeError, "w must be a number or a torch.Tensor, got bool", *three, True)
    rejects(TypeError, "w must be a number or a torch.Tensor, got list", *three, [1.0])
    for w in (float("inf"), float("-inf"), float("nan"), 1e39):
        rejects(ValueError, re.escape(f"w must be finite in torch.float32, got {w}"), *three, w)
    wide = [x.double() for x in three]
    assert nadaraya_watson(*wide, 1e39, backend="reference").isfinite().all()
    for number in (2, np.float32(2), np.float64(2), np.int64(2)):
        assert torch.equal(nadaraya_watson(*three, number), nadaraya_watson(*three, 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["auto", "named", "reference"])
def test_w_that_torch_would_promote(name, dtype, backend):
    """Tensors and arrays without dimensions, and integers, take the dtype of the data."""
    name = backend if name == "named" else name
    query, key, value = t(4, dtype=dtype), t(5, dtype=dtype), t(5, dtype=dtype)
    expected = nadaraya_watson(query, key, value, 2.0, backend=name)
    matrix = attention_weights(query, key, 2.0)
    kinds = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8
    ws = [torch.tensor(2, dtype=kind) for kind in kinds] + [torch.tensor([2])]
    ws += [np.array(2.0), np.array(2), np.array(2, np.float32), np.float16(2), np.uint8(2)]
    for w in ws:
        out = nadaraya_watson(query, key, value, w, backend=name)
        assert out.dtype == dtype
        assert torch.equal(out, expected)
        assert torch.equal(attention_weights(query, key, w), matrix)
    for kind in (torch.float64, torch.float32, torch.float16):
        w = torch.tensor(2.0, dtype=kind, requires_grad=True)
        nadaraya_watson(query, key, value, w, backend=name).sum().backward()
        assert w.grad.dtype == kind
        assert w.grad.shape == ()
        assert w.grad != 0


@pytest.mark.parametrize("name", ["auto", "named", "reference"])
def test_masks_and_counts_as_key_weights(name, backend):
    name = backend if name == "named" else name
    for dtype in (torch.float32, torch.float64):
        query, key, value = t(4, dtype=dtype), t(5, dtype=dtype), t(5, dtype=dtype)
        for weight in (torch.tensor([1, 0, 1, 1, 0]).bool(), torch.tensor([3, 0, 1, 2, 5])):
            for kind in (weight.dtype, torch.int32) if weight.dtype != torch.bool else (torch.bool,):
                found = nadaraya_watson(query, key, value, 2.0, key_weight=weight.to(kind), backend=name)
                expected = nadaraya_watson(query, key, value, 2.0, key_weight=weight.to(dtype), backend=name)
                assert torch.equal(found, expected)
                assert attention_weights(query, key, key_weight=weight.to(kind))[:, 1].eq(0).all()


LEADING = {
    "1-D, grid": ((4,), (5,), (5,), (3, 1), None),
    "1-D, two": ((4,), (5,), (5, 2), (3, 2, 1), (5,)),
    "1-D, one": ((4,), (5,), (5,), (1, 1), None),
    "1-D, samples": ((4,), (5,), (5,), (1,), (3, 5)),
    "1-D, both": ((4,), (5,), (5,), (3, 1, 1), (2, 5)),
    "per-query keys": ((4,), (4, 5), (4, 5), (3, 1, 1), None),
    "per-query keys, samples": ((4,), (4, 5), (4, 5), (1,), (3, 1, 5)),
    "features": ((4, 2), (5, 2), (5, 3), (3, 2), None),
    "features, two": ((4, 2), (5, 2), (5,), (3, 1, 2), (5,)),
    "batch": ((2, 4, 2), (2, 5, 2), (2, 5, 3), (3, 1, 2), None),
    "batch of one": ((1, 4, 2), (1, 5, 2), (1, 5, 3), (3, 2), (3, 5)),
}


@pytest.mark.parametrize("name", ["named", "reference"])
@pytest.mark.parametrize("case", LEADING)
def test_leading_dimensions_of_w_and_key_weight(case, name, backend):
    """A batch of them over one set of queries and keys is as a loop over the batch."""
    name = backend if name == "named" else name
    shapes = LEADING[case]
    query, key, value, w, weight = (
        None if shape is None else (t(*shape, dtype=torch.float64) + 0.5).requires_grad_() for shape in shapes
    )
    leaves = [tensor for tensor in (query, key, value, w, weight) if tensor is not None]
    out, lse = nadaraya_watson(query, key, value, w, key_weight=weight, backend=name, return_lse=True)
    exact, exact_lse = textbook(query, key, value, w, weight)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-12)
    alone = nadaraya_watson(query, key, value, w, key_weight=weight, backend=name)
    torch.testing.assert_close(alone, exact, rtol=1e-12, atol=1e-12)
    weights = attention_weights(query, key, w, key_weight=weight)
    assert weights.shape == (*lse.shape, key.shape[-1] if query.ndim == 1 else key.shape[-2])
    for ours, theirs in (((out, lse), (exact, exact_lse)), ((alone,), (exact,))):
        found, right = (
            torch.autograd.grad(sum(x.sin().sum() for x in y), leaves, retain_graph=True)
            for y in (ours, theirs)
        )
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_unknown_method_or_backend():
    three = t(4), t(4), t(4)
    rejects(ValueError, "method must be 'auto' or one of 'dense', 'fgt', got 'fft'", *three, method="fft")
    expected = "backend must be 'auto' or one of .*'native'.*'numba'.*'reference', got 'gpu'"
    rejects(ValueError, expected, *three, backend="gpu")
    rejects(ValueError, "method must be 'auto' or one of .*, got None", *three, method=None)
    rejects(ValueError, "backend must be 'auto' or one of .*, got None", *three, backend=None)


def test_named_backend_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "_why_not", lambda name: "no such luck" if name != "reference" else "")
    three = t(4), t(4), t(4)
    for name in ("native", "numba"):
        rejects(RuntimeError, f"backend='{name}' cannot run: no such luck", *three, backend=name)
    expected = nadaraya_watson(*three, backend="reference")
    assert torch.equal(nadaraya_watson(*three), expected)  # "auto" alone may choose
    assert backends.available()["native"] == "no such luck"


def test_backend_that_does_not_serve_the_device(backend):
    served = backends._DEVICES[backend]
    for elsewhere in map(torch.device, ("cpu", "cuda:0", "xpu:0")):
        if elsewhere.type not in served:
            message = (
                f"backend='{backend}' serves tensors on {' or '.join(served)}, got tensors on {elsewhere}"
            )
            with pytest.raises(ValueError, match=message):
                backends.resolve(backend, elsewhere)


def test_valid_input_is_viewed_not_copied():
    query, key, value, w = t(4), t(5), t(5), t(1)
    form = nwfast.validation.canonical(query, key, value, w, t(5), False)
    for given, view in zip((query, key, value, w), form, strict=False):
        assert view.data_ptr() == given.data_ptr()
    query, key, value = t(4), t(4, 5).T[:4], t(1, 4).expand(4, 4)
    form = nwfast.validation.canonical(query, key, value, t(4, 1), None, False)
    assert [x.data_ptr() for x in form[:3]] == [x.data_ptr() for x in (query, key, value)]
    assert [tuple(x.shape) for x in form[:4]] == [(4, 1, 1), (4, 4, 1), (4, 4, 1), (4, 1)]
