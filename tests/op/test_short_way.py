"""Small calls in one feature go to the CPU's kernels as they are: same bits as through the canonical form."""

import pytest
import torch
from conftest import every_other

import nwfast
from nwfast import backends, validation
from nwfast.op import autograd, call, schema

pytestmark = pytest.mark.skipif(
    backends.available()["native"] is not True, reason="the short way is a call to the C++ extension"
)

M, N = 30, 41
FORMS = {
    "shared": ((M,), (N,), (N,), None),
    "weights": ((M,), (N,), (N,), (N,)),
    "channels": ((M,), (N,), (N, 3), (N,)),
    "per query": ((M,), (M, N), (M, N), None),
    "per query, shared weights": ((M,), (M, N), (M, N), (N,)),
    "per query, weights": ((M,), (M, N), (M, N), (M, N)),
}


def make(form, dtype):
    return [None if shape is None else torch.rand(shape, dtype=dtype) for shape in FORMS[form]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_same_bits_as_canonical(form, dtype):
    query, key, value, weight = make(form, dtype)
    w = torch.tensor([7.0], dtype=dtype)
    *inputs, _ = validation.canonical(query, key, value, w, weight, False)
    kernels = schema.KERNELS["native"]
    tangents = value.ndim == key.ndim
    short = kernels.forward(query, key, value, w, weight, False, tangents, tangents)
    canonical = kernels.forward(*inputs, False, tangents, tangents)
    for ours, theirs in zip(short, canonical, strict=True):
        assert torch.equal(ours.flatten(), theirs.flatten())
    needs = 31 if weight is not None else 15
    grad_out = torch.randn_like(short[0])
    for grad_lse in (None, torch.randn_like(short[1])):
        ours = kernels.backward(
            grad_out, grad_lse, query, key, value, w, weight, short[0], *short[2:], False, needs
        )
        grad_rows = None if grad_lse is None else grad_lse.reshape(canonical[1].shape)
        theirs = kernels.backward(
            grad_out.reshape(canonical[0].shape),
            grad_rows,
            *inputs,
            canonical[0],
            *canonical[2:],
            False,
            needs,
        )
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine.flatten(), other.flatten())


@every_other("form, return_lse", list(FORMS), (False, True))
def test_derivatives(form, return_lse):
    """First, batched and second derivatives of calls on the short way, with and without lse."""
    query, key, value, weight = make(form, torch.float64)
    cut = [tensor[tuple(slice(3) for _ in tensor.shape)] for tensor in (query, key, value)]
    weight = None if weight is None else weight[tuple(slice(3) for _ in weight.shape)]
    w = torch.tensor(2.0, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (*cut, w, *([] if weight is None else [weight]))]

    def regress(query, key, value, w, weight=None):
        return nwfast.nadaraya_watson(query, key, value, w, key_weight=weight, return_lse=return_lse)

    given = *inputs[:4], inputs[4] if weight is not None else None
    assert call.short_way("auto", *given, False, "auto", return_lse) is not None
    assert torch.autograd.gradcheck(regress, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(regress, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["dense", "fgt"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
def test_numba_past_the_dispatcher_gives_the_same_bits(weighted, scalar, method, dtype, monkeypatch):
    query, key, value, weight = make("weights", dtype)
    inputs = query, key, value, torch.tensor(7.0 if scalar else [7.0], dtype=dtype), weight
    taken = []
    for short in (True, False):
        if not short:
            monkeypatch.setattr(call, "goes_short", lambda *tensors: False)
        for exclude_self, return_lse in ((False, False), (True, False), (False, True)):
            leaves = [x.clone().requires_grad_() for x in inputs]
            options = {"exclude_self": exclude_self, "return_lse": return_lse, "backend": "numba"}

            def regress(query, key, value, w, weight, options=options, own=exclude_self):
                return nwfast.nadaraya_watson(
                    key if own else query, key, value, w,
                    key_weight=weight if weighted else None, method=method, **options,
                )  # fmt: skip

            with torch.no_grad():
                plain = regress(*leaves)
            out = regress(*leaves)
            wanted = leaves[1 if exclude_self else 0 : 5 if weighted else 4]
            outs = out if return_lse else (out,)
            taken += [*(plain if return_lse else (plain,)), *outs]
            taken += torch.autograd.grad(outs, wanted, [torch.ones_like(x) for x in outs], retain_graph=True)
            taken += torch.autograd.grad(outs, leaves[3], [torch.ones_like(x) for x in outs])
    half = len(taken) // 2
    for ours, theirs in zip(taken[:half], taken[half:], strict=True):
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["auto", "numba"])
def test_refuses_what_is_not_exactly_of_such_a_form(name):
    x, w = torch.rand(3), torch.ones(1)
    assert call.short_way(name, x, x, x, w, None, False, "auto", False) is not None
    for arguments in (
        (x, x, torch.rand(4), w, None),
        (x, torch.rand(4, 3), torch.rand(4, 3), w, None),
        (x, x, x.double(), w, None),
        (x, torch.rand(0), torch.rand(0), w, None),
        (x, x, x, torch.ones(3), None),
        (x, x, x, w.double(), None),
        (x, x, x, w, torch.rand(4)),
        (x, x.to("meta"), x, w, None),
        (x[:, None], x[:, None], x, w, None),
        (x.half(), x.half(), x.half(), w.half(), None),
        (x, x, x, 1.0, None),
        (x, x.long(), x, w, None),
        (x, x, x.bool(), w, None),
        (x, x, x, w, x > 0),
        (x, x.to_sparse(), x, w, None),
        (x, x, x.to_sparse(), w, None),
        (x, x, x, w[:0], None),
        (x, x, x, w, torch.tensor(1.0)),
    ):
        assert call.short_way(name, *arguments, False, "auto", False) is None
    assert call.short_way(name, x, x[:2], x[:2], w, None, True, "auto", False) is None


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), TypeError("no")]
)
def test_a_failure_is_no_refusal(monkeypatch, error, differentiate):
    """It reaches the caller; no other kernel is tried instead."""
    x, w = torch.rand(3), torch.ones(1, requires_grad=differentiate)
    kernels = schema.KERNELS["native"]
    tried = []

    def fail(*arguments):
        tried.append(arguments)
        raise error

    monkeypatch.setattr(kernels, "stateless", fail)
    eager, *_ = autograd.functions_around(fail, fail, fail)
    monkeypatch.setattr(kernels, "eager", eager)
    with pytest.raises(type(error), match=str(error)):
        nwfast.nadaraya_watson(x, x, x, w)
    assert len(tried) == 1
