"""The reference backend itself, against the formula in float64 numpy, and its edge cases."""

import numpy as np
import pytest
import torch
from op.test_functional import FORMS, NAMES, check, make

import nwfast
from nwfast.backends import reference


def formula(query, key, value, w, key_weight=None):
    """Loops over queries and keys: (M, D), (N, D), (N, C), (D,), (N,) -> out (M, C), lse (M,), p (M, N)."""
    m, n = len(query), len(key)
    p, lse = np.zeros((m, n)), np.zeros(m)
    a = np.ones(n) if key_weight is None else key_weight
    for i in range(m):
        for j in range(n):
            p[i, j] = a[j] * np.exp(-sum(((query[i, f] - key[j, f]) * w[f]) ** 2 for f in range(len(w))) / 2)
        lse[i] = np.log(p[i].sum())
        p[i] /= p[i].sum()
    return p @ value, lse, p


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_formula(features, weighted, device):
    generator = np.random.default_rng(2)
    query, key = generator.random((6, features)), generator.random((9, features))
    value, w = generator.standard_normal((9, 2)), 2 + generator.random(features)
    key_weight = generator.random(9) if weighted else None
    out, lse, p = formula(query, key, value, w, key_weight)
    tensors = [torch.from_numpy(array).to(device) for array in (query, key, value, w)]
    weight = None if key_weight is None else torch.from_numpy(key_weight).to(device)
    found = nwfast.nadaraya_watson(*tensors, key_weight=weight, backend="reference", return_lse=True)
    np.testing.assert_allclose(found[0].cpu(), out, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found[1].cpu(), lse, rtol=1e-13, atol=1e-13)
    matrix = nwfast.attention_weights(tensors[0], tensors[1], tensors[3], key_weight=weight)
    np.testing.assert_allclose(matrix.cpu(), p, rtol=1e-13, atol=1e-13)
    assert 1.1 < np.median(1 / (p**2).sum(1)) < 8.9  # neither one-hot nor uniform


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, dtype):
    *shapes, exclude_self = FORMS[form]
    check(make(shapes, dtype), "reference", exclude_self)


@pytest.mark.parametrize("form", ["1-D, weights", "features, weights, leave-one-out"])
def test_derivatives(form):
    *shapes, exclude_self = FORMS[form]
    shapes = [tuple(min(size, 5) for size in shape) for shape in shapes]
    leaves = [tensor.requires_grad_() for tensor in make(shapes, torch.float64, w_scale=2.0)]

    def function(query, key, value, w, key_weight):
        return nwfast.nadaraya_watson(
            query,
            key,
            value,
            w,
            key_weight=key_weight,
            exclude_self=exclude_self,
            backend="reference",
            return_lse=True,
        )

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert len(leaves) == len(NAMES)


def test_float32_is_computed_in_float64():
    """Scores of 1e6 bandwidths keep the digits that tell two keys apart."""
    key = torch.tensor([0.0, 2.0**-10])
    value = torch.tensor([0.0, 1.0])
    out = nwfast.nadaraya_watson(torch.tensor([4096.0]), key, value, 1.0, backend="reference")
    difference = 4096.0 * 2.0**-10 - 2.0**-21
    torch.testing.assert_close(out, torch.tensor([1 / (1 + np.exp(-difference))], dtype=torch.float32))
    assert reference.arithmetic_dtype(torch.float16) == torch.float32
    assert reference.arithmetic_dtype(torch.float64) == torch.float64


def test_rows_without_keys():
    query, key, value = torch.rand(3), torch.rand(3, 4), torch.rand(3, 4)
    w = torch.tensor([2.0], requires_grad=True)
    weight = torch.ones(3, 4)
    weight[1] = 0
    weight.requires_grad_()
    out, lse = nwfast.nadaraya_watson(
        query, key, value, w, key_weight=weight, backend="reference", return_lse=True
    )
    assert out.isnan().tolist() == [False, True, False]
    assert lse[1] == -torch.inf
    gradients = torch.autograd.grad(out.square().sum(), (w, weight), create_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][1].any()
    second = torch.autograd.grad(sum(gradient.sum() for gradient in gradients), (w, weight))
    assert all(gradient.isfinite().all() for gradient in second)
    matrix = nwfast.attention_weights(query, key, w, key_weight=weight)
    assert matrix[1].isnan().all()
    torch.testing.assert_close(matrix[[0, 2]].sum(1), torch.ones(2))


