"""Keys that are left out do not matter, whatever they hold; nor do rows whose results nobody uses."""

import math

import numpy as np
import pytest
import torch

import nwfast

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# Leading dimensions, D and C; by every method that the backend has for so many features.
FORMS = pytest.mark.parametrize(
    ("batch", "features", "channels"),
    [((), 1, 1), ((3,), 1, 1), ((), 1, 12), ((), 2, 1), ((2,), 3, 4), ((), 20, 1)],
    ids=str,
)
HELD = (math.nan, math.inf, -math.inf, 1e30)
M, N = 30, 40


def methods(backend, features):
    most = nwfast.backends.FGT_FEATURES.get(backend, 0)
    return ("dense", "fgt") if features <= most else ("dense",)


def draw(batch, features, channels, dtype):
    """Query, key, value, w and key weights, two in five of them 0."""
    query = torch.rand(*batch, M, features, dtype=dtype)
    key, value = torch.rand(*batch, N, features, dtype=dtype), torch.randn(*batch, N, channels, dtype=dtype)
    weight = torch.rand(*batch, N, dtype=dtype) + 0.5
    weight[torch.rand(*batch, N) < 0.4] = 0
    weight[..., 0] = 0  # the first key, and a run at the end as in padded batches
    weight[..., -5:] = 0
    weight[..., 1] = 1
    return query, key, value, torch.tensor(3.0, dtype=dtype), weight


