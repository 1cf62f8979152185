"""nwfast.leave_one_out_loss: the textbook's residuals, weighted, with all derivatives, on every backend."""

import pytest
import torch

import nwfast

DTYPES = [torch.float32, torch.float64]


def textbook(x, y, w, weight=None, reduction="mean"):
    """The loss by the matrix without its diagonal; x (N, D), y (N, C)."""
    n = len(x)
    weight = x.new_ones(n) if weight is None else weight
    scores = -(((x[:, None] - x[None]) * w) ** 2).sum(-1) / 2
    others = ~torch.eye(n, dtype=torch.bool, device=x.device)
    scores = scores[others].reshape(n, n - 1)
    shares = weight.expand(n, n)[others].reshape(n, n - 1) * (scores - scores.amax(1, keepdim=True)).exp()
    values = y.expand(n, *y.shape)[others].reshape(n, n - 1, y.shape[-1])
    fitted = (shares[..., None] * values).sum(1) / shares.sum(1, keepdim=True)
    terms = weight[:, None] * (fitted - y) ** 2
    if reduction == "none":
        return terms
    return terms.sum() / (weight.sum() * y.shape[-1] if reduction == "mean" else 1)


def draw(features, channels, weighted, n=40):
    """Weights that are neither uniform nor one-hot: bandwidths of about a tenth of the range and more."""
    x, y = torch.rand(n, features, dtype=torch.float64), torch.randn(n, channels, dtype=torch.float64)
    w = torch.linspace(4.0, 6.0, features, dtype=torch.float64)
    return x, y, w, torch.rand(n, dtype=torch.float64) + 0.5 if weighted else None


def assert_near(ours, exact, dtype):
    """Sums of some 40 terms of size 1: a budget by the largest of what is compared and 1."""
    assert ours.dtype == dtype
    error = (ours.double() - exact.reshape(ours.shape)).abs().max()
    assert error <= (2e-5 if dtype == torch.float32 else 1e-12) * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(("features", "channels"), [(1, 1), (1, 2), (2, 1)])
def test_is_the_textbook(backend, features, channels, weighted, reduction, dtype):
    """Values and all gradients; of w alone too, which is the way of the one operator."""
    data = draw(features, channels, weighted)
    data = [None if tensor is None else tensor.to(dtype) for tensor in data]
    exact = [None if tensor is None else tensor.double().clone().requires_grad_() for tensor in data]
    expected = textbook(*exact, reduction)
    present = [tensor for tensor in exact if tensor is not None]
    cotangent = torch.rand_like(expected)
    gradients = torch.autograd.grad(expected, present, cotangent)
    for alone in (True, False):
        ours = [
            None if tensor is None else tensor.clone().requires_grad_(not alone or place == 2)
            for place, tensor in enumerate(data)
        ]
        x, y, w, weight = ours
        loss = nwfast.leave_one_out_loss(
            x[:, 0] if features == 1 else x,
            y[:, 0] if channels == 1 else y,
            w,
            key_weight=weight,
            reduction=reduction,
            backend=backend,
        )
        assert_near(loss, expected.detach(), dtype)
        wanted = [(t, g) for t, g in zip([t for t in ours if t is not None], gradients, strict=True)]
        wanted = [pair for pair in wanted if pair[0].requires_grad]
        found = torch.autograd.grad(loss, [t for t, _ in wanted], cotangent.reshape(loss.shape).to(dtype))
        for gradient, (_, right) in zip(found, wanted, strict=True):
            assert_near(gradient, right, dtype)


