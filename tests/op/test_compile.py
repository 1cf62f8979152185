"""The op under torch.compile, torch.export and tracing with fake or meta tensors."""

import itertools
import os
import re
import shutil

import pytest
import torch
from conftest import every_other
from oracle import textbook
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import nwfast

# What torch itself says where a compiled function meets a transform around it that it cannot serve.
REFUSAL = re.compile("torch.compile|torch.func|functorch|must implement the jvp")


# Parts of torch that are loaded by what is traced here are in a language that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(m=6, n=7, dtype=torch.float64):
    query, key, value = torch.rand(m, dtype=dtype), torch.rand(n, dtype=dtype), torch.randn(n, dtype=dtype)
    w, key_weight = torch.tensor([2.5], dtype=dtype), torch.rand(n, dtype=dtype) + 0.1
    return [tensor.requires_grad_() for tensor in (query, key, value, w, key_weight)]


def auto_operator(backend):
    """What method="auto" calls: the choice between two methods, or the one there is."""
    return (
        f"nwfast.{backend}_auto" if f"{backend}_auto" in nwfast.backends.operators() else f"nwfast.{backend}"
    )


def op(backend, **options):
    def function(query, key, value, w=1.0, key_weight=None):
        return nwfast.nadaraya_watson(query, key, value, w, key_weight=key_weight, backend=backend, **options)

    return function


def assert_same(actual, expected, tolerance=1e-12):
    flat = torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected)
    for a, b in zip(*flat, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def nodes(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("return_lse", [pytest.param(False, marks=pytest.mark.full), True])
def test_fullgraph_with_dynamic_shapes(backend, return_lse):
    """One compilation serves all sizes, forward and backward, and holds the operators."""
    function = op(backend, return_lse=return_lse)
    graphs = []

    def record(graph, example):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=record))
    for m, n in ((6, 7), (9, 4), (12, 30)):
        leaves = make(m, n)

        def loss(f, leaves=leaves):
            result = f(*leaves)
            return sum(part.sin().sum() for part in (result if return_lse else [result]))

        assert_same(compiled(*leaves), function(*leaves))
        assert_same(torch.autograd.grad(loss(compiled), leaves), torch.autograd.grad(loss(function), leaves))
    called = sorted({name for graph in graphs for name in nodes(graph) if "nwfast" in name})
    assert called == [
        f"{auto_operator(backend)}_backward.default",
        f"{auto_operator(backend)}_forward.default",
    ]
    assert len(graphs) == 2, "recompiled for other sizes"


@pytest.mark.shared
@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "c++").split()[0]), reason="torch's inductor needs a C++ compiler"
)
def test_inductor(backend):
    """The default compiler too: what is made in the graph goes in, and several results come out."""

    def function(x, keys, points, w):
        a = nwfast.nadaraya_watson(x, keys, keys.cos(), 2.0, backend=backend)
        b, lse = nwfast.nadaraya_watson(
            points, points, points, w, exclude_self=True, backend=backend, return_lse=True
        )
        return a, b, lse

    query, _, _, w, _ = make(dtype=torch.float32)
    arguments = query, torch.rand(6, 3), torch.rand(2, 5, 3), w
    # One C++ kernel, of the cosine. What these leave out is compiled for torch alone: a header, and a program that
    # tells the instruction set.
    compiled = torch.compile(
        function,
        fullgraph=True,
        options={"cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": True, "compile_threads": 1},
    )
    outputs = [f(*arguments) for f in (compiled, function)]
    assert_same(*outputs, 1e-5)
    cotangents = [torch.randn_like(x) for x in outputs[0]]
    assert_same(*(torch.autograd.grad(own, (query, w), cotangents) for own in outputs), 1e-4)


@pytest.mark.shared
def test_options_and_number_w(backend):
    def function(x, y, w):
        return nwfast.nadaraya_watson(x, x, y, w, exclude_self=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    x, _, _, w, _ = make()
    for weight in (1.0, 2.5, -3, w):
        assert_same(compiled(x, x.sin(), weight), function(x, x.sin(), weight))
    with torch.no_grad():
        assert_same(compiled(x, x.sin(), w), function(x, x.sin(), w))
    with pytest.raises(Exception, match="w must be a scalar or have shape"):
        compiled(x, x.sin(), torch.rand(3, dtype=torch.float64))


@pytest.mark.shared
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(
            lambda f: torch.func.grad(lambda *x: f(*x).sin().sum(), (0, 1, 2, 3, 4)), marks=pytest.mark.full
        ),
        pytest.param(
            lambda f: lambda *x: torch.func.jvp(f, x, tuple(t.cos() for t in x)), marks=pytest.mark.full
        ),
        lambda f: (
            lambda *x: torch.vmap(f, (None, None, None, 0, None))(x[0], x[1], x[2], x[3].expand(2, 1), x[4])
        ),
        pytest.param(
            lambda f: torch.func.hessian(lambda q, k, v, w, a: f(q, k, v, w, a).sum(), 3),
            marks=pytest.mark.full,
        ),
        lambda f: (
            lambda q, k, v, w, a: torch.vmap(
                torch.func.grad(lambda q, w: f(q[None], k, v, w, a).square().sum(), 1), (0, None)
            )(q, w)
        ),
    ],
    ids=["grad", "jvp", "vmap", "hessian", "per-sample gradients"],
)
def test_compiled_transforms(backend, transform):
    arguments = [tensor.detach() for tensor in make()]
    function = op(backend)
    compiled = torch.compile(transform(function), fullgraph=True, backend="aot_eager")
    expected = transform(lambda *x: textbook(*x)[0])(*arguments)
    assert_same(compiled(*arguments), expected, 1e-9)


