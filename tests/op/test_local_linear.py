"""Local linear regression against weighted least squares: values, slopes, gradients, rows that determine no line."""

import numpy as np
import pytest
import torch
from oracle import scores, textbook

import nwfast
from nwfast.op import local_linear as operators
from op.test_functional import FORMS, make

NAMES = "query", "key", "value", "w", "key_weight"


def least_squares(query, key, value, w=1.0, key_weight=None, exclude_self=False):
    """(fit, slope) of rows that determine them, in float64 by QR of the design (..., M, N, D + 1); differentiable."""
    weights = torch.softmax(scores(query, key, w, key_weight, exclude_self), -1)
    no_features = query.ndim == 1
    if no_features:
        query, key = (
            (query[:, None], key[:, None]) if key.ndim == 1 else (query[:, None, None], key[..., None])
        )
        value = value if value.ndim == key.ndim and weights.ndim == 2 and key.ndim == 2 else value[..., None]
    elif value.ndim < key.ndim:
        value = value[..., None]
    channels = value.shape[-1]

    def of_rows(tensor):
        n = tensor.shape[-2]
        if not exclude_self:
            return tensor.unsqueeze(-3)
        others = torch.arange(n).repeat(n, 1)[(1 - torch.eye(n)).bool()].reshape(n, n - 1)
        return tensor[..., others, :]

    weights = weights if weights.ndim == query.ndim else weights.unsqueeze(-2)
    root = weights.sqrt().unsqueeze(-1)
    offsets = of_rows(key) - query.unsqueeze(-2)
    middle = (weights.unsqueeze(-1) * offsets).sum(-2, keepdim=True)
    design = torch.cat([torch.ones_like(offsets[..., :1]), offsets - middle], -1)
    target = of_rows(value)
    leading = torch.broadcast_shapes(root.shape[:-1], design.shape[:-1], target.shape[:-1])
    basis, factor = torch.linalg.qr((root * design).expand(*leading, design.shape[-1]))
    found = torch.linalg.solve_triangular(
        factor, basis.mT @ (root * target).expand(*leading, channels), upper=True
    )
    slope = found[..., 1:, :]
    return found[..., 0, :] - (middle @ slope).squeeze(-2), slope.mT


def shaped(result, like):
    return result.reshape(like.shape)


def close(found, right, tolerance, name=""):
    scale = right.abs().amax()
    error = (found.double() - right.double()).abs().amax()
    assert error <= tolerance * scale, f"{name}: {error / scale:.2e}"


def check(shapes, dtype, backend, exclude_self, method="auto", w_scale=4.0):
    """Values and all first derivatives of one form; rows have many keys, so that they determine their slopes."""
    inputs = make(shapes, dtype, w_scale=w_scale)
    wide = [x if x is None else x.double().requires_grad_() for x in inputs]
    leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
    *arguments, key_weight = leaves
    fit, slope = nwfast.local_linear(
        *arguments,
        key_weight=key_weight,
        exclude_self=exclude_self,
        method=method,
        backend=backend,
        return_slope=True,
    )
    right = [shaped(r, f) for r, f in zip(least_squares(*wide, exclude_self), (fit, slope), strict=True)]
    assert fit.dtype == slope.dtype == dtype
    rounding = {torch.float64: 1e-11, torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    close(fit, right[0], rounding, "fit")
    close(slope, right[1], rounding, "slope")
    cotangents = [torch.randn(r.shape).to(dtype) for r in right]
    present = [i for i, x in enumerate(leaves) if x is not None]
    found = torch.autograd.grad([fit, slope], [leaves[i] for i in present], cotangents)
    expected = torch.autograd.grad(right, [wide[i] for i in present], [c.double() for c in cotangents])
    for i, gradient, exact in zip(present, found, expected, strict=True):
        assert gradient.dtype == leaves[i].dtype
        close(gradient, exact, 20 * rounding, NAMES[i])


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, backend):
    *shapes, exclude_self = FORMS[form]
    check(shapes, torch.float64, backend, exclude_self)
    if form in ("1-D, weights", "features, weights, leave-one-out", "heads"):
        check(shapes, torch.float32, backend, exclude_self)


