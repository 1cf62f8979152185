"""KeyIndex: the same numbers as the op, whatever is prepared and kept."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import pairwise
from oracle import textbook

import nwfast

DTYPES = {torch.float32: 2e-6, torch.float64: 1e-12}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def data(dtype, n=3000, m=700, channels=()):
    """Unsorted keys with a gap, and queries beyond them."""
    key = torch.cat([torch.rand(n // 2), 2 + torch.rand(n - n // 2)]).to(dtype)[torch.randperm(n)]
    return key, torch.randn(n, *channels, dtype=dtype), (4 * torch.rand(m, dtype=dtype) - 0.5)


def close(found, exact, dtype, scale=1.0):
    torch.testing.assert_close(found.double(), exact, rtol=DTYPES[dtype], atol=DTYPES[dtype] * scale)


@pairwise("w, method, dtype", (0.0, 3.0, 200.0), ("auto", "dense", "fgt"), tuple(DTYPES))
def test_predictions(backend, method, w, dtype):
    key, value, query = data(dtype)
    index = nwfast.KeyIndex(key, value, method=method, backend=backend)
    exact, exact_lse = textbook(query.double(), key.double(), value.double(), w)
    for _ in range(2):  # made, then found
        out, lse = index(query, w, return_lse=True)
        assert out.dtype == dtype
        close(out, exact, dtype, value.abs().max().item())
        close(lse, exact_lse, dtype, exact_lse.abs().max().item())
    assert torch.equal(index(query, w), out)


def test_predictions_depend_on_nothing_before(backend, dtype):
    """Another w, other queries, one query: a kept state must not show."""
    key, value, query = data(dtype)
    index = nwfast.KeyIndex(key, value, backend=backend, method="fgt")
    for w in (3.0, 50.0, 3.0, torch.tensor([7.0], dtype=dtype), 0.0):
        fresh = nwfast.KeyIndex(key, value, backend=backend, method="fgt")
        assert torch.equal(index(query, w), fresh(query, w))
        close(
            index(query[:1], w), textbook(query[:1].double(), key.double(), value.double(), w)[0], dtype, 4.0
        )
    assert index(query[:0], 3.0).shape == (0,)


def test_odd_queries_get_what_the_op_gives(backend):
    key, value, _ = data(torch.float64)
    query = torch.tensor([0.3, float("nan"), 1e9, -1e30, float("inf"), 0.3], dtype=torch.float64)
    index = nwfast.KeyIndex(key, value, backend=backend, method="fgt")
    found = index(query, 20.0)
    expected = nwfast.nadaraya_watson(query, key, value, 20.0, backend=backend, method="fgt")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert found[1].isnan() and found[0] == found[5]
    assert found[2] == value[key.argmax()]


@pytest.mark.parametrize("method", ["dense", "fgt"])
def test_channels_weights_and_column_keys(backend, method):
    key, value, query = data(torch.float64, channels=(3,))
    weight = torch.rand(len(key), dtype=torch.float64)
    weight[::7] = 0
    exact, _ = textbook(query, key, value, 5.0, weight)
    flat = nwfast.KeyIndex(key, value, key_weight=weight, method=method, backend=backend)
    close(flat(query, 5.0), exact, torch.float64, 4.0)
    column = nwfast.KeyIndex(key[:, None], value, key_weight=weight, method=method, backend=backend)
    close(column(query[:, None], 5.0), exact, torch.float64, 4.0)


@pytest.mark.parametrize("method", ["dense", "fgt"])
@pytest.mark.parametrize("own", [True, False])
def test_leave_one_out_is_in_the_order_of_the_keys(backend, method, own):
    key, value, _ = data(torch.float64, n=500)
    index = nwfast.KeyIndex(key, value, method=method, backend=backend)
    query = key if own else key.clone()
    exact, exact_lse = textbook(key, key, value, 4.0, exclude_self=True)
    out, lse = index(query, 4.0, exclude_self=True, return_lse=True)
    close(out, exact, torch.float64, 4.0)
    close(lse, exact_lse, torch.float64, 10.0)


@pytest.mark.parametrize("method", ["dense", "fgt"])
def test_gradients_reach_everything(backend, method):
    key, value, query = data(torch.float64, n=400, m=90)
    weight = torch.rand(400, dtype=torch.float64) + 0.1
    w = torch.tensor(6.0, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, w, weight)]
    index = nwfast.KeyIndex(key, value, key_weight=weight, method=method, backend=backend)
    direction = torch.randn(90, dtype=torch.float64)
    exact = torch.autograd.grad(textbook(query, key, value, w, weight)[0], leaves, direction)
    for _ in range(2):  # the graph of one call must not be in the way of the next
        found = torch.autograd.grad(index(query, w), leaves, direction)
        for right, gradient in zip(exact, found, strict=True):
            torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-11)


def test_training_w(backend):
    key, value, _ = data(torch.float64, n=300)
    index = nwfast.KeyIndex(key, value, backend=backend)
    w, expected = (torch.tensor(2.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ((index(key, w, exclude_self=True) - value) ** 2).sum().backward()
    ((textbook(key, key, value, expected, exclude_self=True)[0] - value) ** 2).sum().backward()
    torch.testing.assert_close(w.grad, expected.grad, rtol=1e-10, atol=1e-10)


CHANGES = {
    "in place": lambda tensor, array: tensor.add_(1),
    "numpy": lambda tensor, array: array.__iadd__(1),
    "data": lambda tensor, array: tensor.data.neg_(),
    "assigned data": lambda tensor, array: setattr(tensor, "data", torch.zeros_like(tensor)),
}


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_copies(change, ascending):
    key, value, query = data(torch.float32)
    key = key.sort().values if ascending else key
    weight = torch.rand(len(key))
    tensors = {"key": key, "value": value, "key_weight": weight}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    for name in tensors:
        index = nwfast.KeyIndex(**tensors)
        twin = nwfast.KeyIndex(**{name: tensor.clone() for name, tensor in tensors.items()})
        if name == "key_weight":
            index(query, 2.0)  # compressed before the change
        CHANGES[change](tensors[name], arrays[name])
        for w in (2.0, 50.0, torch.tensor(3.0, requires_grad=True)):
            assert torch.equal(index(query, w), twin(query, w))


def test_made_in_inference_mode_it_serves_training():
    key, value, query = data(torch.float64, n=200)
    with torch.inference_mode():
        index = nwfast.KeyIndex(key + 0, value)
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    index(query, w).sum().backward()
    assert w.grad.abs() > 0


@pytest.mark.parametrize("method", ["auto", "dense", "fgt"])
def test_threads_with_other_bandwidths(backend, method):
    """The compressed keys of one call must not serve another's."""
    key, value, query = data(torch.float64, n=5000, m=200)
    index = nwfast.KeyIndex(key, value, backend=backend, method=method)
    ws = [2.0, 3.0, 40.0, 500.0]
    expected = [index(query, w) for w in ws]
    with ThreadPoolExecutor(4) as pool:
        same = pool.map(lambda i: torch.equal(index(query, ws[i % 4]), expected[i % 4]), range(200))
        assert all(same)