def results(inputs, grad_out, grad_lse=None, **options):
    """Out, lse and the gradients of query, key, value, w and key_weight."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out, lse = nwfast.nadaraya_watson(*leaves[:4], key_weight=leaves[4], return_lse=True, **options)
    loss = (out * grad_out).sum() + (0 if grad_lse is None else (lse * grad_lse).sum())
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def spoil(tensor, left_out):
    """A copy in which some of the left-out rows hold what must not matter, in one place or in all of them."""
    tensor = tensor.clone()
    for place, held in enumerate(HELD):
        chosen = left_out & (torch.rand(left_out.shape) < 0.4)
        tensor[..., :1][chosen] = held
        if place % 2:
            tensor[chosen] = held
    return tensor


@DTYPES
@FORMS
@pytest.mark.parametrize("with_lse", [False, True])
def test_what_keys_of_weight_zero_hold(backend, batch, features, channels, with_lse, dtype):
    """To the bit, in results and gradients; their own gradients are 0, that of the weight where it is not defined."""
    query, key, value, w, weight = draw(batch, features, channels, dtype)
    left_out = weight == 0
    grad_out = torch.randn(*batch, M, channels, dtype=dtype)
    grad_lse = torch.randn(*batch, M, dtype=dtype) if with_lse else None
    spoilt_key, spoilt_value = spoil(key, left_out), spoil(value, left_out)
    spoilt = ~(spoilt_key.isfinite().all(-1) & spoilt_value.isfinite().all(-1))
    for method in methods(backend, features):
        options = {"backend": backend, "method": method}
        clean = results((query, key, value, w, weight), grad_out, grad_lse, **options)
        found = results((query, spoilt_key, spoilt_value, w, weight), grad_out, grad_lse, **options)
        for name, a, b in zip(("out", "lse", "query", "key", "value", "w"), clean, found, strict=False):
            assert a.isfinite().all() and torch.equal(a, b), (method, name)
        assert not found[3][left_out].any() and not found[4][left_out].any()
        assert torch.equal(found[6][~left_out], clean[6][~left_out])
        assert found[6].isfinite().all() and not found[6][spoilt].any()


@DTYPES
@FORMS
def test_keys_of_weight_zero_are_as_if_absent(backend, batch, features, channels, dtype):
    query, key, value, w, weight = draw((), features, channels, dtype)
    kept = weight != 0
    for method in methods(backend, features):
        options = {"backend": backend, "method": method}
        grad_out = torch.randn(M, channels, dtype=dtype)
        found = results((query, spoil(key, ~kept), spoil(value, ~kept), w, weight), grad_out, **options)
        right = results((query, key[kept], value[kept], w, weight[kept]), grad_out, **options)
        for place in (3, 4, 6):
            found[place] = found[place][kept]
        for name, a, b in zip(("out", "lse", "q", "k", "v", "w", "weight"), found, right, strict=True):
            scale = float(b.abs().max()) + 1
            torch.testing.assert_close(a, b, rtol=0, atol=64 * torch.finfo(dtype).eps * scale, msg=name)


@DTYPES
@pytest.mark.parametrize("held", HELD[:3])
@pytest.mark.parametrize("features", [1, 2])
def test_weights_of_broken_keys_beside_one_that_counts(backend, features, held, dtype):
    """Rows are NaN by a key that counts: the weight of 0 of another broken key has the gradient 0 all the same."""
    query, key, value, w, weight = draw((), features, 1, dtype)
    key[1], key[0], value[-1] = math.nan, held, held
    weight.requires_grad_()
    out = nwfast.nadaraya_watson(query, key, value, w, key_weight=weight, backend=backend)
    assert out.isnan().all()
    (found,) = torch.autograd.grad(out.sum(), weight)
    assert (found[[0, -1]] == 0).all()


@DTYPES
@pytest.mark.parametrize("features", [1, 2])
def test_the_gradient_of_a_weight_of_zero(backend, features, dtype):
    """It is the true one: what the key would do if it counted a little; finite where it would be beyond the dtype."""
    inside = torch.linspace(0, 1, 300, dtype=torch.float64)
    for place, w in ((-2.0, 1.0), (0.5, 30.0), (-0.5, 8.0), (3.0, 2.0)):
        key = torch.cat([inside, torch.tensor([place], dtype=torch.float64)])[:, None].expand(-1, features)
        value = torch.cat([torch.sin(5 * inside), torch.tensor([2.0], dtype=torch.float64)])
        query, weight = torch.linspace(-0.2, 1, 50, dtype=torch.float64)[:, None].expand(-1, features), None
        weight = torch.ones(301, dtype=torch.float64)
        weight[-1] = 0
        scores = -((query[:, None] - key) ** 2).sum(-1) * w**2 / 2
        p = (scores - torch.logsumexp(scores[:, :-1], -1, keepdim=True)).exp()
        out = p[:, :-1] @ value[:-1]
        terms = p * (value - out[:, None])
        for method in methods(backend, features):
            leaf = weight.to(dtype).requires_grad_()
            inputs = (tensor.to(dtype) for tensor in (query, key, value))
            fitted = nwfast.nadaraya_watson(*inputs, w, key_weight=leaf, backend=backend, method=method)
            (found,) = torch.autograd.grad(fitted.sum(), leaf)
            error = (found.double() - terms.sum(0)).abs()
            assert (error <= 256 * torch.finfo(dtype).eps * (terms.abs().sum(0) + 1e-3)).all(), (
                place,
                method,
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [1, 2])
def test_gradients_of_shared_weights_of_zero_stay_finite(backend, features, dtype):
    """Beyond the dtype in several elements of a batch, with both signs: their sum is no NaN, and no inf."""
    query, key = torch.zeros(6, 3, features, dtype=dtype), torch.zeros(6, 2, features, dtype=dtype)
    key[:, 0] = 3e3
    value = torch.tensor([0.0, 1.0], dtype=dtype) * torch.tensor([[1.0, 1, -1, 1, -1, -1]], dtype=dtype).T
    for chosen, sign in (([0, 1, 2, 3, 4, 5], 0), ([0, 1, 3], 1), ([2, 4, 5], -1), ([0], 1)):
        for method in methods(backend, features):
            weight = torch.tensor([1.0, 0.0], dtype=dtype, requires_grad=True)
            inputs = query[chosen], key[chosen], value[chosen], torch.tensor(2.0, dtype=dtype)
            out = nwfast.nadaraya_watson(*inputs, key_weight=weight, backend=backend, method=method)
            (found,) = torch.autograd.grad(out.sum(), weight)
            assert found.isfinite().all() and found[0] == 0, (chosen, method)
            assert sign * found[1] > 0 or sign == 0, (chosen, method)


@DTYPES
@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("apart", [13.0, 60.0, 1e4, 1e9])
def test_a_key_of_weight_zero_nearer_than_all_others(backend, features, apart, dtype):
    """No product of 0 and an overflow: not in gradients of w, query, key and value, nor in that of key_weight."""
    key = torch.tensor([0.0, apart, apart * 1.01], dtype=dtype)[:, None].expand(-1, features)
    value = torch.tensor([3.0, 1.0, 2.0], dtype=dtype)[:, None]
    query, weight = torch.zeros(1, features, dtype=dtype), torch.tensor([0.0, 1.0, 1.0], dtype=dtype)
    w = torch.tensor(1.0, dtype=dtype)
    grad = torch.ones(1, 1, dtype=dtype)
    for method in methods(backend, features):
        options = {"backend": backend, "method": method}
        found = results((query, key, value, w, weight), grad, grad[:, 0], **options)
        right = results((query, key[1:], value[1:], w, weight[1:]), grad, grad[:, 0], **options)
        assert all(result.isfinite().all() for result in found), method
        assert not found[3][0].any() and not found[4][0].any()
        for place in (3, 4, 6):
            found[place] = found[place][1:]
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=64 * torch.finfo(dtype).eps, atol=0)


# The weights of the keys that count, the exponent of 10 of exp(score) of the left-out one, and the cotangent.
STEEP = [
    (1.0, 305, 10.0),
    (1.0, 310, 1e-3),
    (1.0, 330, 1e-23),
    (1e-310, 0, 1e-3),
    (1e-310, 10, 1e-13),
    (1.0, 330, 1.0),
]


@pytest.mark.parametrize(("weight", "steepness", "cotangent"), STEEP)
@pytest.mark.parametrize("features", [1, 2])
def test_the_gradient_of_a_weight_of_zero_up_to_the_largest_number(
    backend, features, weight, steepness, cotangent
):
    """In float64, whether its factors alone overflow or not; beyond the largest number that number stands."""
    apart = math.sqrt(2 * math.log(10) * steepness / features)
    key = torch.tensor([0.0, apart, apart], dtype=torch.float64)[:, None].expand(-1, features)
    query, grad = torch.zeros(1, features).double(), torch.tensor([[cotangent]], dtype=torch.float64)
    for held in (3.0, -1.0):
        value = torch.tensor([[held], [1.0], [1.0]], dtype=torch.float64)
        for method in methods(backend, features):
            leaf = torch.tensor([0.0, weight, weight], dtype=torch.float64, requires_grad=True)
            out = nwfast.nadaraya_watson(
                query, key, value, 1.0, key_weight=leaf, backend=backend, method=method
            )
            (found,) = torch.autograd.grad(out, leaf, grad)
            # Halves of the exponent, since exp(score) itself may be beyond the largest number.
            half = math.exp(math.log(10) * steepness / 2)
            right = half * (cotangent * (held - 1) / 2) * half / weight
            right = min(max(right, -torch.finfo(torch.float64).max), torch.finfo(torch.float64).max)
            assert float(found[0]) == pytest.approx(right, rel=1e-9), method
            assert not found[1:].any(), method


@pytest.mark.parametrize("unit", [2.0**-700, 1e-310, 2.0**-1060])
@pytest.mark.parametrize(("features", "channels"), [(1, 1), (2, 3)])
def test_weights_that_are_all_tiny(backend, features, channels, unit):
    """Down to the last subnormal numbers they give what others give; the gradients of weights are what they must be."""
    query, key, value, w, _ = draw((), features, channels, torch.float64)
    weight = torch.randint(4, 9, (N,)).double() / 4
    weight[::7] = 0
    grad_out, grad_lse = torch.randn(M, channels).double(), torch.randn(M).double()
    for method in methods(backend, features):
        options = {"backend": backend, "method": method}
        right = results((query, key, value, w, weight), grad_out, grad_lse, **options)
        found = results((query, key, value, w, weight * unit), grad_out, grad_lse, **options)
        right[1] = right[1] + math.log(unit)
        for place, (a, b) in enumerate(zip(found[:6], right[:6], strict=True)):
            assert (a - b).abs().max() <= 1e-11 * b.abs().max(), (method, place)
        small = results((query, key, value, w, weight * unit), grad_out * unit, grad_lse * unit, **options)[6]
        assert (small - right[6]).abs().max() <= 1e-3 * right[6].abs().max(), method


@pytest.mark.parametrize("features", [1, 2])
def test_batch_elements_of_tiny_weights_beside_others(backend, features):
    """Each has its own unit, and shared weights of zero keep finite gradients in any of them."""
    query, key, value, w, weight = draw((3,), features, 1, torch.float64)
    unit = torch.tensor([1.0, 2.0**-1060, 2.0**-960], dtype=torch.float64)[:, None]
    weight = torch.where(weight == 0, 0.0, (4 * weight).ceil())
    grad_out, grad_lse = torch.randn(3, M, 1).double(), torch.randn(3, M).double()
    right = results((query, key, value, w, weight), grad_out, grad_lse, backend=backend)
    found = results((query, key, value, w, weight * unit), grad_out, grad_lse, backend=backend)
    right[1] = right[1] + unit.log()
    for place, (a, b) in enumerate(zip(found[:6], right[:6], strict=True)):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max(), place
    shared = results((query, key, value, w, weight[0] * 2.0**-1060), grad_out, grad_lse, backend=backend)[6]
    assert shared[weight[0] == 0].isfinite().all()


def test_prepared_keys_and_losses_of_tiny_weights(native):
    query, key, value, w, _ = draw((), 1, 1, torch.float64)
    query, key, value = query[:, 0], key[:, 0], value[:, 0]
    weight = torch.randint(4, 9, (N,)).double() / 4
    for points, places in ((query, key), (query[:, None].expand(-1, 2), key[:, None].expand(-1, 2))):
        index = nwfast.KeyIndex(places, value, key_weight=weight * 2.0**-1060, method="fgt")
        out, lse = index(points, w, return_lse=True)
        right = nwfast.nadaraya_watson(points, places, value, w, key_weight=weight, return_lse=True)
        torch.testing.assert_close(out, right[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, right[1] - 1060 * math.log(2), rtol=1e-12, atol=1e-12)
    for reduction, unit in (("mean", 1.0), ("sum", 2.0**-1000)):
        slopes = []
        for weights in (weight * 2.0**-1000, weight):
            leaf = w.clone().requires_grad_()
            loss = nwfast.leave_one_out_loss(key, value, leaf, key_weight=weights, reduction=reduction)
            slopes.append(torch.stack([loss.detach(), torch.autograd.grad(loss, leaf)[0]]))
        torch.testing.assert_close(slopes[0] / unit, slopes[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("features", "channels"), [(1, 1), (1, 2), (2, 1), (70, 1)])
@pytest.mark.parametrize("decades", [250, 280, 305, 307.9, 320])
def test_gradients_up_to_the_largest_number(native, features, channels, decades):
    """Of the weight of a key that lies so much nearer than the one that counts; a row further away changes nothing."""
    apart = math.sqrt(2 * decades * math.log(10) / features)
    key = torch.tensor([apart, 0.0], dtype=torch.float64)[:, None].expand(-1, features)
    value = torch.tensor([1.0, 3.0], dtype=torch.float64)[:, None].expand(-1, channels)
    weight = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    for places in ([0.0], [0.0, 1.5 * apart], [1.5 * apart, 0.0]):
        query = torch.tensor(places, dtype=torch.float64)[:, None].expand(-1, features)
        out = nwfast.nadaraya_watson(
            query, key, value, 1.0, key_weight=weight, backend="native", method="dense"
        )
        (gradient,) = torch.autograd.grad(-out[:, 0].sum(), weight)
        score = np.longdouble(apart) ** 2 * features / 2
        right = max(-2 * np.exp(score), -np.longdouble(torch.finfo(torch.float64).max))
        assert abs(gradient[1].item() - right) <= 1e-11 * abs(right)


@DTYPES
@pytest.mark.parametrize("features", [1, 2])
def test_infinitely_near_and_infinitely_far(native, features, dtype):
    """A key of weight 0 that is nearer to one row, and further from the other, by more than any number."""
    most = torch.finfo(dtype).max
    for w in (most, most / 2**80):
        for order in (1, -1):
            query = torch.tensor([-0.2, 1.9][::order], dtype=dtype)[:, None].expand(-1, features)
            key = torch.tensor([0.0, 2.6], dtype=dtype)[:, None].expand(-1, features)
            value = torch.tensor([1.0, 2.0], dtype=dtype)
            weight = torch.tensor([1.0, 0.0], dtype=dtype, requires_grad=True)
            leaves = [x.clone().requires_grad_() for x in (query, key, value, torch.tensor(w, dtype=dtype))]
            out = nwfast.nadaraya_watson(*leaves, key_weight=weight, backend="native", method="dense")
            gradients = torch.autograd.grad(out.sum(), [*leaves, weight])
            assert gradients[4][0] == 0 and gradients[4][1] == most
            assert not any(gradient.any() for gradient in (*gradients[:2], gradients[3]))


@DTYPES
@pytest.mark.parametrize("features", [1, 2])
def test_terms_of_either_sign_that_overflow(backend, features, dtype):
    """Their sum has the sign of the exact one, and is the largest number; 0 where they cancel."""
    key = torch.tensor([0.0, 80.0, 81.0], dtype=dtype)[:, None].expand(-1, features)
    value, w = torch.tensor([[5.0], [1.0], [2.0]], dtype=dtype), torch.tensor(1.0, dtype=dtype)
    for signs in ([1, -1, 1], [1, 1, -1], [-1, 1, -1], [1, -1], [1e-3, -1]):
        query, grad = (
            torch.zeros(len(signs), features, dtype=dtype),
            torch.tensor(signs, dtype=dtype)[:, None],
        )
        for method in methods(backend, features):
            leaf = torch.tensor([0.0, 1.0, 1.0], dtype=dtype, requires_grad=True)
            out = nwfast.nadaraya_watson(
                query, key, value, w, key_weight=leaf, backend=backend, method=method
            )
            (found,) = torch.autograd.grad(out, leaf, grad)
            assert found[0] == torch.finfo(dtype).max * grad.sum().sign(), (signs, method)


@DTYPES
@pytest.mark.parametrize("features", [1, 3])
def test_gradients_of_shared_weights_that_overflow(native, features, dtype):
    """Of either sign, and summed over the batch: the sum is a number, or infinite."""
    query = torch.zeros(6, 1, features, dtype=dtype)
    key = torch.zeros(6, 2, features, dtype=dtype)
    key[:, 0] = 100
    value = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=dtype).repeat(3, 1)
    weight = torch.tensor([1.0, 0.0], dtype=dtype, requires_grad=True)
    out = nwfast.nadaraya_watson(query, key, value, 1.0, key_weight=weight, backend="native", method="dense")
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    assert not gradient.isnan().any()


@DTYPES
@pytest.mark.parametrize("features", [None, 1, 2], ids=str)
def test_gradients_of_shared_weights_up_to_the_largest_number(backend, features, dtype):
    """No element of a batch is cut off at less than the largest number; None: keys of their own for each query."""
    parts, steepness = torch.zeros(25, dtype=dtype), 30
    parts[3], parts[7], parts[9], parts[20] = 0.3, 0.4, -0.45, 1e-9
    apart = math.sqrt(2 * math.log(10) * steepness / (features or 1))
    key = torch.tensor([0.0, apart, apart], dtype=dtype).expand(25, 3)
    value = torch.tensor([3.0, 1.0, 1.0], dtype=dtype).expand(25, 3)
    query, grad = torch.zeros(25, dtype=dtype), parts * (torch.finfo(dtype).max * 10.0**-steepness)
    if features:
        key, query = key[..., None].expand(25, 3, features), query[:, None, None].expand(25, 1, features)
        grad = grad[:, None]
    for method in methods(backend, features or 1):
        leaf = torch.tensor([0.0, 1.0, 1.0], dtype=dtype, requires_grad=True)
        out = nwfast.nadaraya_watson(query, key, value, 1.0, key_weight=leaf, backend=backend, method=method)
        (found,) = torch.autograd.grad(out, leaf, grad)
        assert float(found[0]) / torch.finfo(dtype).max == pytest.approx(0.25, rel=1e-3), method


@DTYPES
@FORMS
@pytest.mark.parametrize("held", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_what_the_own_key_holds(backend, where, held, batch, features, channels, dtype):
    """exclude_self: in its own row it does not count; others that count it are NaN, unless it is infinitely far."""
    key, value = torch.rand(*batch, M, features, dtype=dtype), torch.randn(*batch, M, channels, dtype=dtype)
    query = key + 0.01
    spoilt_key, spoilt_value = key.clone(), value.clone()
    (spoilt_key if where == "key" else spoilt_value)[..., 7, :] = held
    cotangent = torch.zeros(*batch, M, channels, dtype=dtype)
    cotangent[..., 7, :] = 1
    for method in methods(backend, features):

        def run(key, value, method=method):
            leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
            out = nwfast.nadaraya_watson(*leaves, 3.0, exclude_self=True, backend=backend, method=method)
            return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]

        clean, found = run(key, value), run(spoilt_key, spoilt_value)
        scale = 64 * torch.finfo(dtype).eps
        # In Numba's linear time clean data take the series, right to 1e-12, the other the dense kernels.
        if (backend, method) == ("numba", "fgt"):
            scale = max(scale, 1e-12)
        torch.testing.assert_close(found[0][..., 7, :], clean[0][..., 7, :], rtol=scale, atol=scale)
        for a, b in zip(found[1:], clean[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=scale * float(b.abs().max()))
        others = torch.arange(M) != 7
        if not (where == "key" and math.isinf(held)):
            assert not found[0][..., others, :].isfinite().any()


@DTYPES
@FORMS
@pytest.mark.parametrize("held", [math.nan, math.inf, -math.inf])
def test_rows_that_nobody_uses(backend, held, batch, features, channels, dtype):
    """Padded queries: a row with a gradient of zero adds nothing, even if it is NaN itself."""
    query, key, value, w, weight = draw(batch, features, channels, dtype)
    padded = query.clone()
    padded[..., -4:, :] = held
    grad_out, grad_lse = torch.randn(*batch, M, channels, dtype=dtype), torch.randn(*batch, M, dtype=dtype)
    grad_out[..., -4:, :], grad_lse[..., -4:] = 0, 0
    for method in methods(backend, features):
        for cotangents in ((grad_out, None), (grad_out, grad_lse)):
            options = {"backend": backend, "method": method}
            clean = results((query, key, value, w, weight), *cotangents, **options)
            found = results((padded, key, value, w, weight), *cotangents, **options)
            assert found[0][..., -4:, :].isnan().all()
            used = torch.arange(M) < M - 4
            assert not found[2][..., ~used, :].any()
            pairs = [
                (a[..., used, :], b[..., used, :]) for a, b in zip(found[:3:2], clean[:3:2], strict=True)
            ]
            for a, b in pairs + list(zip(found[3:], clean[3:], strict=True)):
                scale = 64 * torch.finfo(dtype).eps * float(b.abs().max())
                torch.testing.assert_close(a, b, rtol=0, atol=scale)


@DTYPES
@FORMS
def test_a_bandwidth_that_is_not_a_number(backend, batch, features, channels, dtype):
    """Everything that depends on it is NaN, gradients too; an infinite one makes NaN as well."""
    query, key, value, _, _ = draw(batch, features, channels, dtype)
    for method in methods(backend, features):
        for held in (math.nan, math.inf, -math.inf):
            leaves = [
                tensor.clone().requires_grad_()
                for tensor in (query, key, value, torch.tensor(held, dtype=dtype))
            ]
            out, lse = nwfast.nadaraya_watson(*leaves, backend=backend, method=method, return_lse=True)
            assert out.isnan().all() and lse.isnan().all(), (method, held)
            alone = nwfast.nadaraya_watson(*leaves, backend=backend, method=method)
            assert alone.isnan().all()
            if math.isnan(held):
                for gradient in torch.autograd.grad(alone.sum(), leaves):
                    assert gradient.isnan().all(), method


@DTYPES
@pytest.mark.parametrize("features", [1, 2])
def test_a_query_of_no_number_and_no_key(backend, features, dtype):
    """NaN comes first: a row without keys has an lse of -inf if its query is a number."""
    key, value = torch.zeros(1, features, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    for method in methods(backend, features):
        for held, right in ((math.nan, math.nan), (1.0, -math.inf)):
            query = torch.full((1, features), held, dtype=dtype)
            for options in ({"exclude_self": True}, {"key_weight": torch.zeros(1, dtype=dtype)}):
                out, lse = nwfast.nadaraya_watson(
                    query, key, value, 2.0, backend=backend, method=method, return_lse=True, **options
                )
                assert out.isnan().all() and torch.equal(lse.isnan(), torch.tensor([math.isnan(right)]))
                assert math.isnan(right) or lse.item() == right
