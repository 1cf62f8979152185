"""The module NWKernelRegression: the chapter's own, trained, copied, compiled, exported, parametrized.

One file, long as it is: all of it is about one class, on one set of data, and most tests put another of PyTorch's ways
to treat modules beside the same call.
"""

import copy
import inspect
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

import nwfast
from nwfast import datasets
from nwfast.demo.chapter import train

NWKernelRegression = nwfast.NWKernelRegression


class Textbook(nn.Module):
    """The chapter's module: the matrix is built, and kept with its graph."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.rand((1,)))

    def forward(self, queries, keys, values):
        queries = queries.repeat_interleave(keys.shape[1]).reshape(-1, keys.shape[1])
        self.attention_weights = torch.softmax(-(((queries - keys) * self.w) ** 2) / 2, dim=1)
        return torch.bmm(self.attention_weights.unsqueeze(1), values.unsqueeze(-1)).reshape(-1)


def leave_one_out(column):
    """(n,) as n rows without the diagonal, (n, n - 1)."""
    n = len(column)
    return column.repeat(n, 1)[~torch.eye(n, dtype=torch.bool)].reshape(n, n - 1)


def textbook_training(x, y, start, epochs=5, lr=0.5):
    net = Textbook().to(x.dtype)
    net.w.data.fill_(start)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr)
    keys, values = leave_one_out(x), leave_one_out(y)
    losses, ws = [], []
    for _ in range(epochs):
        optimiser.zero_grad()
        loss = ((net(x, keys, values) - y) ** 2 / 2).sum()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        ws.append(net.w.item())
    return losses, ws


@pytest.fixture
def data():
    return datasets.chapter(seed=1, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
def test_training_is_the_chapters_step_by_step(seed, backend):
    x, y, _, _ = datasets.chapter(seed=seed, dtype=torch.float64)
    run = train(NWKernelRegression(w=0.6, backend=backend, dtype=torch.float64), x, y)
    losses, ws = textbook_training(x, y, 0.6)
    torch.testing.assert_close(run.losses, losses, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(run.ws, ws, rtol=1e-10, atol=1e-10)
    assert abs(ws[-1] - 0.6) > 1  # the run did something


def test_training_in_the_reference_is_the_chapters(data):
    run = train(
        NWKernelRegression(w=0.6, backend="reference", dtype=torch.float64), data.x_train, data.y_train
    )
    losses, ws = textbook_training(data.x_train, data.y_train, 0.6)
    torch.testing.assert_close((run.losses, run.ws), (losses, ws), rtol=1e-12, atol=1e-12)


def test_per_query_keys_train_as_shared_keys_without_oneself(data, backend):
    x, y = data.x_train, data.y_train
    tiled, shared = (NWKernelRegression(w=0.7, backend=backend, dtype=x.dtype) for _ in range(2))
    for out in (tiled(x, leave_one_out(x), leave_one_out(y)), shared(x, x, y, exclude_self=True)):
        ((out - y) ** 2 / 2).sum().backward()
    torch.testing.assert_close(tiled.w.grad, shared.w.grad, rtol=1e-11, atol=0)


def test_loss_is_scaled_to_fifty_examples():
    x, y, _, _ = datasets.chapter(200, seed=3, dtype=torch.float64)
    net = NWKernelRegression(w=0.8, dtype=torch.float64)
    run = train(net, x, y, epochs=1)
    with torch.no_grad():
        expected = (
            (NWKernelRegression(w=0.8, dtype=x.dtype)(x, x, y, exclude_self=True) - y) ** 2 / 2
        ).sum() / 4
    assert run.losses == pytest.approx([expected.item()], rel=1e-12)


def test_same_constructor_parameter_and_output_as_the_chapter(data):
    torch.manual_seed(5)
    textbook = Textbook()
    torch.manual_seed(5)
    net = NWKernelRegression()
    assert [(name, p.shape) for name, p in net.named_parameters()] == [("w", (1,))]
    assert torch.equal(net.w, textbook.w)
    net.load_state_dict(textbook.state_dict())

    x, y, x_test = (column.float() for column in data[:3])
    keys, values = x.repeat(len(x_test), 1), y.repeat(len(x_test), 1)
    torch.testing.assert_close(
        net(x_test, keys, values), textbook(x_test, keys, values), rtol=2e-6, atol=1e-6
    )
    assert net.attention_weights.shape == textbook.attention_weights.shape
    torch.testing.assert_close(
        net.attention_weights, textbook.attention_weights.detach(), rtol=2e-5, atol=1e-7
    )


def test_start_is_uniform_on_the_unit_interval():
    ws = torch.cat([NWKernelRegression().w.detach() for _ in range(400)])
    assert ((ws >= 0) & (ws < 1)).all()
    counts = torch.histc(ws, 4, 0, 1)
    assert counts.min() > 60


def test_unknown_constructor_argument_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        NWKernelRegression(width=1)


@pytest.mark.parametrize("channels", [None, 3])
def test_general_form_with_a_w_for_each_head_and_feature(channels):
    query, key = torch.randn(2, 4, 7, 3), torch.randn(2, 4, 9, 3)
    value = torch.randn(2, 4, 9) if channels is None else torch.randn(2, 4, 9, channels)
    w = torch.rand(4, 1, 3)[:, 0]  # (heads, D)
    net = NWKernelRegression(w=w)
    assert net.w.shape == (4, 3)
    assert net.w.data_ptr() != w.data_ptr()
    out = net(query, key, value)
    torch.testing.assert_close(out, nwfast.nadaraya_watson(query, key, value, w))
    weights = net.attention_weights
    assert weights.shape == (2, 4, 7, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
    pooled = (weights @ (value if channels else value.unsqueeze(-1))).reshape(out.shape)
    torch.testing.assert_close(pooled, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_attention_weights_are_those_of_the_last_call(data, exclude_self):
    x, y = data.x_train, data.y_train
    net = NWKernelRegression(w=2.0, dtype=x.dtype)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    out = net(x, x, y, exclude_self=exclude_self)
    out.sum().backward()
    optimiser.step()
    assert net.w.item() != 2.0
    weights = net.attention_weights
    assert not weights.requires_grad
    torch.testing.assert_close(weights.sum(1), torch.ones_like(x))
    torch.testing.assert_close(weights @ y, out.detach())
    assert (weights.diagonal() == 0).all() == exclude_self


def test_attention_weights_need_a_call():
    net = NWKernelRegression()
    with pytest.raises(AttributeError, match="there is none yet"):
        _ = net.attention_weights
    assert not hasattr(net, "attention_weights")
    assert getattr(net, "attention_weights", None) is None
    with pytest.raises(AttributeError, match="no attribute 'attention_weight'"):
        _ = net.attention_weight
    assert "w" in dict(inspect.getmembers(net))


CHANGES = {
    "in place": lambda tensor, array: tensor.mul_(2),
    "numpy": lambda tensor, array: array.__imul__(2),
    "data": lambda tensor, array: tensor.data.neg_(),
    "assigned data": lambda tensor, array: setattr(tensor, "data", torch.zeros_like(tensor)),
}


def array_of(tensor, change):
    """The array over a tensor's memory, for those changes that need one; there is none on another device."""
    if change != "numpy":
        return None
    if tensor.device.type != "cpu":
        pytest.skip("numpy has no arrays on this device")
    return tensor.numpy()