@pytest.mark.parametrize("method", ["dense", "fgt"])
def test_methods_and_large_data(native, method):
    """One operator and the general formula agree where the linear method has boxes."""
    x, y = torch.rand(5000, dtype=torch.float64), torch.randn(5000, dtype=torch.float64)
    w = torch.tensor([30.0], dtype=torch.float64, requires_grad=True)
    one = nwfast.leave_one_out_loss(x, y, w, method=method, backend=native)
    assert one.grad_fn.name() == "_OfWBackward"
    other = (nwfast.nadaraya_watson(x, x, y, w, exclude_self=True, method=method) - y).square().mean()
    torch.testing.assert_close(one, other, rtol=1e-11, atol=0)
    gradients = [torch.autograd.grad(loss, w)[0] for loss in (one, other)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("method", ["dense", "fgt", "auto"])
@pytest.mark.parametrize("features", [2, 3, 5])
def test_several_features_are_one_operator_too(native, features, method, weighted, dtype):
    if method == "fgt" and features > 3:
        method = "auto"
    x, y = torch.rand(3000, features, dtype=dtype), torch.randn(3000, 1, dtype=dtype)
    x[:5] += 3  # with others far away alone
    weight = torch.rand(3000, dtype=dtype) if weighted else None
    if weighted:
        weight[::7] = 0
        x[7] = torch.nan
    for w in (torch.linspace(5, 9, features, dtype=dtype), torch.tensor(6.0, dtype=dtype)):
        w.requires_grad_()
        for reduction in ("mean", "sum"):
            options = dict(key_weight=weight, reduction=reduction, method=method, backend=native)
            one = nwfast.leave_one_out_loss(x, y, w, **options)
            assert one.grad_fn.name() == "_OfWBackward"
            alone = nwfast.leave_one_out_loss(x, y[:, 0], w.detach(), **options)
            torch.testing.assert_close(
                alone, one.detach(), rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0
            )
            exact = w.detach().double().requires_grad_()
            options["key_weight"] = None if weight is None else weight.double()
            other = nwfast.leave_one_out_loss(x.double(), y.double().expand(-1, 2), exact, **options) / (
                1 if reduction == "mean" else 2
            )
            bound = 2e-6 if dtype == torch.float32 else 1e-11
            torch.testing.assert_close(one.double(), other, rtol=bound, atol=0)
            ours, right = torch.autograd.grad(one, w)[0], torch.autograd.grad(other, exact)[0]
            assert ours.dtype == dtype and ours.shape == w.shape
            scale = other.detach() / exact.detach().min()  # of the terms of the sum
            assert (ours - right).abs().max() <= 10 * bound * scale


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_examples_of_weight_0_are_as_if_not_there(backend, reduction):
    x, y, w, weight = draw(1, 1, True)
    x, y = x[:, 0], y[:, 0]
    weight[::3] = 0
    kept = weight > 0
    y[0], x[3] = torch.nan, torch.nan
    w.requires_grad_()
    ours = nwfast.leave_one_out_loss(x, y, w, key_weight=weight, reduction=reduction, backend=backend)
    right = nwfast.leave_one_out_loss(
        x[kept], y[kept], w, key_weight=weight[kept], reduction=reduction, backend=backend
    )
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        *[torch.autograd.grad(loss, w)[0] for loss in (ours, right)], rtol=1e-10, atol=1e-12
    )


def test_rows_without_others_are_left_out(backend):
    """One example that counts: no residual, a mean of nothing; no gradient of either."""
    w = torch.ones(1, requires_grad=True)
    for x, weight in ((torch.rand(1), None), (torch.rand(3), torch.tensor([0.0, 2.0, 0.0]))):
        y = torch.rand_like(x)
        total = nwfast.leave_one_out_loss(x, y, w, key_weight=weight, reduction="sum", backend=backend)
        mean = nwfast.leave_one_out_loss(x, y, w, key_weight=weight, backend=backend)
        assert total.item() == 0 and mean.isnan()
        for loss in (total, mean):
            assert torch.autograd.grad(loss, w)[0].item() == 0