def test_leading_dimensions_of_w():
    key, value, query = data(torch.float64, n=300, m=20, channels=(2,))
    index = nwfast.KeyIndex(key, value)
    w = torch.tensor([[2.0], [30.0]], dtype=torch.float64)
    for exclude_self, x in ((False, query), (True, key)):
        out, lse = index(x, w, exclude_self=exclude_self, return_lse=True)
        for row in range(2):
            exact, exact_lse = textbook(x, key, value, w[row], exclude_self=exclude_self)
            close(out[row], exact, torch.float64, 10.0)
            close(lse[row], exact_lse, torch.float64, 10.0)
    assert index(query, w[:1, :1]).shape == (1, 20, 2)


def several(features, dtype, n=6000, m=900, channels=()):
    """Keys in a crowded square or cube with a few far off, and queries in it, beside it, and far away."""
    generator = torch.Generator().manual_seed(features)
    key, query = (torch.rand(size, features, generator=generator, dtype=torch.float64) for size in (n, m))
    key[:20] += 3
    query[: m // 10] = 4 * query[: m // 10] - 1.5
    query[0] = 1e4
    value = torch.randn(n, *channels, generator=generator, dtype=torch.float64)
    return key.to(dtype), value.to(dtype), query.to(dtype)


@pairwise(
    "features, w, method, dtype",
    (2, 3),
    (0.0, 1e-5, 2.0, (3.0, 7.0, 0.5), 300.0),
    ("auto", "fgt"),
    tuple(DTYPES),
)
def test_predictions_of_several_features(native, features, w, method, dtype):
    key, value, query = several(features, dtype)
    if isinstance(w, tuple):
        w = torch.tensor(w[:features], dtype=dtype)
    index = nwfast.KeyIndex(key, value, method=method, backend="native")
    exact, exact_lse = textbook(query.double(), key.double(), value.double(), w)
    for _ in range(2):
        out, lse = index(query, w, return_lse=True)
        close(out, exact, dtype, value.abs().max().item())
        close(lse, exact_lse, dtype, max(1.0, exact_lse.abs().max().item()))
    assert torch.equal(index(query, w), out)
    # In another order a sample of the queries is another, and with it the choice of a method or of boxes may be.
    close(index(query.flip(0), w).flip(0), exact, dtype, value.abs().max().item())


@pytest.mark.parametrize("features", [2, 3])
def test_crowded_boxes_serve_without_the_keys(native, features, monkeypatch):
    key, value, _ = several(features, torch.float32, n=40_000)
    query = torch.rand(500, features) * 0.8 + 0.1
    index = nwfast.KeyIndex(key[20:], value[20:], method="fgt", backend="native")
    expected = index(query, 2.0)
    monkeypatch.setattr(nwfast.index, "nadaraya_watson", lambda *_, **__: pytest.fail("the keys were asked"))
    assert torch.equal(index(query, 2.0), expected)
    assert index(query[:0], 2.0).shape == (0,)
    with pytest.raises(pytest.fail.Exception, match="the keys were asked"):
        index(query + 100, 2.0)


@pytest.mark.parametrize(("features", "n", "w"), [(2, 20_000, 60.0), (3, 60_000, 15.0)])
def test_boxes_with_meshes(native, features, n, w):
    """So many boxes have meshes in float32, and series in float64: what is prepared says which."""
    key, query = torch.rand(n, features), torch.rand(1000, features)
    value = torch.sin(7 * key.sum(1))
    out, lse = nwfast.KeyIndex(key, value, method="fgt", backend="native")(query, w, return_lse=True)
    inputs = query.double(), key.double(), value.double(), w
    exact, exact_lse = nwfast.nadaraya_watson(*inputs, method="fgt", backend="native", return_lse=True)
    close(out, exact, torch.float32, 1.0)
    close(lse, exact_lse, torch.float32, exact_lse.abs().max().item())


@pytest.mark.parametrize("features", [2, 3])
def test_options_with_several_features(backend, features):
    key, value, query = several(features, torch.float64, n=1500, m=200, channels=(3,))
    weight = torch.rand(len(key), dtype=torch.float64) + 0.1
    weight[::7] = 0
    odd = value.clone()
    odd[::7] = torch.nan  # left out
    index = nwfast.KeyIndex(key, odd, key_weight=weight, backend=backend)
    for w in (1.5, torch.full((features,), 1.5, dtype=torch.float64)):
        close(index(query, w), textbook(query, key, value, 1.5, weight)[0], torch.float64, 4.0)
    exact, exact_lse = textbook(key, key, value, 4.0, exclude_self=True)
    out, lse = nwfast.KeyIndex(key, value, backend=backend)(key, 4.0, exclude_self=True, return_lse=True)
    close(out, exact, torch.float64, 4.0)
    close(lse, exact_lse, torch.float64, 10.0)
    ws = torch.tensor([[2.0], [30.0]], dtype=torch.float64).expand(2, features)
    out = nwfast.KeyIndex(key, value, backend=backend)(query, ws)
    for row in range(2):
        close(out[row], textbook(query, key, value, ws[row])[0], torch.float64, 4.0)
    leaves = [
        tensor.requires_grad_() for tensor in (query, key, value, torch.tensor(3.0, dtype=torch.float64))
    ]
    index = nwfast.KeyIndex(key, value, backend=backend)
    direction = torch.randn(200, 3, dtype=torch.float64)
    exact_gradients = torch.autograd.grad(textbook(*leaves)[0], leaves, direction)
    for _ in range(2):
        found = torch.autograd.grad(index(leaves[0], leaves[3]), leaves, direction)
        for right, gradient in zip(exact_gradients, found, strict=True):
            torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-9)