@pytest.mark.parametrize("change", CHANGES)
def test_attention_weights_are_of_the_data_at_the_time_of_the_call(data, change):
    for name in ("queries", "keys", "w"):
        net = NWKernelRegression(dtype=torch.float64)
        tensors = {"queries": data.x_test.clone(), "keys": data.x_train.clone(), "w": net.w.detach()}
        expected = nwfast.attention_weights(*tensors.values())
        net(tensors["queries"], tensors["keys"], data.y_train)
        CHANGES[change](tensors[name], array_of(tensors[name], change))
        assert torch.equal(net.attention_weights, expected)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("n", [50, 5000])
def test_no_call_remembers_the_data_of_another(change, n):
    """Repeated calls with the same tensors, whose content changes by ways that no version counter sees."""
    x, y = torch.rand(n) * 5, torch.randn(n)
    queries = torch.rand(20) * 5
    net = NWKernelRegression(w=2.0).eval()
    for _ in range(3):
        net(queries, x, y)
    for tensor in (y, x):
        CHANGES[change](tensor, array_of(tensor, change))
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with context():
                found = net(queries, x, y)
            assert torch.equal(found.detach(), nwfast.nadaraya_watson(queries, x, y, net.w).detach())


@pytest.mark.parametrize("n", [50, 4500])
def test_threads_get_the_results_and_weights_of_their_own_calls(n):
    net = NWKernelRegression(w=2.0).eval()
    sets = [(torch.rand(n).sort().values, torch.full((n,), float(i))) for i in range(4)]
    queries = torch.rand(3)

    def work(i):
        keys, values = sets[i]
        expected = nwfast.attention_weights(queries, keys, 2.0)
        for _ in range(50):
            with torch.no_grad():
                out = net(queries, keys, values)
            torch.testing.assert_close(out, torch.full_like(out, i), rtol=1e-5, atol=0)
            assert torch.equal(net.attention_weights, expected)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert net.attention_weights.shape == (3, n)  # a thread without a call of its own: the last of all


