"""The fast Gauss transform of two and three features: every result, against extended precision and against itself."""

import numpy as np
import pytest
import torch
from conftest import every_other, pairwise
from exact import BOXES, assert_accurate, solve

import nwfast
from nwfast.op import schema

pytestmark = pytest.mark.usefixtures("native")

KINDS = (
    "uniform",
    "clusters",
    "lattice",
    "duplicates",
    "line",
    "circle",
    "scales",
    "one place",
    "offset",
)
DTYPES = (torch.float32, torch.float64)
NAMES = ("query", "key", "value", "w", "key_weight")


def places(kind: str, n: int, features: int, generator: np.random.Generator) -> np.ndarray:
    """n points, about 1 wide but for those of features of other scales."""
    u = generator.random((n, features))
    if kind == "clusters":
        centres = generator.random((5, features))
        return centres[generator.integers(0, 5, n)] + 0.01 * generator.standard_normal((n, features))
    if kind == "lattice":
        side = int(np.ceil(n ** (1 / features)))
        return np.stack(np.unravel_index(np.arange(n) % side**features, (side,) * features), 1) / side
    if kind == "duplicates":
        return np.round(u * 6) / 6
    if kind == "line":
        return u[:, :1] * np.arange(1, features + 1) / features
    if kind == "circle":
        angle = 2 * np.pi * u[:, 0]
        return np.stack([np.cos(angle), np.sin(angle), 0 * angle][:features], 1) / 2
    if kind == "scales":
        return u * np.array([1e-6, 1e6, 1.0])[:features]
    if kind == "one place":
        return np.full_like(u, u[0, 0])
    if kind == "two cubes":
        return u + 1.5 * generator.integers(0, 2, (n, 1))
    if kind == "offset":
        return u + 1000
    return u


def scaled(kind: str, w: float, features: int) -> np.ndarray:
    """w for each feature, such that the extent of the data in bandwidths is w."""
    return w / np.array([1e-6, 1e6, 1.0])[:features] if kind == "scales" else np.full(features, w)


def assert_right(
    query, key, value, w, key_weight=None, exclude_self=False, grad_lse=True, method="fgt"
) -> dict[str, torch.Tensor]:
    """out, lse and all gradients within what rounding allows."""
    inputs = [query, key, value, w] + ([] if key_weight is None else [key_weight])
    leaves = [x.clone().requires_grad_() for x in inputs]
    weight = None if key_weight is None else leaves[4]
    out, lse = nwfast.nadaraya_watson(
        *leaves[:4],
        key_weight=weight,
        exclude_self=exclude_self,
        method=method,
        backend="native",
        return_lse=True,
    )
    cotangents = torch.randn_like(out), torch.randn_like(lse) if grad_lse else None
    outputs = (out, lse) if grad_lse else (out,)
    gradients = torch.autograd.grad(outputs, leaves, cotangents if grad_lse else cotangents[:1])
    right = solve(query, key, value, w, key_weight, *cotangents, exclude_self=exclude_self, boxes=BOXES)
    found = dict(zip(("out", "lse", *NAMES), (out, lse, *gradients), strict=False))
    for name, result in found.items():
        assert_accurate(result, right[name], name)
    return found


def assert_tangents_right(query, key, value, w, key_weight=None, exclude_self=False) -> None:
    """Gradients of query and w as products with what the forward pass gave, which calls for lse go without."""
    leaves = query.clone().requires_grad_(), w.clone().requires_grad_()
    options = dict(key_weight=key_weight, exclude_self=exclude_self, method="fgt", backend="native")
    if exclude_self:
        key = key.clone()
    out = nwfast.nadaraya_watson(leaves[0], key, value, leaves[1], **options)
    saved = [tensor.shape for tensor in out.grad_fn.saved_tensors if tensor is not None]
    assert saved[-2:] == [query.shape, query.shape]
    cotangent = torch.randn_like(out)
    right = solve(query, key, value, w, key_weight, cotangent, exclude_self=exclude_self, boxes=BOXES)
    found = dict(zip(("query", "w"), torch.autograd.grad(out, leaves, cotangent), strict=True))
    for name, result in {"out": out, **found}.items():
        assert_accurate(result, right[name], name)