def test_nan_reaches_the_loss(backend):
    x, y = torch.rand(5), torch.rand(5)
    y[2] = torch.nan
    assert nwfast.leave_one_out_loss(x, y, 2.0, backend=backend).isnan()
    assert nwfast.leave_one_out_loss(x, torch.rand(5), torch.tensor([torch.nan]), backend=backend).isnan()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_derivatives(backend, weighted):
    x, y, w, weight = draw(1, 1, weighted, n=6)
    inputs = [w.requires_grad_()]
    if backend == "native":
        assert (
            nwfast.leave_one_out_loss(x[:, 0], y[:, 0], w, key_weight=weight).grad_fn.name() == "_OfWBackward"
        )

    def loss(w):
        return nwfast.leave_one_out_loss(x[:, 0], y[:, 0], w, key_weight=weight, backend=backend)

    assert torch.autograd.gradcheck(loss, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_transforms(backend):
    x, y, w, _ = draw(1, 1, False)
    x, y = x[:, 0], y[:, 0]

    def loss(w):
        return nwfast.leave_one_out_loss(x, y, w, backend=backend)

    many = torch.tensor([[1.0], [5.0], [20.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(loss)(many), torch.stack([loss(w) for w in many]))
    leaf = w.clone().requires_grad_()
    (right,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(w), right)


def test_compiles(native):
    x, y, w, _ = draw(1, 1, False)
    w.requires_grad_()

    def loss(x, y, w):
        return nwfast.leave_one_out_loss(x, y, w, backend=native)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, right = compiled(x[:, 0], y[:, 0], w), loss(x[:, 0], y[:, 0], w)
    torch.testing.assert_close(ours, right)
    torch.testing.assert_close(*[torch.autograd.grad(one, w)[0] for one in (ours, right)])


def lines(x, y, w, weight=None, reduction="mean"):
    """The loss of degree 1: for each row a weighted least-squares line through all others, by the normal equations."""
    n = len(x)
    weight = x.new_ones(n) if weight is None else weight
    scores = -(((x[:, None] - x[None]) * w) ** 2).sum(-1) / 2
    shares = weight * scores.exp() * (1 - torch.eye(n, dtype=x.dtype))
    design = torch.cat([x.new_ones(n, n, 1), x[None] - x[:, None]], -1)  # (rows, examples, 1 + D)
    left = torch.einsum("ij,ija,ijb->iab", shares, design, design)
    right = torch.einsum("ij,ija,jc->iac", shares, design, y)
    terms = weight[:, None] * (torch.linalg.solve(left, right)[:, 0] - y) ** 2
    if reduction == "none":
        return terms
    return terms.sum() / (weight.sum() * y.shape[-1] if reduction == "mean" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(("features", "channels"), [(1, 1), (1, 2), (2, 1)])
def test_lines_through_the_others(backend, features, channels, weighted, reduction, dtype):
    data = [None if one is None else one.to(dtype) for one in draw(features, channels, weighted)]
    exact = [None if one is None else one.double().clone().requires_grad_() for one in data]
    expected = lines(*exact, reduction)
    present = [one for one in exact if one is not None]
    cotangent = torch.rand_like(expected)
    gradients = torch.autograd.grad(expected, present, cotangent)
    x, y, w, weight = leaves = [None if one is None else one.clone().requires_grad_() for one in data]
    one_column = features == channels == 1
    loss = nwfast.leave_one_out_loss(
        x[:, 0] if one_column else x,
        y[:, 0] if one_column else y,
        w,
        key_weight=weight,
        degree=1,
        reduction=reduction,
        backend=backend,
    )
    assert_near(loss, expected, dtype)
    found = torch.autograd.grad(
        loss, [one for one in leaves if one is not None], cotangent.to(dtype).reshape(loss.shape)
    )
    for ours, right in zip(found, gradients, strict=True):
        # Rows at the ends see few others: their lines multiply errors.
        error = (ours.double() - right.reshape(ours.shape)).abs().max()
        assert error <= (1e-4 if dtype == torch.float32 else 1e-9) * right.abs().max().clamp(min=1)


def test_lines_where_there_are_none(backend):
    """Exact for points on a line; others that coincide, a single one or none: the local average, or nothing."""
    x = torch.rand(60, dtype=torch.float64)
    assert nwfast.leave_one_out_loss(x, 3 * x - 1, 8.0, degree=1, backend=backend) < 1e-20
    y = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for place, n in ((torch.ones(3), 3), (torch.tensor([0.0, 1.0, 1.0]), 2), (torch.zeros(3), 1)):
        loss, averages = (
            nwfast.leave_one_out_loss(
                place[:n].double(), y[:n], w, degree=degree, reduction="sum", backend=backend
            )
            for degree in (1, 0)
        )
        torch.testing.assert_close(loss, averages)
        assert torch.autograd.grad(loss, w)[0].isfinite()
    weight = torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    for reduction in ("sum", "mean"):
        loss = nwfast.leave_one_out_loss(
            torch.rand(3).double(), y, w, key_weight=weight, degree=1, reduction=reduction, backend=backend
        )
        assert loss.item() == 0 if reduction == "sum" else loss.isnan()
        assert torch.autograd.grad(loss, w)[0].item() == 0


@pytest.mark.parametrize("degree", [0, 1])
def test_module(backend, degree):
    x, y, _, _ = draw(1, 1, False)
    x, y = x[:, 0], y[:, 0]
    net = nwfast.NWKernelRegression(w=5.0, dtype=torch.float64, backend=backend)
    ours = net.leave_one_out_loss(x, y, degree=degree, reduction="sum")
    if degree == 0:
        torch.testing.assert_close(ours, (net(x, x, y, exclude_self=True) - y).square().sum())
    else:
        torch.testing.assert_close(ours, lines(x[:, None], y[:, None], net.w.detach(), None, "sum"))
    ours.backward()
    assert net.w.grad.shape == (1,)


def test_refuses():
    x = torch.rand(4)
    for arguments, match in (
        ({"degree": 2}, "degree must be 0 or 1"),
        ({"degree": -1}, "degree must be 0 or 1"),
        ({"reduction": "max"}, "reduction"),
        ({"method": "?"}, "method"),
    ):
        with pytest.raises(ValueError, match=match):
            nwfast.leave_one_out_loss(x, x, **arguments)
    with pytest.raises(ValueError, match="value must have one row a key"):
        nwfast.leave_one_out_loss(x, torch.rand(3))
    with pytest.raises(TypeError, match="value must have the dtype"):
        nwfast.leave_one_out_loss(x, x.double())