def test_attention_weights_beyond_any_memory(device):
    net = NWKernelRegression(method="fgt" if device.type == "cpu" else "auto")
    x = torch.linspace(0, 1, 70_000)
    net(x, x, x)
    with pytest.raises(RuntimeError, match="some of the queries at a time"):
        _ = net.attention_weights
    assert net._last_call.queries is None


def test_failed_call_keeps_the_weights_of_the_call_before(data):
    net = NWKernelRegression(dtype=torch.float64)
    net(data.x_test[:3], data.x_train, data.y_train)
    with pytest.raises(ValueError, match="value"):
        net(data.x_test, data.x_train, data.y_train[:-1])
    assert net.attention_weights.shape == (3, 50)


def test_last_call_holds_no_graph():
    x = torch.rand(5, requires_grad=True)
    net = NWKernelRegression()
    net(x * 2, x * 3, torch.rand(5))
    held = [value for value in net._last_call if isinstance(value, torch.Tensor)]
    assert len(held) == 3
    assert all(value.grad_fn is None and not value.requires_grad for value in held)


def test_exclude_self_option_acts_in_training_mode_alone(data):
    x, y = data.x_train, data.y_train
    net = NWKernelRegression(w=2.0, exclude_self=True, dtype=x.dtype)
    without = nwfast.nadaraya_watson(x, x, y, 2.0, exclude_self=True)
    with_all = nwfast.nadaraya_watson(x, x, y, 2.0)
    assert (without - with_all).abs().max() > 0.1
    torch.testing.assert_close(net(x, x, y).detach(), without)
    torch.testing.assert_close(net(x, x, y, exclude_self=False).detach(), with_all)
    net.eval()
    torch.testing.assert_close(net(x, x, y).detach(), with_all)
    torch.testing.assert_close(net(x, x, y, exclude_self=True).detach(), without)
    assert net(data.x_test[:7], x, y).shape == (7,)


def test_prediction_in_training_mode_with_exclude_self_is_refused(data):
    net = NWKernelRegression(exclude_self=True, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"exclude_self.* M == N"):
        net(data.x_test[:7], data.x_train, data.y_train)


