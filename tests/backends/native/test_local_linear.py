"""Local lines in two and three features in one pass, against least squares and against the general passes."""

import pytest
import torch
from op.test_local_linear import close, least_squares

import nwfast
from nwfast.op import local_linear as lines
from nwfast.op.schema import LINES

DTYPES = [torch.float64, torch.float32]
# Of the scale of results: rounding of the dtype over the least variance, about.
BOUND = {torch.float64: 1e-10, torch.float32: 1.5e-6}
W = {2: (3.0, 30.0, 100.0), 3: (3.0, 12.0, 30.0)}


def fitted(*inputs, **options):
    return nwfast.local_linear(*inputs, method="fgt", backend="native", return_slope=True, **options)


def in_one_pass(query, key, value, w, key_weight=None, exclude_self=False):
    """(fit, slope, rows that are left, rows whose moments were handed on) of canonical inputs."""
    found = LINES["native_fgt"](query, key, value, w, key_weight, exclude_self, False)
    return found[0], found[1], found[4], found[5]


def by_passes(query, key, value, w, key_weight=None, exclude_self=False):
    wide = [x if x is None else x.double() for x in (query, key, value, w, key_weight)]
    return lines._by_passes(*wide, exclude_self, "native_fgt")[:2]


def even(features, dtype, n=30000, channels=2):
    generator = torch.Generator().manual_seed(features)
    key, query = torch.rand(2, n, features, dtype=dtype, generator=generator)
    value = torch.sin(5 * key.sum(-1, keepdim=True)) + torch.randn(
        n, channels, dtype=dtype, generator=generator
    )
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=dtype)] * features)
    query[: len(corners)] = corners
    weight = torch.rand(n, dtype=dtype, generator=generator) + 0.1
    return query, key, value, weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_even_data(features, weighted, dtype):
    """Fits and slopes of least squares, corners included, in boxes and in windows, and no row is left."""
    query, key, value, weight = even(features, dtype)
    weight = weight if weighted else None
    for w in W[features]:
        scale = torch.full((features,), w, dtype=dtype)
        fit, slope, left, weak = in_one_pass(query, key, value, scale, weight)
        assert left.numel() == 0
        assert weak.numel() <= 5
        some = torch.arange(40)
        some = some[~torch.isin(some, weak)]
        wide = [x if x is None else x.double() for x in (query[some], key, value, scale, weight)]
        right = least_squares(*wide)
        close(fit[some], right[0], BOUND[dtype], f"fit, w = {w}")
        close(slope[some], right[1].mT, BOUND[dtype], f"slope, w = {w}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [2, 3])
def test_leave_one_out(features, dtype):
    _, key, value, weight = even(features, dtype, 8000)
    for w in W[features]:
        scale = torch.full((features,), w, dtype=dtype)
        fit, slope = fitted(key, key, value, scale, key_weight=weight, exclude_self=True)
        for row in (0, 1, 17, 4000, 7999):
            rest = torch.arange(len(key)) != row
            right = least_squares(
                key[row, None].double(),
                key[rest].double(),
                value[rest].double(),
                scale.double(),
                weight[rest].double(),
            )
            least = torch.linalg.eigvalsh(spread(key[row], key[rest], scale, weight[rest]))[0]
            if least < 0.1:
                continue
            close(fit[row, None], right[0], 5 * BOUND[dtype], f"fit, w = {w}")
            close(slope[row, None], right[1], 5 * BOUND[dtype], f"slope, w = {w}")


def spread(query, key, w, weight):
    z = (key.double() - query.double()) * w.double()
    p = torch.softmax(weight.double().log() - z.square().sum(-1) / 2, 0)[:, None]
    z = z - (p * z).sum(0)
    return (p * z).mT @ z


def mixed(features, dtype):
    """Clusters of all widths with gaps, a plate and a line, single points far out; queries anywhere, and at keys."""
    generator = torch.Generator().manual_seed(10 + features)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    parts = [normal(3000, features) * width + normal(features) for width in (0.5, 0.1, 0.02, 1e-3)]
    plate = normal(2000, features)
    plate[:, 0] = 0.25
    line = normal(1000, 1) * torch.ones(features, dtype=torch.float64)
    key = torch.cat([*parts, plate, line, 9 * normal(20, features)])
    query = torch.cat([key[::7], 2 * normal(1500, features), 40 * normal(30, features)])
    value = torch.sin(key.sum(-1, keepdim=True)) + 0.1 * normal(len(key), 1)
    order = torch.randperm(len(key), generator=generator)
    return query.to(dtype), key[order].to(dtype), value[order].to(dtype)


@pytest.mark.parametrize("features", [2, 3])
@pytest.mark.parametrize("w", [1.0, 8.0, 60.0])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_mixed_data(features, w, exclude_self):
    """The same as by the general passes, rows that determine no plane included."""
    query, key, value = mixed(features, torch.float64)
    query = key if exclude_self else query
    scale = torch.full((features,), w, dtype=torch.float64)
    found = fitted(query, key, value, scale, exclude_self=exclude_self)
    fit, slope = by_passes(query, key, value, scale, None, exclude_self)
    assert found[0].isfinite().all()
    assert torch.equal(found[0].isnan(), fit.isnan())
    # Rows of small variances differ by rounding over these.
    for row, (one, other) in enumerate(zip(found, (fit, slope.mT), strict=True)):
        error = (one - other).abs().flatten(1).amax(-1) / (1 + other.abs().flatten(1).amax(-1))
        assert error.quantile(0.8) < 1e-9, row
        assert error.max() < 1e-3, row


@pytest.mark.parametrize("features", [2, 3])
def test_mixed_data_in_float32(features):
    query, key, value = mixed(features, torch.float32)
    for w in (1.0, 8.0, 60.0):
        scale = torch.full((features,), w)
        found = fitted(query, key, value, scale)
        fit, slope = by_passes(query, key, value, scale)
        for one, other in zip(found, (fit, slope.mT), strict=True):
            error = (one - other).abs().flatten(1).amax(-1) / (1 + other.abs().flatten(1).amax(-1))
            assert error.quantile(0.9) < 2e-6
            assert error.max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batches_and_layouts(dtype):
    """Elements are those of calls of their own, whatever is broadcast; strides and channels change nothing."""
    query, key, value, weight = even(2, dtype, 3000)
    several = torch.stack([query, query.flip(0)])[:, None]
    keys = torch.stack([key, 0.5 * key, key + 7])[None]
    w = torch.tensor([20.0, 31.0], dtype=dtype)
    fit, slope = fitted(several, keys, value.mT.contiguous().mT[None, None], w, key_weight=weight)
    assert fit.shape == (2, 3, 3000, 2)
    for i in range(2):
        for j in range(3):
            one = fitted(several[i, 0], keys[0, j], value, w, key_weight=weight)
            assert torch.equal(fit[i, j], one[0])
            assert torch.equal(slope[i, j], one[1])
    only = fitted(query, key, value[:, 0], w, key_weight=weight)
    close(only[0], fitted(query, key, value, w, key_weight=weight)[0][:, 0], BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(dtype):
    """Not a bit, rows whose moments are handed on included."""
    inputs = mixed(3, dtype)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(fitted(*inputs, torch.full((3,), 8.0, dtype=dtype)))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_it_refuses():
    """Odd numbers, keys within a bandwidth: the general passes serve, and nothing is left open."""
    query, key, value, _ = even(2, torch.float32, 2000)
    w = torch.full((2,), 20.0)
    for change in ("nan", "narrow", "none"):
        keys, queries = key.clone(), query
        if change == "nan":
            keys[5, 0] = torch.nan
        elif change == "narrow":
            keys[:, 0] *= 1e-4
        else:
            queries = query[:0]
        left = in_one_pass(queries, keys, value, w)[2]
        assert left.tolist() == ([] if change == "none" else [-1])
        found = fitted(queries, keys, value, w)
        fit, slope = by_passes(queries, keys, value, w)
        torch.testing.assert_close(found[0], fit.float(), equal_nan=True)
        torch.testing.assert_close(found[1], slope.mT.float(), equal_nan=True)
    query[3, 1], query[4, 0] = torch.nan, 1e30
    fit = fitted(query, key, value, w)[0]
    assert fit[3].isnan().all()
    assert fit[4].isfinite().all()
    whole = fitted(query[5:], key, value, w)[0]
    close(fit[5:], whole, 1e-6)


@pytest.mark.parametrize("features", [2, 3])
def test_gradients_and_what_they_need(features):
    """Means and inverses of the pass are those of the others, and so are the gradients."""
    query, key, value, weight = even(features, torch.float64, 4000)
    w = torch.full((features,), 8.0, dtype=torch.float64)
    found = LINES["native_fgt"](query, key, value, w, weight, False, True)
    right = lines._by_passes(query, key, value, w, weight, False, "native_fgt")
    rows = torch.ones(len(query), dtype=torch.bool)
    rows[found[4]] = rows[found[5]] = False
    assert rows.sum() > 3900
    for one, other in zip(found[:4], right, strict=True):
        close(one[rows], other[rows], 1e-10)
    narrow = [x.float().requires_grad_() for x in (query, key, value, w)]
    wide = [x.clone().requires_grad_() for x in (query, key, value, w)]
    for leaves, tolerance in ((narrow, 1e-5), (wide, 1e-9)):
        fit, slope = fitted(*leaves)
        gradients = torch.autograd.grad(fit.square().sum() + slope.sum(), leaves)
        dense = [x.detach().double().requires_grad_() for x in leaves]
        fit, slope = nwfast.local_linear(*dense, method="dense", backend="native", return_slope=True)
        for one, other in zip(
            gradients, torch.autograd.grad(fit.square().sum() + slope.sum(), dense), strict=True
        ):
            close(one, other, tolerance)