def test_odd_values_and_queries_with_several_features(native):
    key, value, query = several(2, torch.float64)
    query[:4] = torch.tensor([[0.3, torch.nan], [torch.inf, 0.0], [1e200, 1e200], [0.5, 0.5]])
    for odd in (0.0, torch.nan, torch.inf):
        value[5] = odd
        index = nwfast.KeyIndex(key, value, backend="native", method="fgt")
        expected = nwfast.nadaraya_watson(query, key, value, 2.0, backend="native", method="fgt")
        torch.testing.assert_close(index(query, 2.0), expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_threads_and_copies_with_several_features(native):
    key, value, query = several(2, torch.float64)
    index = nwfast.KeyIndex(key, value, backend="native", method="fgt")
    ws = [2.0, 3.0, 4.0, 500.0]
    expected = [index(query, w) for w in ws]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda i: torch.equal(index(query, ws[i % 4]), expected[i % 4]), range(40)))
    twin = pickle.loads(pickle.dumps(index))
    key.zero_()
    value.neg_()
    for w, right in zip(ws, expected, strict=True):
        assert torch.equal(index(query, w), right)
        assert torch.equal(twin(query, w), right)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            fresh = copy.deepcopy(index)
            fresh._compressed = None
            assert torch.equal(fresh(query, 2.0), expected[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("features", [1, 2])
def test_torch_load_takes_it_with_weights_only(features, tmp_path):
    key, value, query = data(torch.float64, n=50, m=10) if features == 1 else several(2, torch.float64)
    weight = torch.rand(len(key), dtype=torch.float64)
    index = nwfast.KeyIndex(key, value, key_weight=weight, method="dense")
    index(query, 3.0)
    torch.save({"index": index}, tmp_path / "index.pt")
    twin = torch.load(tmp_path / "index.pt", weights_only=True)["index"]
    assert torch.equal(twin(query, 3.0), index(query, 3.0))
    assert torch.equal(twin(key, 3.0, exclude_self=True), index(key, 3.0, exclude_self=True))
    assert (twin.method, twin.backend) == ("dense", "auto")


def test_what_a_file_holds_is_checked(tmp_path, monkeypatch):
    index = nwfast.KeyIndex(torch.rand(5), torch.rand(5))
    state = {**index.__getstate__(), "value": torch.rand(2)}
    monkeypatch.setattr(nwfast.KeyIndex, "__getstate__", lambda self: state)
    torch.save(index, tmp_path / "index.pt")
    with pytest.raises(ValueError, match="value must have one row a key, N = 5, got 2 rows"):
        torch.load(tmp_path / "index.pt", weights_only=True)


def test_bad_input():
    x = torch.rand(5)
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor, got list"):
        nwfast.KeyIndex([1.0], x)
    with pytest.raises(
        ValueError, match=r"key must have shape \(N,\) or \(N, D\), D at most 3, got \(5, 4\)"
    ):
        nwfast.KeyIndex(torch.rand(5, 4), x)
    with pytest.raises(ValueError, match="value must have one row a key, N = 5, got 4 rows"):
        nwfast.KeyIndex(x, x[:4])
    with pytest.raises(ValueError, match="method must be 'auto' or one of"):
        nwfast.KeyIndex(x, x, method="sparse")
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        nwfast.KeyIndex(x, x, backend="abacus")
    index = nwfast.KeyIndex(x, x)
    with pytest.raises(ValueError, match="needs M == N, got M = 3, N = 5"):
        index(x[:3], 1.0, exclude_self=True)
    with pytest.raises(TypeError, match="query must be"):
        index(0.5, 1.0)


def test_it_names_itself_and_can_be_copied():
    key, value, query = data(torch.float32, n=50, m=10)
    index = nwfast.KeyIndex(key, value)
    assert len(index) == 50
    assert repr(index) == "KeyIndex(key (50,), value (50,), torch.float32, cpu)"
    assert torch.equal(copy.deepcopy(index)(query, 3.0), index(query, 3.0))
    assert torch.equal(pickle.loads(pickle.dumps(index))(query, 3.0), index(query, 3.0))
    key.requires_grad_()
    index = nwfast.KeyIndex(key * 1, value)
    assert index(query, 3.0).requires_grad
    for twin in (copy.deepcopy(index), copy.copy(index), pickle.loads(pickle.dumps(index))):
        assert torch.equal(twin(query, 3.0), index(query, 3.0).detach())