def test_log_bandwidth_is_learned_and_w_stays_positive(data):
    x, y = data.x_train, data.y_train
    net = NWKernelRegression(w=-2.0, log_bandwidth=True, dtype=x.dtype)
    assert list(net.state_dict()) == ["log_bandwidth"]
    torch.testing.assert_close(net.w.detach(), torch.tensor([2.0], dtype=x.dtype))
    ((net(x, x, y, exclude_self=True) - y) ** 2).sum().backward()
    plain = NWKernelRegression(w=2.0, dtype=x.dtype)
    ((plain(x, x, y, exclude_self=True) - y) ** 2).sum().backward()
    # w = exp(-log h), so dL/d(log h) = -w dL/dw
    torch.testing.assert_close(net.log_bandwidth.grad, -2 * plain.w.grad)
    net.log_bandwidth.data.fill_(50.0)
    assert net.w.item() > 0
    assert not hasattr(plain, "log_bandwidth")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"w": 0.0, "log_bandwidth": True}, "must not be 0 with log_bandwidth"),
        ({"w": float("nan")}, "w must be finite, got nan"),
        ({"w": torch.tensor([1.0, float("inf")])}, "w must be finite"),
        ({"method": "sparse"}, "method must be 'auto' or one of"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        NWKernelRegression(**options)


def test_method_and_backend_are_passed_on(data):
    net = NWKernelRegression(backend="nonsense", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*got 'nonsense'"):
        net(data.x_test, data.x_train, data.y_train)
    net = NWKernelRegression(dtype=torch.float64)
    net.method = "nonsense"
    with pytest.raises(ValueError, match="method must be"):
        net(data.x_test, data.x_train, data.y_train)


def test_float32_parameter_with_float64_data_computes_in_float64(data):
    net, textbook = NWKernelRegression(w=1.5), Textbook()
    textbook.w.data.fill_(1.5)
    x, y, x_test, _ = data
    keys, values = x.repeat(50, 1), y.repeat(50, 1)
    out, expected = net(x_test, keys, values), textbook(x_test, keys, values)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert net.w.grad.dtype == torch.float32
    torch.testing.assert_close(net.w.grad, textbook.w.grad)


def test_wider_parameter_than_data_is_refused(data):
    net = NWKernelRegression(dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"w must have the dtype of query, torch\.float32, got torch\.float64"
    ):
        net(*(column.float() for column in (data.x_test, data.x_train, data.y_train)))


@pytest.mark.parametrize("copy_of", ["pickle", "deepcopy", "copy", "save"])
@pytest.mark.parametrize("log_bandwidth", [False, True])
def test_copies_carry_the_parameter_and_leave_the_data(data, copy_of, log_bandwidth):
    def saved(net):
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    copies = {
        "pickle": lambda net: pickle.loads(pickle.dumps(net)),
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "save": saved,
    }
    net = NWKernelRegression(w=3.0, exclude_self=True, log_bandwidth=log_bandwidth, dtype=torch.float64)
    x = data.x_train.clone().requires_grad_()
    expected = net(x * 1.0, x, data.y_train)
    size = len(pickle.dumps(net))
    twin = copies[copy_of](net)
    with pytest.raises(AttributeError, match="there is none yet"):
        _ = twin.attention_weights
    assert net.attention_weights.shape == (50, 50)
    assert torch.equal(twin(x, x, data.y_train), expected)
    twin(x.detach().repeat(100), x.detach().repeat(100), data.y_train.repeat(100))
    assert len(pickle.dumps(twin)) == size


def test_double_backward(data):
    x, y = data.x_train[::5], data.y_train[::5]

    def loss(net):
        return ((net(x, x, y, exclude_self=True) - y) ** 2).sum()

    def textbook_loss(w):
        weights = torch.softmax(-(((x[:, None] - leave_one_out(x)) * w) ** 2) / 2, dim=1)
        return (((weights * leave_one_out(y)).sum(1) - y) ** 2).sum()

    net = NWKernelRegression(w=1.3, dtype=x.dtype)
    (first,) = torch.autograd.grad(loss(net), net.w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), net.w)
    expected = torch.autograd.functional.hessian(textbook_loss, torch.tensor([1.3], dtype=x.dtype))
    torch.testing.assert_close(second, expected[0])


def test_torch_func_gives_the_gradient_and_leaves_no_weights(data):
    x, y, x_test, _ = data
    net = NWKernelRegression(w=1.3, dtype=x.dtype)

    def total(w):
        return functional_call(net, {"w": w}, (x_test, x, y)).sum()

    gradient = torch.func.grad(total)(net.w.detach())
    with pytest.raises(AttributeError, match=r"torch\.func"):
        _ = net.attention_weights
    net(x_test, x, y).sum().backward()
    torch.testing.assert_close(gradient, net.w.grad)


@pytest.mark.parametrize("log_bandwidth", [False, True])
def test_compiles_in_one_graph_and_gives_the_weights(data, log_bandwidth):
    x, y, x_test, _ = data
    net = NWKernelRegression(w=1.3, log_bandwidth=log_bandwidth, dtype=x.dtype)
    expected = net(x_test, x, y)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), list(net.parameters()))
    net._last_call = None
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    out = compiled(x_test, x, y)
    torch.testing.assert_close(out, expected)
    (gradient,) = torch.autograd.grad(out.sum(), list(net.parameters()))
    torch.testing.assert_close(gradient, expected_gradient)
    torch.testing.assert_close(net.attention_weights @ y, out.detach())