def test_edge_cases():
    key, value = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 2.0, 4.0])

    def run(query, w, **options):
        return nwfast.nadaraya_watson(torch.tensor(query), key, value, w, backend="reference", **options)

    assert torch.equal(run([0.2, 0.9, 1e6], 1e30), torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(run([0.2, -7.0], 0.0), torch.full((2,), 7 / 3))
    assert run([torch.nan, 0.0], 1.0).isnan().tolist() == [True, False]
    assert run([torch.inf, 0.0], 1.0).isnan().tolist() == [True, False]
    # A key of weight 0 that lies nearer than all others by more than exp can say.
    assert torch.equal(run([0.0], 1e4, key_weight=torch.tensor([0.0, 1.0, 1.0])), torch.tensor([2.0]))
    assert run([0.0], 1.0, key_weight=torch.tensor([1.0, -1.0, 1.0])).isnan().all()
    assert torch.equal(
        nwfast.nadaraya_watson(key, key, value, 1e9, exclude_self=True, backend="reference"),
        torch.tensor([2.0, 1.0, 2.0]),
    )
    lone = nwfast.nadaraya_watson(key[:1], key[:1], value[:1], exclude_self=True, backend="reference")
    assert lone.isnan().all()


ODD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "1e30": 1e30, "-2": -2.0}


def leaves_of(dtype, *lists):
    return [torch.tensor(numbers, dtype=dtype, requires_grad=True) for numbers in lists]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("odd", ODD)
def test_left_out_key_does_not_matter(odd, what, dtype):
    """Values, first and second derivatives, forward mode and the matrix are those without it."""
    query, key, value, w, weight = leaves_of(dtype, [0, 1], [0.1, 0.2, 0.3], [1, 2, 4], [2], [1, 0, 1])
    {"key": key, "value": value}[what].data[1] = ODD[odd]
    leaves = [query, key, value, w, weight]
    kept = torch.tensor([0, 2])
    few = [query, *(tensor.detach()[kept].requires_grad_() for tensor in (key, value)), w]

    def total(query, key, value, w, weight=None):
        out, lse = nwfast.nadaraya_watson(
            query, key, value, w, key_weight=weight, backend="reference", return_lse=True
        )
        return out.sin().sum() + lse.sum()

    found = torch.autograd.grad(total(*leaves), leaves, create_graph=True)
    right = torch.autograd.grad(total(*few), few, create_graph=True)
    for place, (a, b) in enumerate(zip(found, right, strict=False)):
        if place in (1, 2):
            assert a[1] == 0
            a = a[kept]
        torch.testing.assert_close(a, b)
    assert found[4].isfinite().all()
    if odd in ("nan", "inf", "-inf"):
        assert found[4][1] == 0
    second = torch.autograd.grad(found[3], leaves, retain_graph=True)
    expected = torch.autograd.grad(right[3], few)
    torch.testing.assert_close(second[3], expected[3])
    assert all(gradient.isfinite().all() for gradient in second)
    tangents = [torch.ones_like(tensor) for tensor in leaves[:4]]
    _, tangent = torch.func.jvp(lambda *x: total(*x, weight.detach()), tuple(leaves[:4]), tuple(tangents))
    assert tangent.isfinite()
    stack = torch.stack([w.detach(), 2 * w.detach()])
    mapped = torch.vmap(torch.func.grad(total, 3), (None, None, None, 0, None))(
        *(x.detach() for x in leaves[:3]), stack, weight.detach()
    )
    torch.testing.assert_close(mapped[0], found[3].detach())
    matrix = nwfast.attention_weights(query, key, w, key_weight=weight)
    assert (matrix[:, 1] == 0).all()
    torch.testing.assert_close(matrix[:, kept], nwfast.attention_weights(query, few[1], w))


