"""Every eager route to the op: autograd of all orders, torch.func, forward mode, the operators, autocast.

One file, long as it is: each route has to give the same derivatives on the same `inputs`, in all `FORMS`, and a form
that is added is added to all of them.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import every_other
from oracle import textbook
from torch.autograd import forward_ad

import nwfast
from nwfast.op import by_reference, schema

# Parts of torch that transforms load are in a language that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
DOUBLE = torch.float64


def inputs(form="1-D"):
    """query, key, value, w and key_weight in float64 that require gradients, and exclude_self."""
    shapes = {
        "1-D": ((4,), (5,), (5,), (1,), (5,), False),
        "leave-one-out": ((5,), (5,), (5,), (), (5,), True),
        "per-query keys": ((4,), (4, 3), (4, 3), (1,), (4, 3), False),
        "features": ((4, 2), (5, 2), (5, 3), (2,), (5,), False),
        "heads": ((1, 2, 3, 2), (2, 1, 4, 2), (2, 2, 4, 1), (2, 1), (2, 1, 4), False),
    }
    *sizes, exclude_self = shapes[form]
    tensors = [torch.rand(size, dtype=DOUBLE) + 0.2 for size in sizes]
    tensors[3] = tensors[3] + 1.5
    return [tensor.requires_grad_() for tensor in tensors], exclude_self


FORMS = ["1-D", "leave-one-out", "per-query keys", "features", "heads"]


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def op(backend, **options):
    """The op and the textbook as functions of (query, key, value, w, key_weight) that return out alone."""

    def ours(query, key, value, w=1.0, key_weight=None):
        return nwfast.nadaraya_watson(query, key, value, w, key_weight=key_weight, backend=backend, **options)

    def theirs(query, key, value, w=1.0, key_weight=None):
        return textbook(query, key, value, w, key_weight, **options)[0]

    return ours, theirs


# Reverse mode.


@pytest.mark.shared
@every_other("form, return_lse", FORMS, (False, True))
def test_derivatives_of_first_and_second_order(backend, form, return_lse):
    leaves, exclude_self = inputs(form)
    function, _ = op(backend, exclude_self=exclude_self, return_lse=return_lse)
    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, check_batched_grad=True, fast_mode=True)


def test_third_derivative(backend):
    ours, theirs = op(backend)
    leaves, _ = inputs()
    w = leaves[3]
    found = []
    for function in (ours, theirs):
        result = function(*leaves).square().sum()
        for _ in range(3):
            (result,) = torch.autograd.grad(result.sum(), w, create_graph=True)
        found.append(result.detach())
    close(*found)


@pytest.mark.parametrize("form", FORMS)
def test_create_graph_gives_the_gradients_of_the_kernel(backend, form):
    leaves, exclude_self = inputs(form)
    function, _ = op(backend, exclude_self=exclude_self)
    plain = torch.autograd.grad(function(*leaves).sin().sum(), leaves)
    kept = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a, b)
        assert b.requires_grad


def test_saved_tensors_are_freed_and_kept(backend):
    leaves, _ = inputs()
    function, _ = op(backend)
    out = function(*leaves).sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    second = torch.autograd.grad(out, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, leaves)


@pytest.mark.parametrize("place", range(5))
def test_input_modified_before_the_backward_pass(backend, place):
    leaves, _ = inputs()
    changed = leaves[place].detach().clone()
    arguments = [changed if place == i else leaf for i, leaf in enumerate(leaves)]
    out = op(backend)[0](*arguments)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_result_modified_in_place(backend, form):
    """The backward pass needs the result: like softmax, it does not take it from a result that was overwritten."""
    leaves, exclude_self = inputs(form)
    out = op(backend, exclude_self=exclude_self)[0](*leaves)
    with pytest.raises(RuntimeError, match="inplace"):  # refused at once, or by the backward pass
        out.mul_(2).sum().backward()


def test_broadcast_inputs_get_summed_gradients(backend):
    ours, theirs = op(backend)
    leaves, _ = inputs("heads")
    for a, b in zip(
        torch.autograd.grad(ours(*leaves).sin().sum(), leaves),
        torch.autograd.grad(theirs(*leaves).sin().sum(), leaves),
        strict=True,
    ):
        close(a, b)
    x = torch.rand(1, dtype=DOUBLE, requires_grad=True)
    z = torch.rand(3, 6, dtype=DOUBLE, requires_grad=True)
    w = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)

    def through_views(function):
        return function(x.expand(4), z[::2].T[1:].reshape(-1), z.T[:5, :2].reshape(-1), w).square().sum()

    for a, b in zip(
        torch.autograd.grad(through_views(ours), (x, z, w)),
        torch.autograd.grad(through_views(theirs), (x, z, w)),
        strict=True,
    ):
        close(a, b)


def test_batched_gradients_and_vectorized_hessian(backend):
    (query, key, value, w, key_weight), _ = inputs()
    ours, theirs = op(backend)
    cotangents = torch.randn(6, 4, dtype=DOUBLE)
    found = [
        torch.autograd.grad(f(query, key, value, w, key_weight), (w, key), cotangents, is_grads_batched=True)
        for f in (ours, theirs)
    ]
    for a, b in zip(*found, strict=True):
        close(a, b)
    hessians = [
        torch.autograd.functional.hessian(
            lambda q, w, f=f: f(q, key.detach(), value.detach(), w).sum(), (query, w), vectorize=True
        )
        for f in (ours, theirs)
    ]
    for a, b in zip(itertools.chain(*hessians[0]), itertools.chain(*hessians[1]), strict=True):
        close(a, b)


def test_checkpoint_and_saved_tensor_hooks(backend):
    leaves, _ = inputs("features")
    function, _ = op(backend)
    plain = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    out = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    assert all(
        torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.square().sum(), leaves), plain, strict=True)
    )
    with torch.autograd.graph.save_on_cpu():
        out = function(*leaves)
    assert all(
        torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.square().sum(), leaves), plain, strict=True)
    )


def test_second_derivative_that_does_not_fit_is_refused(backend, monkeypatch):
    leaves, _ = inputs()
    ours, _ = op(backend)
    (first,) = torch.autograd.grad(ours(*leaves).square().sum(), leaves[3], create_graph=True)
    monkeypatch.setattr(by_reference, "_free_memory", lambda device: 1000)
    with pytest.raises(
        RuntimeError, match=r"second derivative .* M = 4, N = 5 need about .* GB, and 1e-06 GB"
    ):
        torch.autograd.grad(first, leaves[3])
    with pytest.raises(RuntimeError, match=r"forward-mode derivative .* GB"):
        torch.func.jvp(lambda w: ours(leaves[0].detach(), leaves[1].detach(), leaves[2].detach(), w),
                       (leaves[3].detach(),), (torch.ones(1, dtype=DOUBLE),))  # fmt: skip


def test_free_memory_is_that_of_the_machine():
    free = by_reference._free_memory(torch.device("cpu"))
    assert free is None or 1e7 < free < 1e14
    n = 40_000_000
    x = torch.empty(1, dtype=DOUBLE).expand(n, 1)
    if free is not None:
        with pytest.raises(RuntimeError, match="second derivative of nadaraya_watson builds"):
            by_reference.require_memory("second derivative", x, x, x)


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_the_estimate_of_memory_holds():
    """In a fresh process: the peak lies below the estimate, and not so far below that it refuses for nothing."""
    code = """