def test_exports(data):
    arguments = data.x_test, data.x_train, data.y_train
    net = NWKernelRegression(w=1.3, dtype=torch.float64)
    exported = torch.export.export(net, arguments)
    assert list(exported.state_dict) == ["w"]
    torch.testing.assert_close(exported.module()(*arguments), net(*arguments))


def test_parametrizes(data):
    class Positive(nn.Module):
        def forward(self, raw):
            return raw.exp()

    net = NWKernelRegression(w=0.5, dtype=torch.float64)
    nn.utils.parametrize.register_parametrization(net, "w", Positive())
    expected = nwfast.nadaraya_watson(
        data.x_test, data.x_train, data.y_train, float(torch.tensor(0.5).double().exp())
    )
    torch.testing.assert_close(net(data.x_test, data.x_train, data.y_train).detach(), expected)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning", "ignore:Converting a tensor to a Python boolean"
)
def test_traces_a_fresh_module(data):
    arguments = tuple(column.clone() for column in (data.x_test, data.x_train, data.y_train))
    net = NWKernelRegression(w=1.3, dtype=torch.float64).eval()
    traced = torch.jit.trace(net, arguments)
    for m, n in ((50, 50), (7, 30)):
        cut = arguments[0][:m], arguments[1][:n], arguments[2][:n]
        torch.testing.assert_close(traced(*cut), nwfast.nadaraya_watson(*cut, net.w))


def test_prunes_and_restores(data):
    key, value, query = torch.rand(9, 2), torch.rand(9), torch.rand(5, 2)
    net = NWKernelRegression(w=torch.tensor([2.0, 0.1]))
    prune.l1_unstructured(net, "w", amount=1)
    assert net.w.tolist() == [2.0, 0.0]
    out = net(query, key, value)
    torch.testing.assert_close(out, nwfast.nadaraya_watson(query, key, value, torch.tensor([2.0, 0.0])))
    out.sum().backward()
    assert net.w_orig.grad[0] != 0
    assert net.w_orig.grad[1] == 0
    prune.remove(net, "w")
    assert isinstance(net.w, nn.Parameter)
    assert list(net.state_dict()) == ["w"]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm(data):
    arguments = data.x_test, data.x_train, data.y_train
    for normalise in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        net = NWKernelRegression(w=1.3, dtype=torch.float64)
        expected = net(*arguments).detach()
        normalise(net, "w")
        out = net(*arguments)
        torch.testing.assert_close(out.detach(), expected)
        out.sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())


def test_parametrization_is_removed(data):
    net = NWKernelRegression(w=0.5)
    nn.utils.parametrize.register_parametrization(net, "w", nn.Softplus())
    assert net.w.item() == pytest.approx(nn.functional.softplus(torch.tensor(0.5)).item())
    nn.utils.parametrize.remove_parametrizations(net, "w")
    assert [name for name, _ in net.named_parameters()] == ["w"]


def test_assigning_w(data):
    plain, log = NWKernelRegression(w=1.0), NWKernelRegression(w=1.0, log_bandwidth=True)
    parameter = nn.Parameter(torch.tensor([3.0]))
    plain.w = parameter
    assert plain.w is parameter
    with pytest.raises(TypeError, match="cannot assign"):
        plain.w = 2.0
    for value in (parameter, torch.tensor(-3.0), 3, 3.0):
        log.log_bandwidth.data.zero_()
        log.w = value
        torch.testing.assert_close(log.w.detach(), torch.tensor([3.0]))
        assert [name for name, _ in log.named_parameters()] == ["log_bandwidth"]
    for value, match in ((0.0, "must not be 0"), (torch.inf, "must be finite"), (torch.ones(2), "shape")):
        with pytest.raises(ValueError, match=match):
            log.w = value
    torch.testing.assert_close(log.w.detach(), torch.tensor([3.0]))


def test_inference_mode(data):
    net = NWKernelRegression(dtype=torch.float64)
    with torch.inference_mode():
        x = data.x_train + 1
        net(x, x, data.y_train)
    assert net.attention_weights.shape == (50, 50)


def test_repr_tells_the_options():
    net = NWKernelRegression(w=torch.ones(3), exclude_self=True, log_bandwidth=True, backend="reference")
    assert (
        repr(net) == "NWKernelRegression(w=(3,), log_bandwidth=True, exclude_self=True, backend='reference')"
    )
    assert repr(NWKernelRegression()) == "NWKernelRegression()"