def test_gradient_of_the_weight_of_a_left_out_key():
    key = torch.cat([torch.tensor([-2.0]), torch.linspace(0, 1, 302)[1:-1]]).double()
    query, value, weight = torch.rand(20).double(), torch.rand(301).double(), torch.ones(301).double()
    found = []
    for first in (0.0, 1e-5):  # beside the derivative there, a difference
        weight[0] = first
        leaf = weight.clone().requires_grad_()
        out = nwfast.nadaraya_watson(query, key, value, 1.0, key_weight=leaf, backend="reference").sum()
        found.append((out.detach(), torch.autograd.grad(out, leaf)[0][0]))
    assert abs(found[0][1]) > 1e-5
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=0)
    torch.testing.assert_close((found[1][0] - found[0][0]) / 1e-5, found[0][1], rtol=1e-5, atol=0)


def test_left_out_key_nearer_than_all_others():
    for distance in (13.0, 113.0, 1e6, 1e30):
        w, weight = leaves_of(torch.float32, 1.0, [0, 1, 1])
        key = torch.tensor([0.0, distance, distance * 1.01])
        out = nwfast.nadaraya_watson(
            torch.zeros(1), key, torch.tensor([3.0, 1.0, 2.0]), w, key_weight=weight, backend="reference"
        )
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), (w, weight)))
        weight = weight.detach().requires_grad_()


@pytest.mark.parametrize("odd", ["nan", "inf"])
def test_own_key_that_is_left_out_holds_anything(odd):
    """Every other row counts it; without a cotangent those add nothing."""
    x = torch.tensor([0.0, 3.0, 1.0, 7.0])
    for what in range(2):
        key, value = x.clone(), x.cos()
        (key, value)[what][3] = ODD[odd]
        key.requires_grad_(), value.requires_grad_()
        out = nwfast.nadaraya_watson(x, key, value, 1.0, exclude_self=True, backend="reference")
        right = nwfast.nadaraya_watson(x[3:], x[:3], x[:3].cos(), 1.0, backend="reference")
        torch.testing.assert_close(out[3:], right)
        if (odd, what) != ("inf", 0):
            assert not out[:3].isfinite().any()
        gradients = torch.autograd.grad(out[3], (key, value))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert all(gradient[3] == 0 for gradient in gradients)


def test_not_a_number_in_what_counts():
    def run(query=(0.0, 1.0), key=(0.1, 0.2, 0.3), value=(1.0, 2.0, 4.0), w=(2.0,), weight=(1.0, 1.0, 1.0)):
        leaves = leaves_of(torch.float32, query, key, value, w, weight)
        out, lse = nwfast.nadaraya_watson(
            *leaves[:4], key_weight=leaves[4], backend="reference", return_lse=True
        )
        return out, lse, leaves

    nan = np.nan
    for odd in (nan, np.inf, -np.inf):
        out, lse, leaves = run(w=(odd,))
        assert out.isnan().all()
        assert lse.isnan().all()
        assert all(g.isnan().all() for g in torch.autograd.grad(out.sum(), leaves[:4]))
    for options in ({"key": (0.1, nan, 0.3)}, {"weight": (1.0, nan, 1.0)}, {"weight": (1.0, -1.0, 1.0)}):
        out, lse, _ = run(**options)
        assert out.isnan().all()
        assert lse.isnan().all()
    out, lse, _ = run(value=(1.0, nan, 4.0))
    assert out.isnan().all()
    assert lse.isfinite().all()
    out, lse, _ = run(key=(0.1, np.inf, 0.3))  # infinitely far
    expected, expected_lse, _ = run(weight=(1.0, 0.0, 1.0))
    torch.testing.assert_close((out, lse), (expected, expected_lse))