@pytest.mark.parametrize("features", [1, 2, 3, 6])
@pytest.mark.parametrize("exclude_self", [False, True], ids=["all", "leave-one-out"])
def test_features(features, exclude_self, backend):
    n = 90
    shapes = (n, features), (n, features), (n, 2), (features,), (n,)
    check(shapes, torch.float64, backend, exclude_self, w_scale=3.0)
    for dtype in (torch.float16, torch.bfloat16) if backend != "numba" else ():
        *arguments, key_weight = make(shapes, dtype, w_scale=3.0)
        fit = nwfast.local_linear(
            *arguments, key_weight=key_weight, exclude_self=exclude_self, backend=backend
        )
        wide = [x.double() for x in arguments]
        right, _ = least_squares(*wide, key_weight.double(), exclude_self)
        assert fit.dtype == dtype
        close(fit, right, 8e-3)


def fitted(query, key, value, w=1.0, **options):
    return nwfast.local_linear(query, key, value, w, return_slope=True, **options)


@pytest.mark.parametrize("method", ["dense", "fgt"])
@pytest.mark.parametrize("features", [1, 2, 3])
@pytest.mark.parametrize("w", [0.0, 1e-12, 0.3, 5.0, 12.0])
def test_methods(features, w, method, native):
    """Both methods against least squares, where w leaves enough keys to a row; coordinates next to 0 and to 1e6."""
    for origin in (0.0, 1e6):
        key = torch.rand(1500, features, dtype=torch.float64) + origin
        query = 0.1 + 0.8 * torch.rand(60, features, dtype=torch.float64) + origin
        value = torch.randn(1500, 2, dtype=torch.float64) + 3
        fit, slope = fitted(query, key, value, w, method=method, backend=native)
        right = least_squares(query, key, value, w)
        close(fit, right[0], 1e-10, "fit")
        close(slope, right[1], 1e-9, "slope")


def test_a_linear_function_is_reproduced(backend):
    key = torch.rand(200, 2, dtype=torch.float64)
    gradient = torch.tensor([[2.0, -1.0], [0.5, 3.0]], dtype=torch.float64)
    query = 1.4 * torch.rand(30, 2, dtype=torch.float64) - 0.2
    fit, slope = fitted(query, key, key @ gradient.mT + 1, torch.tensor([4.0, 2.0]).double(), backend=backend)
    close(fit, query @ gradient.mT + 1, 1e-10)
    close(slope, gradient.expand(30, 2, 2), 1e-9)


def test_features_of_different_units(backend):
    """Slopes are those of the data in other units: features of 1e-6 and 1e6, w = 0 and narrow bandwidths."""
    unit = torch.tensor([1e-6, 1e6], dtype=torch.float64)
    key, query, value = torch.rand(150, 2).double(), torch.rand(20, 2).double(), torch.randn(150, 1).double()
    for w in (torch.zeros(2).double(), torch.tensor([3.0, 5.0]).double()):
        fit, slope = fitted(query * unit, key * unit, value, w / unit, backend=backend)
        right = least_squares(query, key, value, w)
        close(fit, right[0], 1e-9)
        close(slope * unit, right[1], 1e-8)


def least_norm(query, key, value, w, key_weight=None):
    """(fit, slope) of least norm in bandwidths, row by row by singular values."""
    results = []
    for row in query.numpy():
        offsets = (key.numpy() - row) * w
        exponents = -(offsets**2).sum(1) / 2
        weights = np.exp(exponents - exponents.max())
        weights = (weights if key_weight is None else weights * key_weight.numpy()) / weights.sum()
        weights /= weights.sum()
        mean = weights @ value.numpy()
        middle = weights @ offsets
        root = np.sqrt(weights)[:, None]
        slope = np.linalg.lstsq(root * (offsets - middle), root * (value.numpy() - mean), rcond=1e-9)[0]
        results.append((mean - middle @ slope, w * slope.T))
    return [torch.from_numpy(np.array(part)) for part in zip(*results, strict=True)]


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("exponent", [-1015, -600, -250, 250, 600, 1015])
def test_coordinates_whose_squares_are_no_numbers(features, exponent, backend):
    """In another unit slopes and derivatives have another, and fits are the same, also beside one outlying query."""
    generator = torch.Generator().manual_seed(exponent)
    query = torch.rand(7, features, dtype=torch.float64, generator=generator)
    key = torch.rand(60, features, dtype=torch.float64, generator=generator)
    value = torch.sin(4 * key.sum(-1, keepdim=True))
    unit = torch.full((features,), 2.0**exponent, dtype=torch.float64)
    unit[1:2] = 1.0  # a unit for each feature

    def run(unit):
        leaves = [(query * unit), (key * unit), value.clone(), 5.0 / unit]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        fit, slope = nwfast.local_linear(*leaves, return_slope=True, backend=backend, method="dense")
        by_query, by_key, by_value, by_w = torch.autograd.grad(fit.sum(), leaves)
        return fit, slope * unit, by_query * unit, by_key * unit, by_value, by_w / unit

    for found, right in zip(run(unit), run(torch.ones(features, dtype=torch.float64)), strict=True):
        close(found, right, 1e-9)
    far = torch.cat([query * unit, torch.full((1, features), 1e300, dtype=torch.float64)])
    with_far = nwfast.local_linear(far, key * unit, value, 5.0 / unit, backend=backend)
    close(with_far[:-1], run(unit)[0], 1e-12)