@pytest.mark.shared
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_transforms_of_compiled(backend):
    """A transform around a compiled function is right, or refused: never silently wrong."""
    arguments = [tensor.detach() for tensor in make()]
    function = op(backend)
    for transform in (
        lambda f: torch.func.grad(lambda *x: f(*x).sin().sum(), (0, 1, 2, 3, 4)),
        lambda f: lambda *x: torch.func.jvp(f, x, tuple(t.cos() for t in x)),
        lambda f: lambda *x: torch.vmap(f)(*[torch.stack([t, 2 * t]) for t in x]),
    ):
        compiled = torch.compile(function, backend="aot_eager")
        compiled(*arguments)  # compiled outside of the transform first
        try:
            found = transform(compiled)(*arguments)
        except Exception as error:
            assert REFUSAL.search(str(error)), error  # noqa: PT017
        else:
            assert_same(found, transform(lambda *x: textbook(*x)[0])(*arguments), 1e-9)


@pytest.mark.shared
@pytest.mark.parametrize("requires_grad", [pytest.param(False, marks=pytest.mark.full), True])
def test_compiled_with_dual_tensors(backend, requires_grad):
    function = op(backend)
    leaves = [tensor.detach().requires_grad_(requires_grad) for tensor in make()]
    compiled = torch.compile(function, backend="aot_eager")
    compiled(*leaves)  # compiled outside of the dual level first
    tangent = torch.rand(1, dtype=torch.float64)
    found = []
    for f in (compiled, lambda *x: textbook(*x)[0]):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaves[3], tangent)
            try:
                result = f(leaves[0], leaves[1], leaves[2], dual, leaves[4])
            except Exception as error:
                assert REFUSAL.search(str(error)), error  # noqa: PT017
                return
            found.append(forward_ad.unpack_dual(result).tangent)
    assert_same(*found, 1e-9)


def test_double_backward_of_compiled_is_right_or_refused(backend):
    leaves = make()
    for compiler in ("eager", "aot_eager"):
        compiled = torch.compile(op(backend), fullgraph=True, backend=compiler)
        (first,) = torch.autograd.grad(compiled(*leaves).square().sum(), leaves[3], create_graph=True)
        expected = torch.autograd.grad(textbook(*leaves)[0].square().sum(), leaves[3], create_graph=True)[0]
        assert_same(first.detach(), expected.detach(), 1e-9)
        if compiler == "eager":
            assert_same(torch.autograd.grad(first, leaves), torch.autograd.grad(expected, leaves), 1e-9)
        else:
            with pytest.raises(RuntimeError, match="does not currently support double backward"):
                torch.autograd.grad(first, leaves)