@pytest.mark.parametrize("odd", ["nan", "inf"])
def test_padded_queries(odd):
    """A row without a cotangent adds nothing, whatever it holds."""
    query, key, value, w = leaves_of(torch.float64, [0, ODD[odd]], [0.1, 0.2, 0.3], [1, 2, 4], [2])
    out, lse = nwfast.nadaraya_watson(query, key, value, w, backend="reference", return_lse=True)
    assert out.isnan().tolist() == [False, True]
    assert lse[1].isnan() if odd == "nan" else lse[1] == -torch.inf
    alone, alone_lse = nwfast.nadaraya_watson(query[:1], key, value, w, backend="reference", return_lse=True)
    found = torch.autograd.grad(out[0] + lse[0], (query, key, value, w), retain_graph=True)
    right = torch.autograd.grad(alone[0] + alone_lse[0], (query, key, value, w))
    torch.testing.assert_close(found, right)
    assert torch.autograd.grad(out.sum(), w)[0].isnan() == (odd == "nan")


def test_lse_has_the_leading_dimensions_of_value():
    out, lse = nwfast.nadaraya_watson(
        torch.rand(1, 4, 1), torch.rand(1, 5, 1), torch.rand(3, 5, 2), backend="reference", return_lse=True
    )
    assert out.shape == (3, 4, 2)
    assert lse.shape == (3, 4)
    assert lse.is_contiguous()


def test_scores_beyond_all_numbers_keep_their_order():
    """In several features, and with other keys in between that lie at one end of the dtype or the other."""
    for w, near, far in ((1.7e308, 1e36, 1.2e36), (1.7e308, 1e-100, 1.1e-100), (1e200, 1e250, 1.1e250)):
        key = torch.tensor([[0.0, far], [-near, near / 4], [far, near]], dtype=torch.float64)
        value = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        query = torch.zeros(1, 2, dtype=torch.float64)
        for kept in ([0, 1, 2], [1, 2], [0, 2]):
            out, lse = nwfast.nadaraya_watson(
                query, key[kept], value[kept], w, backend="reference", return_lse=True
            )
            assert out == (2.0 if 1 in kept else 1.0)
            assert lse == -torch.inf


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("exclude_self", "far"), [(False, 1e15), (True, 1e16)])
def test_derivatives_of_far_ties(exclude_self, weighted, far):
    """Two far keys whose scores differ by less than their rounding both have derivatives, of first order and second."""
    key = torch.tensor([[-far, -far, 0, 0], [0, 0.5, -far, -far], [0, 0, 1, 0]], dtype=torch.float64)
    query = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [1, 0.6, 1, 0]], dtype=torch.float64)
    key, query = (key, query) if exclude_self else (key[:2], query)
    value, w = torch.tensor([1.0, 0.0, 1.0][: len(key)], dtype=torch.float64), 1e5 / far
    weight = torch.ones(len(key), dtype=torch.float64) if weighted else None
    leaf = query.clone().requires_grad_()

    def last(query):
        options = {"key_weight": weight, "exclude_self": exclude_self, "backend": "reference"}
        return nwfast.nadaraya_watson(query, key, value, w, **options)[2]

    out = last(leaf)
    (found,) = torch.autograd.grad(out, leaf, create_graph=True)
    step = w * (key[0] - key[1]) * w
    right = out.detach() * (1 - out.detach()) * step  # whatever the scores are rounded to
    torch.testing.assert_close(found[2], right, rtol=1e-6, atol=0)
    (second,) = torch.autograd.grad(found[2, 0], leaf)
    torch.testing.assert_close(second[2], right[0] * (1 - 2 * out.detach()) * step, rtol=1e-6, atol=1e-20)
    _, tangent = torch.func.jvp(last, (query,), (torch.ones_like(query),))
    torch.testing.assert_close(tangent, right.sum(), rtol=1e-6, atol=1e-12)