def test_units_in_a_compiled_call(native):
    key = torch.rand(50, dtype=torch.float64) * 2.0**700
    value, w = torch.rand(50, dtype=torch.float64), torch.tensor(2.0**-697, dtype=torch.float64)
    compiled = torch.compile(nwfast.local_linear, fullgraph=True, backend="aot_eager")
    close(compiled(key, key, value, w), nwfast.local_linear(key, key, value, w), 1e-12)
    batched = torch.func.vmap(nwfast.local_linear, (None, None, None, 0))(key, key, value, w.repeat(2))
    close(batched[1], nwfast.local_linear(key, key, value, w), 1e-9)


@pytest.mark.parametrize("features", [2, 3])
def test_collinear_keys_take_the_slope_of_least_norm(features, backend):
    along = torch.randn(120, 1, dtype=torch.float64)
    direction = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)[:features]
    key, value = along * direction, torch.sin(along) + 0.1 * torch.randn(120, 2, dtype=torch.float64)
    query = torch.randn(25, features, dtype=torch.float64)
    found = fitted(query, key, value, 0.8, backend=backend)
    right = least_norm(query, key, value, 0.8)
    close(found[0], right[0], 1e-8)
    close(found[1], right[1], 1e-8)


def test_a_feature_that_is_constant_has_no_slope(backend):
    key = torch.cat([torch.rand(80, 1), torch.full((80, 1), 0.3)], 1).double()
    query, value = torch.rand(20, 2).double(), torch.randn(80).double()
    fit, slope = fitted(query, key, value, 2.0, backend=backend)
    weight = torch.ones(80).double()
    right = least_squares(query[:, :1], key[:, :1], value[:, None], 2.0, weight)
    close(fit, right[0][:, 0], 1e-9)
    close(slope[:, 0], right[1][:, 0, 0], 1e-9)
    assert (slope[:, 1].abs() < 1e-9).all()