import torch, nwfast
from nwfast.op import by_reference as derivatives
torch.set_num_threads(1)

def status(name):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

def second(n, features, dtype):
    leaves = [torch.rand(n, size, requires_grad=True, dtype=dtype) for size in (features, features, 1)]
    first = torch.autograd.grad(nwfast.nadaraya_watson(*leaves).square().sum(), leaves, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in first), leaves)

def forward(n, features, dtype):
    leaves = tuple(torch.rand(n, size, dtype=dtype) for size in (features, features, 1))
    torch.func.jvp(nwfast.nadaraya_watson, leaves, leaves)

for what, run in {"second derivative": second, "forward-mode derivative": forward}.items():
    for features, dtype in ((1, torch.float32), (3, torch.float32), (1, torch.float64), (3, torch.float64)):
        run(10, features, dtype)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again at what is in use
        before = status("VmRSS")
        run(1000, features, dtype)
        peak = (status("VmHWM") - before) / 8e6
        matrices, per_feature = derivatives._MATRICES[what]
        estimate = matrices + per_feature * features
        assert 0.6 * estimate < peak < 1.1 * estimate, (what, features, dtype, peak, estimate)
"""
    # Freed matrices go back to the system, so that the peak is that of what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# torch.func and forward mode.

TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda *x: f(*x).sin().sum(), argnums=(0, 1, 2, 3, 4)),
    "vjp": lambda f: lambda *x: torch.func.vjp(f, *x)[1](torch.ones_like(x[0]).cos()),
    "jvp": lambda f: lambda *x: torch.func.jvp(f, x, tuple(t.cos() for t in x)),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1, 2, 3, 4)),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=(0, 1, 2, 3, 4)),
    "hessian": lambda f: torch.func.hessian(lambda *x: f(*x).sum(), argnums=(0, 3, 4)),
    "reverse over reverse": lambda f: torch.func.jacrev(
        torch.func.grad(lambda *x: f(*x).sin().sum(), argnums=(1, 3)), argnums=(2, 3)
    ),
    "forward over forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f, argnums=3), argnums=1),
    "linearize": lambda f: lambda *x: torch.func.linearize(f, *x)[1](*x),
}


@every_other(
    "form, transform", ("1-D", "leave-one-out", "per-query keys"), [x for x in TRANSFORMS if x != "linearize"]
)
def test_transforms(backend, form, transform):
    check_transform(backend, form, transform)


@pytest.mark.shared
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize(
    "form",
    ["1-D", *(pytest.param(form, marks=pytest.mark.full) for form in ("leave-one-out", "per-query keys"))],
)
def test_linearize(backend, form):
    """By itself, since torch takes seconds to make a program of its derivative."""
    check_transform(backend, form, "linearize")


def check_transform(backend, form, transform):
    leaves, exclude_self = inputs(form)
    leaves = [leaf.detach() for leaf in leaves]
    ours, theirs = op(backend, exclude_self=exclude_self)
    found, expected = (TRANSFORMS[transform](f)(*leaves) for f in (ours, theirs))
    flat, expected = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
    assert any(tensor.any() for tensor in expected)
    for a, b in zip(flat, expected, strict=True):
        close(a, b)


@pytest.mark.shared
@every_other(
    "form, mapped", ("1-D", "heads"), [c for r in range(1, 6) for c in itertools.combinations(range(5), r)]
)
def test_vmap_over_any_subset(backend, form, mapped):
    leaves, _ = inputs(form)
    stacked = [
        torch.stack([leaf.detach() * (1 + 0.2 * i) for i in range(3)], dim=-1 if place % 2 else 0)
        if place in mapped
        else leaf.detach()
        for place, leaf in enumerate(leaves)
    ]
    dims = tuple((-1 if place % 2 else 0) if place in mapped else None for place in range(5))
    ours, theirs = op(backend)
    close(torch.vmap(ours, dims)(*stacked), torch.vmap(theirs, dims)(*stacked))

    def gradients(f):
        return torch.vmap(torch.func.grad(lambda *x: f(*x).sin().sum(), argnums=(0, 1, 2, 3, 4)), dims)(
            *stacked
        )

    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        close(a, b)


def test_vmap_of_lse(backend):
    leaves = [leaf.detach() for leaf in inputs("heads")[0]]
    stacked = torch.stack(leaves[:1] * 3) + torch.rand(3, 1, 1, 1, 1, dtype=DOUBLE)

    def ours(q):
        return nwfast.nadaraya_watson(q, *leaves[1:4], key_weight=leaves[4], backend=backend, return_lse=True)

    for a, b in zip(
        torch.vmap(ours)(stacked), torch.vmap(lambda q: textbook(q, *leaves[1:]))(stacked), strict=True
    ):
        close(a, b)
    jacobians = [
        torch.vmap(torch.func.jacrev(f))(stacked) for f in (ours, lambda q: textbook(q, *leaves[1:]))
    ]
    for a, b in zip(*jacobians, strict=True):
        close(a, b)


def test_nested_vmap_and_ensembles_of_w(backend):
    (query, key, value, _, _), _ = inputs()
    query, key, value = query.detach(), key.detach(), value.detach()
    many_w = torch.rand(2, 3, dtype=DOUBLE) + 1
    many_values = torch.randn(3, 5, dtype=DOUBLE)
    ours, theirs = op(backend)

    def grid(f):
        inner = torch.vmap(lambda w, v: f(query, key, v, w), in_dims=(0, 0))
        return torch.vmap(inner, in_dims=(0, None))(many_w, many_values)

    close(grid(ours), grid(theirs))

    def per_sample(f):  # gradients of each query's loss
        loss = lambda q, w: (f(q[None], key, value, w) - 1).square().sum()  # noqa: E731
        return torch.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(query, many_w[0, 0])

    close(per_sample(ours), per_sample(theirs))

    def of_gradient(f):
        return torch.func.grad(lambda w: grid_of(f, w).sin().sum())(many_w)

    def grid_of(f, w):
        return torch.vmap(torch.vmap(lambda w: f(query, key, value, w)))(w)

    close(of_gradient(ours), of_gradient(theirs))
    leaf = many_w.clone().requires_grad_()
    close(torch.autograd.grad(grid_of(ours, leaf).sin().sum(), leaf)[0], of_gradient(theirs))


def test_vmap_knows_whether_anything_is_differentiated(backend):
    """By a transform around it or within, by a graph outside, or not at all: then results alone are computed."""
    (query, key, value, _, weight), _ = inputs()
    query, key, value, weight = (x.detach() for x in (query, key, value, weight))
    many = torch.rand(3, dtype=DOUBLE) + 1

    def mapped(f, over=many, **options):
        return torch.vmap(lambda w: f(query, key, value, w, weight, **options))(over)

    ours, theirs = op(backend)
    right = mapped(theirs)
    close(mapped(ours), right)
    with torch.no_grad():
        close(mapped(ours, many.clone().requires_grad_()), right)
    assert not mapped(ours).requires_grad
    seen = []
    for f in (ours, theirs):
        scale = torch.tensor(1.5, dtype=DOUBLE, requires_grad=True)
        through = torch.vmap(lambda w, f=f, scale=scale: f(query, key, value, w * scale, weight))(many)
        outside = torch.func.grad(lambda s, f=f: mapped(f, many * s).sin().sum())(scale.detach())
        inside = torch.vmap(torch.func.grad(lambda w, f=f: f(query, key, value, w, weight).sin().sum()))(many)
        seen.append((torch.autograd.grad(through.sin().sum(), scale)[0], outside, inside))
    for found, expected in zip(*seen, strict=True):
        assert expected.any()
        close(found, expected)


@pytest.mark.parametrize("place", range(5))
def test_dual_tensors(backend, place):
    """Inputs that require gradients or not, duals or not: the tangent is right wherever one enters."""
    leaves, _ = inputs()
    ours, theirs = op(backend)
    tangent = torch.rand_like(leaves[place])
    for requires_grad in (False, True):
        arguments = [leaf.detach().requires_grad_(requires_grad) for leaf in leaves]
        found = []
        for f in (ours, theirs):
            with forward_ad.dual_level():
                duals = list(arguments)
                duals[place] = forward_ad.make_dual(arguments[place], tangent)
                found.append(forward_ad.unpack_dual(f(*duals)).tangent)
        assert found[0].any()
        close(*found)


def test_dual_cotangent_of_a_graph_built_outside(backend):
    leaves, _ = inputs()
    ours, theirs = op(backend)
    found = []
    tangent = torch.randn(4, dtype=DOUBLE)
    for f in (ours, theirs):
        out = f(*leaves)
        with forward_ad.dual_level():
            cotangent = forward_ad.make_dual(torch.ones(4, dtype=DOUBLE), tangent)
            gradients = torch.autograd.grad(out, leaves, cotangent)
            found.append([forward_ad.unpack_dual(g).tangent for g in gradients])
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_private_checks_that_choose_the_route():
    """torch has no public name for these. When this fails, nwfast.op.call needs their successors."""
    seen = []

    def look(x):
        seen.append((torch._C._are_functorch_transforms_active(), forward_ad._current_level))
        return x.sum()

    x = torch.ones(2)
    look(x)
    torch.func.grad(look)(x)
    torch.vmap(look)(x[None])
    torch.func.jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(x)
    look(x)
    assert seen == [(False, -1), (True, -1), (True, -1), (True, 0), (False, 0), (False, -1)]
    functorch = torch._C._functorch
    keys = []

    def stack(x):
        keys.append([at.key() for at in functorch.get_interpreter_stack()])
        assert functorch.is_batchedtensor(x)
        assert functorch.get_unwrapped(x).ndim == x.ndim + 1
        return x.sum()

    torch.vmap(stack)(x[None])
    torch.func.grad(lambda x: torch.vmap(stack)(x[None]).sum())(x)
    vmap, grad = functorch.TransformType.Vmap, functorch.TransformType.Grad
    assert keys == [[vmap], [grad, vmap]]
    with torch._C._AutoDispatchBelowAutograd():
        assert not (x.clone().requires_grad_() * 2).requires_grad


# A row that has no key left: NaN, lse -inf, zero gradient, in every route.


@pytest.mark.parametrize("form", ["per-query keys", "heads"])
def test_row_without_keys(backend, form):
    leaves, _ = inputs(form)
    with torch.no_grad():
        leaves[4][1] = 0
    arguments = leaves[:4], leaves[4].detach()

    def f(query, key, value, w):
        return nwfast.nadaraya_watson(
            query, key, value, w, key_weight=arguments[1], backend=backend, return_lse=True
        )

    def loss(*x):  # NaN where the row is, and so is the gradient that comes back
        out, lse = f(*x)
        return out.square().sum() + torch.where(lse.isinf(), 0.0, lse).sum()

    def kept(*x):
        out, lse = nwfast.nadaraya_watson(*x, key_weight=arguments[1], backend="reference", return_lse=True)
        return out.nan_to_num().square().sum() + torch.where(lse.isinf(), 0.0, lse).sum()

    x = [leaf.detach() for leaf in leaves[:4]]
    with torch.no_grad():
        out, lse = f(*x)
    assert out[1].isnan().all()
    assert (lse[1] == -torch.inf).all()
    assert out[0].isfinite().all()
    expected = torch.func.grad(kept, (0, 1, 2, 3))(*x)
    assert all(torch.isfinite(g).all() for g in expected)
    eager = torch.autograd.grad(loss(*leaves[:4]), leaves[:4])
    graph = torch.autograd.grad(loss(*leaves[:4]), leaves[:4], create_graph=True)
    inside = torch.func.grad(loss, (0, 1, 2, 3))(*x)
    mapped = torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)))(*[torch.stack([t, t]) for t in x])
    for found in (eager, graph, inside, [m[1] for m in mapped]):
        for a, b in zip(found, expected, strict=True):
            close(a.detach(), b)
    second = torch.autograd.grad(sum(g.sum() for g in graph), leaves[:4])
    right = torch.func.grad(
        lambda *x: sum(g.sum() for g in torch.func.grad(kept, (0, 1, 2, 3))(*x)), (0, 1, 2, 3)
    )(*x)
    for a, b in zip(second, right, strict=True):
        close(a, b)
    _, tangent = torch.func.jvp(lambda w: f(*x[:3], w), (x[3],), (torch.ones_like(x[3]),))
    assert all(t[0].isfinite().all() and not t[1].any() for t in tangent)


def test_leave_one_out_of_one_key(backend):
    for shape in ((1,), (3, 1, 2)):
        x = torch.rand(shape, requires_grad=True)
        y = torch.rand(*shape[:1], *shape[1:-1], requires_grad=True)
        w = torch.tensor(2.0, requires_grad=True)
        out, lse = nwfast.nadaraya_watson(x, x, y, w, exclude_self=True, backend=backend, return_lse=True)
        assert out.isnan().all()
        assert (lse == -torch.inf).all()
        for result in (out, nwfast.nadaraya_watson(x, x, y, w, exclude_self=True, backend=backend)):
            for gradient in torch.autograd.grad(result.square().sum(), (x, y, w)):
                assert torch.equal(gradient, torch.zeros_like(gradient))


# Operators, autocast.


# A dtype each with weights or without; traced as a program, which takes longest, in two of these.
SOME = ((torch.float32, False, True), (torch.float64, True, True), (torch.bfloat16, True, False))
ALL = tuple((dtype, weighted, True) for dtype, _, _ in SOME for weighted in (False, True))


@pytest.mark.parametrize(
    "cases", [pytest.param(SOME, id="some"), pytest.param(ALL, id="all", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(backend, form, cases):
    (query, key, value, w, key_weight), exclude_self = inputs(form)
    canonical = list(nwfast.validation.canonical(query, key, value, w, key_weight, exclude_self)[:5])
    kernels = schema.KERNELS[backend]
    single = query.ndim == 1
    batch = nwfast.backends.batch_shape(*canonical[:3])
    for dtype, weighted, traced in cases:
        own = [tensor.detach().to(dtype).requires_grad_() for tensor in canonical]
        own[3] = (
            canonical[3].detach().to(torch.float32 if dtype == torch.bfloat16 else dtype).requires_grad_()
        )
        weight = own[4] if weighted else None
        arguments = (*own[:4], weight, exclude_self, single, single)
        # Autograd of outputs that are not differentiable is tested above by gradcheck.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        tests += ("test_aot_dispatch_dynamic",) if traced else ()
        torch.library.opcheck(kernels.forward, arguments, test_utils=tests)
        with torch.no_grad():
            out, lse, state, tangent_w, tangent_q = kernels.forward(*arguments)
        if kernels.stateless is not None:
            only = (*own[:4], weight, exclude_self, not single, single, single)
            torch.library.opcheck(kernels.stateless, only, test_utils=("test_schema", "test_faketensor"))
        assert out.shape == (*batch, *canonical[0].shape[-2:-1], canonical[2].shape[-1])
        for needs, grad_lse in ((31 if weighted else 15, torch.randn_like(lse)), (9, None), (6, None)):
            arguments_back = (
                torch.randn_like(out), grad_lse, *own[:4], weight, out, state, tangent_w, tangent_q, exclude_self,
                needs,
            )  # fmt: skip
            torch.library.opcheck(
                kernels.backward, arguments_back, test_utils=("test_schema", "test_faketensor")
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(backend, device, dtype):
    (query, key, value, w, _), _ = inputs()
    query, key, value, w = (tensor.detach().float() for tensor in (query, key, value, w))
    half = query.to(dtype), key.to(dtype), value.to(dtype)
    expected = nwfast.nadaraya_watson(*(tensor.float() for tensor in half), w, backend=backend)
    assert nwfast.nadaraya_watson(*half, w, backend=backend).dtype == dtype
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = nwfast.nadaraya_watson(*half, w, backend=backend)
        assert out.dtype == torch.float32
        assert torch.equal(out, expected)
        mixed = nwfast.nadaraya_watson(half[0], key, value, w.to(dtype), backend=backend)
        assert mixed.dtype == torch.float32
        assert nwfast.attention_weights(*half[:2], w).dtype == torch.float32
        full = nwfast.nadaraya_watson(query, key, value, w, backend=backend)
        leaves = [tensor.clone().requires_grad_() for tensor in half]
        gradients = torch.autograd.grad(nwfast.nadaraya_watson(*leaves, w, backend=backend).sum(), leaves)
        assert all(gradient.dtype == dtype for gradient in gradients)
        leaf = w.clone().requires_grad_()
        gradient = torch.autograd.grad(
            nwfast.nadaraya_watson(query, key, value, leaf, backend=backend).sum(), leaf, create_graph=True
        )[0]
        second = torch.autograd.grad(gradient.sum(), leaf)[0]
    assert torch.equal(full, nwfast.nadaraya_watson(query, key, value, w, backend=backend))
    exact = textbook(query.double(), key.double(), value.double(), leaf.double())[0].sum()
    (right,) = torch.autograd.grad(exact, leaf, create_graph=True)
    close(gradient.detach(), right.detach(), 1e-4)
    close(second, torch.autograd.grad(right.sum(), leaf)[0], 1e-4)


def test_inference_mode(backend):
    (query, key, value, w, _), _ = inputs()
    with torch.inference_mode():
        out = nwfast.nadaraya_watson(query, key, value, w, backend=backend)
    assert out.is_inference()
    with torch.no_grad():  # the same kernel: with tangents the compiler may round a sum differently
        expected = nwfast.nadaraya_watson(query, key, value, w, backend=backend)
    close(out.clone(), expected, 0)