def test_autocast_inside_compile(backend, device):
    where = device.type

    def function(query, key, value, w):
        with torch.autocast(where, dtype=torch.bfloat16):
            return nwfast.nadaraya_watson(query, key, value, w, backend=backend)

    query, key, value, w, _ = make(dtype=torch.float32)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (query, key, value)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out = compiled(*half, w)
    assert out.dtype == torch.float32
    assert_same(out, function(*half, w), 1e-6)
    found, expected = (torch.autograd.grad(f(*half, w).sum(), (*half, w)) for f in (compiled, function))
    assert [g.dtype for g in found] == [torch.bfloat16] * 3 + [torch.float32]
    assert_same(found, expected, 1e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_export(backend, strict):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

        def forward(self, query, key, value):
            return nwfast.nadaraya_watson(query, key, value, self.w, backend=backend, return_lse=True)

    module = Module()
    size = torch.export.Dim("size", min=2)
    query, key, value, _, _ = (tensor.detach() for tensor in make())
    program = torch.export.export(
        module,
        (query, key, value),
        dynamic_shapes=({0: torch.export.Dim.AUTO}, {0: size}, {0: size}),
        strict=strict,
    )
    assert f"{auto_operator(backend)}_forward.default" in nodes(program.graph_module)
    for m, n in ((6, 7), (3, 11)):
        arguments = [tensor.detach() for tensor in make(m, n)[:3]]
        assert_same(program.module()(*arguments), module(*arguments))


@every_other("what, kind", ["op", "attention_weights"], ["float", "int"])
def test_one_program_for_all_numbers(native, kind, what):
    """The first is taken for a constant, the second for any: no more than two, as for the textbook lines."""
    numbers = [0.5 + 0.3 * i for i in range(12)] if kind == "float" else range(1, 13)
    programs = []

    def record(graph, example):
        programs.append(graph)
        return graph.forward

    query, key, value = torch.rand(5), torch.rand(7), torch.rand(7)

    def function(w):
        if what == "op":
            return nwfast.nadaraya_watson(query, key, value, w)
        return nwfast.attention_weights(query, key, w)

    compiled = torch.compile(function, fullgraph=True, backend=record)
    for w in numbers:
        assert_same(compiled(w), function(w), 1e-5)
    assert len(programs) <= 2


def test_number_out_of_a_tensor(native):
    query, key, value, w, _ = (tensor.detach() for tensor in make())

    def function(w):
        return nwfast.nadaraya_watson(query, key, value, w.item())

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for factor in (1, 2, 3):
            assert_same(compiled(factor * w), function(factor * w))


@pytest.mark.parametrize("how", ["AUTO", "DYNAMIC", "named"])
def test_export_of_the_module_is_for_all_sizes(native, how):
    net = nwfast.NWKernelRegression(w=2.0)
    dim = torch.export.Dim
    m, n = (dim("m", min=2), dim("n", min=2)) if how == "named" else [getattr(dim, how)] * 2
    x = torch.rand(50)
    program = torch.export.export(net, (x, x + 1, x.cos()), dynamic_shapes=({0: m}, {0: n}, {0: n}))
    for size in (2, 3, 4095, 4096, 10000):
        query, key, value = torch.rand(7), torch.rand(size), torch.rand(size)
        assert_same(program.module()(query, key, value), net(query, key, value), 1e-4)


def test_export_to_onnx_has_operators_of_torch_alone(native, monkeypatch):
    """ONNX knows no others. Its own packages need not be there: torch tells that the export is for it by a flag.

    The program is captured as torch.onnx.export does it first, not strictly: Dynamo would take the flag for unset.
    """
    from torch.onnx._internal.exporter import _flags

    net = nwfast.NWKernelRegression(w=2.0)
    x, y = torch.rand(5), torch.rand(6)
    monkeypatch.setattr(_flags, "_is_onnx_exporting", True)
    program = torch.export.export(net, (x, y, y.cos()), strict=False)
    monkeypatch.undo()
    assert not any("nwfast" in name for name in nodes(program.graph_module))
    assert_same(program.module()(x, y, y), net(x, y, y), 1e-5)


def test_make_fx_traces_the_operator(backend):
    function = op(backend)
    arguments = [tensor.detach() for tensor in make()]

    def gradients(*x):
        leaves = [tensor.detach().requires_grad_() for tensor in x]
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    for mode in ("real", "fake", "symbolic"):
        forward = make_fx(function, tracing_mode=mode)(*arguments)
        operator = "output" if backend in ("native", "numba") else "forward"
        assert f"nwfast.{backend}_{operator}.default" in nodes(forward)
        assert_same(forward(*arguments), function(*arguments))
        backward = make_fx(gradients, tracing_mode=mode)(*arguments)
        assert f"nwfast.{backend}_backward.default" in nodes(backward)
        assert_same(backward(*arguments), gradients(*arguments))
    inside = make_fx(torch.func.grad(lambda *x: function(*x).sum(), (0, 3)))(*arguments)
    assert_same(inside(*arguments), torch.func.grad(lambda *x: function(*x).sum(), (0, 3))(*arguments))


def test_fake_and_meta_tensors_have_the_shapes_of_real_ones(backend):
    for return_lse, dtype in itertools.product((False, True), (torch.float64, torch.float32, torch.bfloat16)):
        function = op(backend, return_lse=return_lse)
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in make()]
        real = function(*leaves)
        meta = function(*[tensor.detach().to("meta").requires_grad_() for tensor in leaves])
        with FakeTensorMode() as mode:
            fake_leaves = [mode.from_tensor(tensor) for tensor in leaves]
            fake = function(*fake_leaves)
            total = sum(part.sum() for part in (fake if return_lse else [fake]))
            gradients = torch.autograd.grad(total, fake_leaves)
        assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in leaves]
        for a, b, c in zip(*(x if return_lse else [x] for x in (real, meta, fake)), strict=True):
            assert (
                (a.shape, a.dtype, a.stride())
                == (b.shape, b.dtype, b.stride())
                == (c.shape, c.dtype, c.stride())
            )


def test_row_without_keys(backend):
    def loss(query, key, value, w, key_weight):
        out, lse = nwfast.nadaraya_watson(
            query, key, value, w, key_weight=key_weight, backend=backend, return_lse=True
        )
        return out.square().sum(), out, lse

    query, key, value, w, _ = (t.detach() for t in make())
    query, key = query[:, None, None].requires_grad_(), key.expand(6, 7)[..., None].clone().requires_grad_()
    value = value.expand(6, 7)[..., None].clone().requires_grad_()
    key_weight = torch.ones(6, 7, dtype=torch.float64)
    key_weight[2] = 0
    w.requires_grad_()
    for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        total, out, lse = f(query, key, value, w, key_weight)
        assert out.isnan().flatten(1).any(1).tolist() == [False, False, True, False, False, False]
        assert lse[2] == -torch.inf
        gradients = torch.autograd.grad(total, (query, key, value, w))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not any(gradient[2].any() for gradient in gradients[:3])