def test_few_points(backend):
    """One key, coincident keys, two keys in two features, keys of no weight."""
    query = torch.tensor([[0.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    one = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    for key in (one, one.expand(4, 2)):
        value = torch.arange(1.0, 1 + len(key)).double()
        fit, slope = fitted(query, key, value, 1.5, backend=backend)
        torch.testing.assert_close(fit, value.mean().expand(2))
        assert (slope == 0).all()
    key = torch.tensor([[0.0, 0.0], [1.0, 1.0], [torch.nan, 7.0]], dtype=torch.float64)
    value, weight = torch.tensor([1.0, 3.0, torch.nan]).double(), torch.tensor([1.0, 2.0, 0.0]).double()
    fit, slope = fitted(query, key, value, 1.0, key_weight=weight, backend=backend)
    torch.testing.assert_close(slope, torch.ones(2, 2).double())
    torch.testing.assert_close(fit, torch.tensor([1.0, 5.0]).double())
    fit, slope = fitted(query, key[:2], value[:2], 1.0, key_weight=weight[2:].expand(2), backend=backend)
    assert fit.isnan().all()
    assert slope.isnan().all()


def test_far_queries_take_the_value_of_the_nearest_key(backend):
    """And those between: never NaN, and no noise."""
    key = torch.linspace(0, 1, 40, dtype=torch.float64)
    value = torch.sin(7 * key)
    query = torch.tensor([-1e5, -300.0, 300.0, 1e5], dtype=torch.float64)
    fit = nwfast.local_linear(query, key, value, 1000.0, backend=backend)
    torch.testing.assert_close(fit, nwfast.nadaraya_watson(query, key, value, 1000.0, backend=backend))
    near = torch.linspace(-0.5, 1.5, 200, dtype=torch.float64)
    fit, slope = fitted(near, key, value, 40.0, backend=backend)
    assert fit.isfinite().all()
    assert slope.abs().amax() < 20  # 7 is the steepest that a smooth fit has


def test_rows_of_odd_numbers(backend):
    key, value = torch.rand(50, 2).double(), torch.randn(50).double()
    query = torch.rand(6, 2).double()
    query[1, 0], query[2, 1] = torch.nan, torch.inf
    fit, slope = fitted(query, key, value, 3.0, backend=backend)
    right = nwfast.nadaraya_watson(query, key, value, 3.0, backend=backend)
    assert torch.equal(fit.isnan(), right.isnan())
    assert torch.equal(slope.isnan().any(-1), right.isnan())
    whole = fitted(query[[0, 3, 4, 5]], key, value, 3.0, backend=backend)[0]
    torch.testing.assert_close(fit[[0, 3, 4, 5]], whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("features", [1, 2])
def test_gradcheck(features, backend):
    n = 9
    inputs = make(((5, features), (n, features), (n, 2), (features,), (n,)), torch.float64, w_scale=1.5)
    leaves = [x.requires_grad_() for x in inputs]

    def function(query, key, value, w, key_weight):
        return nwfast.local_linear(
            query, key, value, w, key_weight=key_weight, backend=backend, return_slope=True
        )

    assert torch.autograd.gradcheck(function, leaves)
    if backend == "native":  # by the reference, whatever the backend
        assert torch.autograd.gradgradcheck(function, leaves, atol=1e-4, fast_mode=True)


def test_rows_left_out_and_rows_of_no_cotangent_add_nothing(backend):
    inputs = make(((12, 2), (12, 2), (12, 1), (1,), (12,)), torch.float64, w_scale=2.0)
    query, *rest, weight = inputs
    query[3] = torch.nan
    leaves = [x.requires_grad_() for x in (query, *rest, weight)]
    fit = nwfast.local_linear(*leaves[:4], key_weight=leaves[4], backend=backend)
    assert fit[3].isnan().all()
    found = torch.autograd.grad(fit[[0, 1, 2]].sum(), leaves)
    again = [x.detach().requires_grad_() for x in (leaves[0][:3], *leaves[1:])]
    expected = torch.autograd.grad(
        nwfast.local_linear(*again[:4], key_weight=again[4], backend=backend).sum(), again
    )
    close(found[0][:3], expected[0], 1e-10)
    for one, other in zip(found[1:], expected[1:], strict=True):
        close(one, other, 1e-10)


def test_gradients_in_linear_time(native):
    """method="fgt" gives the gradients of the dense method, in boxes too."""
    for features in (1, 2, 3):
        inputs = make(
            ((3000, features), (3000, features), (3000,), (1,), (3000,)), torch.float64, w_scale=8.0
        )
        cotangent = torch.randn(3000, dtype=torch.float64)
        gradients = []
        for method in ("fgt", "dense"):
            leaves = [x.clone().requires_grad_() for x in inputs]
            fit = nwfast.local_linear(*leaves[:4], key_weight=leaves[4], method=method, backend=native)
            gradients.append(torch.autograd.grad(fit, leaves, cotangent))
        for name, one, other in zip(NAMES, *gradients, strict=True):
            close(one, other, 1e-8, name)


def test_gradients_of_keys_over_many_bandwidths(native, monkeypatch):
    """Beyond MOST_EXTENT the dense formula serves, or refuses; the gradient of value is a sum of its own."""
    inputs = make(((40, 1), (400, 1), (400, 1), (1,), (400,)), torch.float64, w_scale=20.0)
    gradients = []
    for most in (operators.MOST_EXTENT, 1.0):
        monkeypatch.setattr(operators, "MOST_EXTENT", most)
        leaves = [x.clone().requires_grad_() for x in inputs]
        fit, slope = fitted(*leaves[:4], key_weight=leaves[4], backend=native)
        gradients.append(torch.autograd.grad(fit.sum() + slope.square().sum(), leaves))
    for name, one, other in zip(NAMES, *gradients, strict=True):
        close(one, other, 1e-9, name)
    monkeypatch.setattr(operators.by_reference, "_free_memory", lambda device: 1000)
    value = inputs[2].clone().requires_grad_()
    torch.autograd.grad(nwfast.local_linear(*inputs[:2], value, inputs[3], backend=native).sum(), value)
    w = inputs[3].clone().requires_grad_()
    fit = nwfast.local_linear(*inputs[:3], w, backend=native)
    with pytest.raises(RuntimeError, match="builds \\(M, N\\) matrices"):
        fit.sum().backward()


@pytest.mark.parametrize("features", [1, 2, 4])
def test_rows_are_solved_in_parts(features, backend, monkeypatch):
    """Those that determine no plane among them: the parts change nothing, the last short one included."""
    query, key, value, w, _ = make(
        ((2, 20, features), (2, 30, features), (2, 30, 2), (1,), None), torch.float64, w_scale=2.0
    )
    query[:, 5:9] += 40.0
    whole = fitted(query, key, value, w, backend=backend)
    monkeypatch.setattr(operators, "_ROWS", 7)
    for one, other in zip(fitted(query, key, value, w, backend=backend), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_transforms(native):
    """torch.func, forward mode and torch.compile give what the op gives."""
    query, key, value, w, _ = make(((6, 2), (30, 2), (30, 1), (2,), None), torch.float64, w_scale=2.0)

    def loss(w):
        return nwfast.local_linear(query, key, value, w).square().sum()

    leaf = w.clone().requires_grad_()
    (right,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(w), right)
    _, tangent = torch.func.jvp(loss, (w,), (torch.ones_like(w),))
    torch.testing.assert_close(tangent, right.sum())
    several = torch.stack([w, 2 * w])
    mapped = torch.vmap(lambda w: nwfast.local_linear(query, key, value, w))(several)
    torch.testing.assert_close(mapped[1], nwfast.local_linear(query, key, value, 2 * w))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = w.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], right)


def test_it_refuses_what_nadaraya_watson_refuses():
    x = torch.rand(5)
    with pytest.raises(ValueError, match="method must be"):
        nwfast.local_linear(x, x, x, method="fast")
    with pytest.raises(ValueError, match="value must have one row a key"):
        nwfast.local_linear(x, x, x[:4])
    with pytest.raises(TypeError, match="query must be a torch"):
        nwfast.local_linear(3.0, x, x)
    with pytest.raises(ValueError, match="backend must be"):
        nwfast.local_linear(x, x, x, backend="gpu")
    with pytest.raises(ValueError, match="D = 4 features"):
        nwfast.local_linear(torch.rand(5, 4), torch.rand(5, 4), x, method="fgt")


def test_no_queries_and_shapes(backend):
    key, value = torch.rand(7, 3), torch.rand(7, 2)
    fit, slope = fitted(torch.rand(0, 3), key, value, backend=backend)
    assert fit.shape == (0, 2)
    assert slope.shape == (0, 2, 3)
    fit, slope = fitted(torch.rand(4, 3), key, value[:, 0], backend=backend)
    assert fit.shape == (4,)
    assert slope.shape == (4, 3)
    fit, slope = fitted(torch.rand(4), key[:, 0], value, backend=backend)
    assert fit.shape == slope.shape == (4, 2)


def test_thread_count_does_not_change_a_bit(native):
    query, key, value = torch.rand(5000, 2), torch.rand(5000, 2), torch.randn(5000)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(fitted(query, key, value, 30.0, backend=native))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_textbook_is_the_other_degree():
    """Without a slope it would be Nadaraya-Watson: the two differ where the data is not symmetric about a query."""
    query, key, value = torch.tensor([1.0]).double(), torch.rand(50).double(), torch.rand(50).double()
    constant = textbook(query, key, value, 2.0)[0]
    fit, slope = fitted(query, key, value, 2.0)
    middle = nwfast.nadaraya_watson(query, key, key, 2.0)
    torch.testing.assert_close(fit, constant - (middle - query) * slope)
