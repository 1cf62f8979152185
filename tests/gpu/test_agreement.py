"""Both backends and what surrounds a call, against the reference in float64 on the CPU; and the same bits twice."""

import pytest
import torch
from unkind import KINDS, unkind

import nwfast

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def on_the_cpu(tensors):
    return [x.detach().cpu().double() if isinstance(x, torch.Tensor) else x for x in tensors]


def assert_near(found, expected, dtype):
    """Relative to the largest entry of each result."""
    assert len(found) == len(expected)
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.is_cuda
        assert a.shape == b.shape
        error = (a.detach().cpu().double() - b).abs().max()
        assert error <= TOLERANCE[dtype] * b.abs().max(), f"result {place}: error {error:.3g}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients(call, differentiate, problem, form, dtype):
    tensors, exclude_self = problem(form, dtype)
    expected = differentiate(on_the_cpu(tensors), exclude_self, backend="reference")
    assert_near(differentiate(tensors, exclude_self), expected, dtype)
    found = call(tensors, exclude_self, return_lse=True)
    expected = call(on_the_cpu(tensors), exclude_self, backend="reference", return_lse=True)
    assert_near(found, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_data_that_is_not_kind(call, differentiate, problem, form, kind, dtype):
    """Offsets, one sign and mixed scales."""
    tensors, exclude_self = problem(form, dtype)
    tensors = unkind(kind, tensors)
    expected = differentiate(on_the_cpu(tensors), exclude_self, backend="reference")
    assert_near(differentiate(tensors, exclude_self), expected, dtype)


def test_the_same_bits_at_every_run(differentiate, problem, form):
    tensors, exclude_self = problem(form)
    first = differentiate(tensors, exclude_self)
    busy, other = torch.randn(2000, 2000), torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(other):  # so that blocks are not always scheduled alike
            busy @ busy
        for a, b in zip(differentiate(tensors, exclude_self), first, strict=True):
            assert torch.equal(a, b)
    torch.cuda.synchronize()


# What surrounds the call, each as a function of an op f(query, key, value, w) and its tensors.
AROUND = {
    "second derivative": lambda f, x: torch.autograd.grad(
        torch.autograd.grad(f(*x).sin().sum(), x[3], create_graph=True)[0].sum(), x
    ),
    "grad": lambda f, x: torch.func.grad(lambda *y: f(*y).sin().sum(), (0, 1, 2, 3))(*x),
    "vmap": lambda f, x: [torch.vmap(lambda w: f(*x[:3], w))(torch.stack([x[3], 2 * x[3]]))],
    "vmap of grad": lambda f, x: [
        torch.vmap(torch.func.grad(lambda w: f(*x[:3], w).sin().sum()))(torch.stack([x[3], 2 * x[3]]))
    ],
    "jvp": lambda f, x: torch.func.jvp(f, tuple(x), tuple(y.cos() for y in x)),
    "jacrev": lambda f, x: [torch.func.jacrev(f, 3)(*x)],
}


@pytest.mark.parametrize("around", AROUND)
def test_transforms(call, problem, around):
    tensors, _ = problem("1-D", torch.float64)
    inputs = [x.detach().requires_grad_() for x in tensors[:4]]
    others = [x.requires_grad_() for x in on_the_cpu(inputs)]
    found = AROUND[around](lambda *x: call([*x, None]), inputs)
    expected = AROUND[around](lambda *x: call([*x, None], backend="reference"), others)
    assert_near(found, [x.detach() for x in expected], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(call, problem, dtype):
    """Half-precision inputs are computed, and returned, in float32."""
    tensors, _ = problem("features", dtype)
    expected = call(on_the_cpu(tensors), backend="reference")
    with torch.autocast("cuda", dtype=dtype):
        found = call(tensors)
    assert found.dtype == torch.float32
    assert_near([found], [expected], torch.float32)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("which", ["1-D", "channels", "crossed batch"])
def test_compile(call, problem, which, mode):
    """Inductor in one graph, forward and backward; "reduce-overhead" replays it from CUDA graphs."""
    tensors, exclude_self = problem(which)
    leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in tensors]
    required = [x for x in leaves if isinstance(x, torch.Tensor)]

    def loss(*x):
        return call(list(x), exclude_self).sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    expected = [loss(*leaves), *torch.autograd.grad(loss(*leaves), required)]
    for _ in range(4):  # the first runs of "reduce-overhead" warm up and record
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*leaves)
        found = [out, *torch.autograd.grad(out, required)]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_auto_takes_a_kernel(problem):
    """And the module goes the same way."""
    tensors, _ = problem("1-D")
    chosen = nwfast.backends.resolve("auto", torch.device("cuda"))
    assert chosen in ("cuda", "triton")
    query, key, value, w, _ = tensors
    out = nwfast.nadaraya_watson(query, key, value, w)
    assert torch.equal(out, nwfast.nadaraya_watson(query, key, value, w, backend=chosen))
    assert torch.equal(nwfast.NWKernelRegression(w=w)(query, key, value).detach(), out)