def problem(kind, features, w, dtype, n=300, m=200, channels=1, seed=1):
    generator = np.random.default_rng(seed)
    points = places(kind, n + m, features, generator)[generator.permutation(n + m)]
    key, query = torch.from_numpy(points[:n]).to(dtype), torch.from_numpy(points[n:]).to(dtype)
    value = torch.from_numpy(generator.standard_normal((n, channels))).to(dtype)
    return query, key, value, torch.from_numpy(scaled(kind, w, features)).to(dtype)


@pairwise("features, kind, w, dtype", (2, 3), KINDS, (0.0, 1e-6, 0.3, 6.0, 300.0, 1e6), DTYPES)
def test_at_every_bandwidth(features, kind, w, dtype):
    data = problem(kind, features, w, dtype)
    assert_right(*data)
    assert_tangents_right(*data)


def assert_as_textbook(query, key, value, w, exclude_self=False) -> None:
    """As the two textbook lines in float64, which serve near the data: 8 units of the scale of each result."""

    def textbook(query, key, value, w):
        score = -((query[:, None] - key) * w).square().sum(-1) / 2
        if exclude_self:
            score = score.masked_fill(torch.eye(len(key), dtype=torch.bool), -torch.inf)
        return score.softmax(1) @ value, score.logsumexp(1)

    def fgt(query, key, value, w):
        return nwfast.nadaraya_watson(
            query, key, value, w, exclude_self=exclude_self, method="fgt", backend="native", return_lse=True
        )

    inputs = query, key, value, w
    cotangents = (
        torch.randn(len(query), value.shape[1]).to(query.dtype),
        torch.randn(len(query)).to(query.dtype),
    )
    found = []
    for function, dtype in ((fgt, query.dtype), (textbook, torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        by_row = leaves[3].expand(len(query), 1, -1)  # w of each row
        outputs = function(*leaves[:3], leaves[3] if function is fgt else by_row)
        gradients = torch.autograd.grad(outputs, leaves, [x.to(dtype) for x in cotangents], retain_graph=True)
        found.append((*outputs, *gradients))
    # A sum over all rows may be small beside its terms.
    terms = torch.autograd.grad(outputs, by_row, [x.double() for x in cotangents])[0].abs().sum(0).max()
    bound = 2.0**-20 if query.dtype == torch.float32 else 1e-12
    for name, mine, right in zip(("out", "lse", *NAMES), *found, strict=False):
        scale = right.abs().max() if name != "w" else terms
        error = float((mine.double() - right).detach().abs().max() / scale.detach())
        assert error <= bound, (name, error)


@pairwise("features, exclude_self, w, dtype", (2, 3), (False, True), (1.0, 4.0, 12.0), DTYPES)
def test_crowded_boxes(features, exclude_self, w, dtype):
    """So many points a box that all are expanded."""
    query, key, value, w = problem("uniform", features, w, dtype, n=2000, m=2000)
    assert_as_textbook(key.clone() if exclude_self else query, key, value, w, exclude_self)


@every_other("features, distance, dtype", (2, 3), (10.0, 100.0, 1e4), DTYPES)
def test_far_queries(features, distance, dtype):
    query, key, value, w = problem("uniform", features, 4.0, dtype, n=600)
    query[::7] += distance / 4 * torch.randn(len(query[::7]), features, dtype=dtype)
    query[3] = torch.tensor([1e30, -1e30, 1.0][:features], dtype=dtype)
    assert_right(query, key, value, w, grad_lse=False)
    assert_tangents_right(query, key, value, w)


@every_other("features, w, dtype", (2, 3), (0.5, 6.0, 60.0), DTYPES)
def test_leave_one_out(features, w, dtype):
    _, key, value, w = problem("uniform", features, w, dtype, n=400)
    value[5] = 1e6  # the row's own value would drown all others
    assert_right(key.clone(), key, value, w, exclude_self=True)
    assert_tangents_right(key, key, value, w, torch.rand(len(key), dtype=dtype), exclude_self=True)
    assert_right(key.flip(0), key, value, w, exclude_self=True)


@every_other("features, w, dtype", (2, 3), (0.5, 6.0, 60.0), DTYPES)
def test_key_weights(features, w, dtype):
    query, key, value, w = problem("uniform", features, w, dtype, n=400, channels=5)
    weight = torch.rand(len(key), dtype=dtype) * 10.0 ** torch.randint(-6, 1, (len(key),)).to(dtype)
    assert_right(query, key, value, w, weight)
    weight[::3] = 0
    plain = assert_right(query, key, value, w, weight)
    key[::3] = torch.nan
    value[::6] = torch.inf
    masked = assert_right(query, key, value, w, weight)
    for name in ("out", "lse"):
        torch.testing.assert_close(masked[name], plain[name], rtol=1e-5, atol=1e-6)


@every_other("features, dtype", (2, 3), (torch.float16, torch.bfloat16, *DTYPES))
def test_batches_strides_and_halves(features, dtype):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    key, query = draw(2, 1, features, 300).transpose(-1, -2), draw(1, 3, 200, 2 * features)[..., ::2]
    value, w = draw(2, 1, 300, 5), 5 * draw(2, 3, features)
    assert_right(query, key, value, w, grad_lse=False)


@pytest.mark.parametrize("features", [2, 3])
def test_lone_keys_beside_crowds(features):
    """Sums that are small beside what expansions of the crowd may be off by are not left at that."""
    for distance in (4.0, 7.0, 10.0, 13.0):
        generator = np.random.default_rng(3)
        key = torch.from_numpy(generator.standard_normal((6000, features)) * 0.2)
        key[:3] = distance + torch.from_numpy(generator.random((3, features)))
        query = torch.cat((key[:100], distance + torch.from_numpy(generator.random((100, features)))))
        value = torch.from_numpy(generator.standard_normal((6000, 1)))
        for dtype in (torch.float32, torch.float64):
            assert_as_textbook(*(x.to(dtype) for x in (query, key, value, torch.ones(features))))


@pytest.mark.parametrize("features", [2, 3])
def test_light_keys_among_the_queries_beside_a_far_crowd(features):
    """Boxes in reach hold light keys alone: their sum is above 0, and small beside what the crowd beyond may add."""
    generator = torch.Generator().manual_seed(5)
    query, light, crowd = 0.3 * torch.randn(3, 3000, features, generator=generator, dtype=torch.float64)
    value = torch.linspace(-1, 1, 6000, dtype=torch.float64)
    weight = torch.ones(6000, dtype=torch.float64)
    weight[:3000] = 1e-35
    some = slice(None, None, 50)
    for distance in (7.0, 9.0, 11.0, 14.0):
        key = torch.cat([light, crowd + distance / features**0.5])
        out, lse = nwfast.nadaraya_watson(
            query, key, value, key_weight=weight, method="fgt", backend="native", return_lse=True
        )
        score = -(query[some, None] - key).square().sum(-1) / 2 + weight.log()
        torch.testing.assert_close(out[some], score.softmax(1) @ value, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse[some], score.logsumexp(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("features", [2, 3])
def test_crowds_beyond_the_first_windows(features):
    """Keys further away than the smaller radius of direct sums count where a row has little else, in whatever cells."""
    generator = torch.Generator().manual_seed(4)
    shift = torch.linspace(0, 8, 60)[:, None, None]
    key = 0.01 * torch.randn(1, 20_000, features, generator=generator)
    key[..., 0] += 7.5
    key[:, 0] = 0
    key[:, 0, 0] = -3.6
    value = torch.ones(1, 20_000, 1)
    value[:, 0] = 0
    query = [
        x.requires_grad_()
        for x in (torch.zeros(60, 4, features) + shift, torch.zeros(60, 4, features) + shift)
    ]
    results = []
    for x, method in zip(query, ("fgt", "dense"), strict=True):
        dtype = torch.float32 if method == "fgt" else torch.float64
        args = (t.to(dtype) for t in (x, key + shift, value, torch.ones(features)))
        out = nwfast.nadaraya_watson(*args, method=method, backend="native")
        results.append((out.double(), torch.autograd.grad(out.sum(), x)[0].double()))
    (out, grad), (right, right_grad) = results
    assert right.min() > 5e-6
    assert (out - right).abs().max() < 1e-6
    assert (grad - right_grad).abs().max() < 1e-5


@pytest.mark.parametrize("features", [2, 3])
@pytest.mark.parametrize("w", [3.0, 30.0, 300.0])
def test_same_bits_for_any_number_of_threads(features, w):
    query, key, value, w = problem("clusters", features, w, torch.float32, n=30_000, m=20_000, channels=2)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_() for x in (query, key, value, w)]
            out, lse = nwfast.nadaraya_watson(*leaves, method="fgt", backend="native", return_lse=True)
            gradients = torch.autograd.grad(out.sum() + lse.sum(), leaves)
            one = nwfast.nadaraya_watson(*leaves[:2], value[:, :1], leaves[3], method="fgt", backend="native")
            by_tangents = torch.autograd.grad(one.sum(), [leaves[0], leaves[3]])
            results.append((out, lse, *gradients, *by_tangents))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("features", [2, 3])
def test_rows_that_are_no_numbers(features):
    query, key, value, w = problem("uniform", features, 5.0, torch.float32, n=2000)
    expected = nwfast.nadaraya_watson(query, key, value, w, method="fgt", backend="native")
    query[3, 0], query[5, 1] = torch.nan, torch.inf
    out = nwfast.nadaraya_watson(query, key, value, w, method="fgt", backend="native")
    assert out[[3, 5]].isnan().all()
    kept = torch.ones(len(query), dtype=torch.bool)
    kept[[3, 5]] = False
    assert torch.equal(out[kept], expected[kept])
    leaves = query.requires_grad_(), w.requires_grad_()
    out = nwfast.nadaraya_watson(leaves[0], key, value, leaves[1], method="fgt", backend="native")
    assert torch.autograd.grad(out.sum(), leaves, retain_graph=True)[1].isnan().all()
    by_query, by_w = torch.autograd.grad(out[kept].sum(), leaves)
    assert by_w.isfinite().all() and (by_query[~kept] == 0).all()
    key[7] = torch.nan  # counts for every row
    out = nwfast.nadaraya_watson(query, key, value, w, method="fgt", backend="native")
    assert out.isnan().all()


@pytest.mark.parametrize("features", [2, 3])
def test_auto_agrees_with_both(features):
    for w in (1.0, 30.0, 1000.0):
        query, key, value, w = problem("uniform", features, w, torch.float64, n=5000, m=4000)
        outs = [
            nwfast.nadaraya_watson(query, key, value, w, method=method, backend="native")
            for method in ("auto", "dense", "fgt")
        ]
        assert torch.equal(outs[0], outs[1]) or torch.equal(outs[0], outs[2])
        torch.testing.assert_close(outs[1], outs[2], rtol=0, atol=1e-12 * float(value.abs().max()))


def test_more_features_are_refused():
    four = torch.rand(5, 4)
    with pytest.raises(ValueError, match=r"up to 3 features on backend='native', got .* D = 4 features"):
        nwfast.nadaraya_watson(four, four, four, method="fgt", backend="native")
    with pytest.raises(ValueError, match=r"one feature on backend='numba', got .* D = 2 features"):
        nwfast.nadaraya_watson(four[:, :2], four[:, :2], four, method="fgt", backend="numba")


@every_other(
    "exclude_self, data",
    (True, False),
    [
        ("uniform", 3, 20000, 15.0),
        ("two cubes", 3, 60000, 25.0),  # one mesh for all boxes, with nothing in its corners
        ("uniform", 2, 8000, 20.0),
        ("clusters", 2, 20000, 60.0),
        ("circle", 2, 8000, 20.0),
    ],
)
def test_meshes_agree_with_series(exclude_self, data):
    """So many points have meshes in float32, and Chebyshev series in float64: all gradients."""
    kind, features, n, w = data
    generator = np.random.default_rng(5)
    query, key = (
        torch.from_numpy(places(kind, 2 * n, features, generator)).float().view(n, 2, features).unbind(1)
    )
    value, grad = (torch.from_numpy(generator.standard_normal((n, 2))).float() for _ in range(2))
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (query, key, value, torch.full((features,), w))]
        found = []
        # By all inputs, and by the query alone: w asks for second derivatives.
        for leaves in (inputs, inputs[:1]):
            others = [x.detach() for x in inputs[len(leaves) :]]
            out = nwfast.nadaraya_watson(
                *leaves, *others, exclude_self=exclude_self, backend="native", method="fgt"
            )
            found += [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]
        results.append(found)
    # A gradient of w is a sum over rows that cancels: in units of those of queries times distances of a bandwidth.
    terms = results[1][1].abs().sum() / w**2
    for place, (single, double) in enumerate(zip(*results, strict=True)):
        scale = 1e-2 * terms if place == 4 else double.abs().max()
        assert (single - double).abs().max() <= 1e-6 * scale, place


@pytest.mark.parametrize("features", [2, 3])
def test_second_derivatives_where_there_are_tangents(features):
    query, key, value, w = problem("uniform", features, 6.0, torch.float64, n=30, m=20)
    leaves = query.requires_grad_(), w.requires_grad_()

    def out(query, w):
        return nwfast.nadaraya_watson(query, key, value, w, method="fgt", backend="native")

    assert torch.autograd.gradcheck(out, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(out, leaves)


@pytest.mark.parametrize("weighted", [False, True], ids=["all", "leave-one-out, weights"])
@pytest.mark.parametrize("w", [1e-3, 7.0, 300.0], ids=["flat", "boxes", "windows"])
@pytest.mark.parametrize("features", [2, 3])
def test_tangents_of_all_channels(features, w, weighted, native):
    """D out / d query of one pass is w^2 times covariances: in boxes, in windows, far from all keys and next to one."""
    n, channels, rows = 8000, 9, torch.arange(0, 8000, 61)
    key = torch.rand(n, features, dtype=torch.float64)
    query = key + torch.randn(n, features, dtype=torch.float64) / (20 * w if w > 1 else 20)
    query[rows[:20]] += 15 / max(w, 1)
    query[rows[20:25]] += 100
    value = torch.randn(n, channels, dtype=torch.float64) + 5 * key[:, :1]
    scales = w * torch.arange(1, features + 1, dtype=torch.float64)
    key_weight = torch.rand(n, dtype=torch.float64) + 0.1 if weighted else None
    arguments = query, key, value, scales, key_weight, weighted
    out, _, _, _, tangents = schema.KERNELS[f"{native}_fgt"].forward(*arguments, False, True)
    scale = scales.square() / 2
    nearest = ((query[rows, None] - key).square() * scale).sum(-1).argmin(-1)
    star = key[nearest].unsqueeze(1)  # scores from its own, so that they do not cancel far away
    scores = -((star - key) * (2 * query[rows, None] - key - star) * scale).sum(-1)
    if weighted:
        scores = scores + key_weight.log()
        scores[torch.arange(len(rows)), rows] = -torch.inf
    p = torch.softmax(scores, -1)
    right = p @ value
    offsets = key - (p @ key).unsqueeze(-2)
    expected = scales.square()[:, None] * torch.stack(
        [
            (p * offsets[..., f]) @ value - right * (p * offsets[..., f]).sum(-1, keepdim=True)
            for f in range(features)
        ],
        -2,
    )
    assert tangents.shape == (n, features * channels)
    torch.testing.assert_close(out[rows], right, rtol=1e-11, atol=1e-11)
    found = tangents[rows].unflatten(-1, (features, channels)) / scales[:, None]
    expected = expected / scales[:, None]
    sizes = expected.abs().amax((-2, -1), keepdim=True)
    assert ((found - expected).abs() <= 1e-9 * sizes + 1e-12 * sizes.max()).all()
