"""KeyIndex: the same numbers as the op, whatever is prepared and kept."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
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


@pytest.mark.parametrize("method", ["auto", "dense", "fgt"])
@pytest.mark.parametrize("w", [0.0, 3.0, 200.0])
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


def test_bad_input():
    x = torch.rand(5)
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor, got list"):
        nwfast.KeyIndex([1.0], x)
    with pytest.raises(
        ValueError, match=r"key must have shape \(N,\) or \(N, 1\), one feature, got \(5, 2\)"
    ):
        nwfast.KeyIndex(torch.rand(5, 2), x)
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
