"""Many features, dense: scores and sums as matrix products, and the rows that are left to differences."""

import exact
import pytest
import torch
from conftest import every_other

import nwfast

ROWS, KEYS = 107, 203  # no multiples of blocks, more than one tile of keys
DATA = (
    "normal", "leave-one-out", "near", "offset", "clusters", "one feature", "two directions", "outlier", "scales",
    "odd w", "wide",
)  # fmt: skip


def draw(kind: str, features: int, channels: int, rows: int = ROWS, keys: int = KEYS) -> list[torch.Tensor]:
    """Query, key, value and w in float32; distances are of some bandwidths."""
    generator = torch.Generator().manual_seed(features)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value, w = (
        rand(rows, features),
        rand(keys, features),
        rand(keys, channels),
        torch.ones(features).double(),
    )
    if kind == "near":
        query = key[torch.arange(rows) * 3 % keys] + 0.1 * query
    elif kind == "offset":
        query, key = query + 1000, key + 1000
    elif kind == "clusters":
        centres = 3 * rand(5, features)
        query, key = query + centres[torch.arange(rows) % 5], key + centres[torch.arange(keys) * 3 % 5]
    elif kind == "one feature":
        query, key = (torch.cat([features**0.5 * x[:, :1], 0.05 * x[:, 1:]], 1) for x in (query, key))
    elif kind == "two directions":
        directions = rand(2, features)
        query, key = query[:, :2] @ directions, key[:, :2] @ directions
    elif kind == "outlier":
        key[7] *= 1000
        query[5] = key[7] + 0.1 * query[5]
    elif kind == "scales":
        scales = 10 ** torch.linspace(-6, 6, features, dtype=torch.float64)
        query, key, w = query * scales, key * scales, 1 / scales
    elif kind == "odd w":
        w[::3] *= -1
        w[1] = 0
    elif kind == "wide":
        query, key = 6 * query, 6 * key
    return [x.float() for x in (query, key, value, w * features**-0.5)]


def check(
    inputs: list[torch.Tensor], what: str, key_weight=None, exclude_self: bool = False
) -> list[torch.Tensor]:
    """Every result and gradient against long double; returns them."""
    leaves = [x.clone().requires_grad_() for x in (*inputs, key_weight) if x is not None]
    out, lse = nwfast.nadaraya_watson(
        *leaves[:4], key_weight=leaves[4] if len(leaves) > 4 else None, exclude_self=exclude_self, return_lse=True,
        backend="native", method="dense",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    found = [out, lse, *torch.autograd.grad((out, lse), leaves, cotangents)]
    right = exact.solve(*inputs, key_weight, *cotangents, exclude_self=exclude_self)
    for name, result in zip(("out", "lse", "query", "key", "value", "w", "key_weight"), found, strict=False):
        exact.assert_accurate(result, right[name], f"{what}, {name}")
    return found


@every_other("kind, features", DATA, (16, 17, 31, 64, 100))
def test_accuracy(native, kind, features):
    check_accuracy(kind, features, KEYS)


SOME = (
    ("offset", 256),
    ("scales", 256),
    ("leave-one-out", 1000),
)  # the others, long to check, by `make test-full`


@pytest.mark.parametrize(
    ("kind", "features"),
    [
        pytest.param(kind, features, marks=[pytest.mark.full] * ((kind, features) not in SOME))
        for kind in DATA
        for features in (256, 1000)
    ],
)
def test_accuracy_with_many_features(native, kind, features):
    check_accuracy(kind, features, keys=103 if features == 1000 else KEYS)


def check_accuracy(kind: str, features: int, keys: int) -> None:
    alone = kind == "leave-one-out"
    inputs = draw(kind, features, 9, keys if alone else ROWS, keys)
    if alone:
        inputs[0] = inputs[1]
    check(inputs, f"{kind}, D = {features}", exclude_self=alone)


@pytest.mark.parametrize("features", [16, 64, 256])
@pytest.mark.parametrize("kind", ["normal", "near", "clusters", "one feature", "two directions"])
def test_as_good_as_the_textbook(native, kind, features):
    """Twice its error and 4 roundings, at three bandwidths from the centre of the keys."""
    query, key, value, w = draw(kind, features, 9, 100, 500)
    w = 3 * w
    outs = []
    for dtype in (torch.float64, torch.float32):
        distance = torch.cat(
            [((x - key.to(dtype)) * w.to(dtype)).square().sum(-1) for x in query.to(dtype)[:, None].split(1)]
        )
        outs.append(torch.softmax(-distance.reshape(100, 500) / 2, 1) @ value.to(dtype))
    out = nwfast.nadaraya_watson(query, key, value, w, backend="native", method="dense")
    error, textbook = (float((x - outs[0]).abs().max()) for x in (out, outs[1]))
    assert error <= 2 * textbook + 4 * 2.0**-23 * float(outs[0].abs().max())


@pytest.mark.parametrize("channels", [1, 3, 64, 100])
@pytest.mark.parametrize(("rows", "keys"), [(1, 203), (96, 1), (97, 16), (95, 95), (144, 96), (99, 97)])
def test_shapes(native, rows, keys, channels):
    check(draw("normal", 33, channels, rows, keys), f"M, N, C = {rows}, {keys}, {channels}")


@pytest.mark.parametrize("exclude_self", [False, True])
def test_key_weights(native, exclude_self):
    """Also some of 0, of a key with NaN and with infinity in it, and of much less than others."""
    query, key, value, w = draw("normal", 40, 5, KEYS)
    weight = torch.linspace(0.1, 2, KEYS) ** 3
    weight[::17], key[17, 3], value[34, 2], weight[5] = 0, torch.nan, torch.inf, 1e-9
    check([query, key, value, w], "weights", weight, exclude_self)


def test_batches_with_a_w_each(native):
    """Heads of keys that two batch elements share."""
    inputs = [draw("normal", 32, 8) for _ in range(3)]
    query, key, value, w = (torch.stack(x) for x in zip(*inputs, strict=True))
    query = torch.stack([query, query.flip(1)])
    w = w * torch.tensor([0.5, 1, 2])[:, None]
    check([query, key[None], value[None], w], "batches")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(native, dtype):
    check([x.to(dtype) for x in draw("normal", 64, 16)], "halves")


def test_rows_of_all_kinds_in_one_call(native):
    """Far away, on a key, and the rest; NaN in a row of them changes no other."""
    query, key, value, w = draw("normal", 48, 10)
    query[20], query[30] = 1e4, key[8]
    query[40:44] += 50
    out, *_ = check([query, key, value, w], "all kinds")
    query[3, 5] = torch.nan
    found = nwfast.nadaraya_watson(query, key, value, w, backend="native", method="dense")
    assert found[3].isnan().all()
    found[3] = out.detach()[3]
    assert torch.equal(found, out.detach())


def test_values_that_are_not_finite(native):
    query, key, value, w = draw("normal", 32, 4)
    value[3, 1], value[4, 2] = torch.nan, torch.inf
    out = nwfast.nadaraya_watson(query, key, value, w, backend="native", method="dense")
    assert out[:, 1].isnan().all() and (out[:, 2] == torch.inf).all()
    value[3:5] = 0
    finite = nwfast.nadaraya_watson(query, key, value, w, backend="native", method="dense")
    assert (out[:, [0, 3]] - finite[:, [0, 3]]).isfinite().all()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "w", "qw", "kv", "qv", "wk"])
def test_some_gradients_are_those_of_all(native, wanted):
    """To rounding: one pass may give both sides."""
    inputs = dict(zip("qkvw", draw("normal", 48, 10), strict=True))
    grads = []
    for letters in ("qkvw", wanted):
        leaves = {letter: x.clone().requires_grad_(letter in letters) for letter, x in inputs.items()}
        out = nwfast.nadaraya_watson(*leaves.values(), backend="native", method="dense")
        grads.append(
            dict(
                zip(letters, torch.autograd.grad(out.sin().sum(), [leaves[x] for x in letters]), strict=True)
            )
        )
    for letter in wanted:
        torch.testing.assert_close(grads[1][letter], grads[0][letter], rtol=1e-5, atol=1e-6)


def test_bits_do_not_depend_on_threads(native):
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    try:
        for shape in ((), (5,)):
            leaves = [torch.randn(*shape, 400, size, generator=generator) for size in (40, 40, 20)]
            leaves[0][..., ::7, :] += 9  # left to differences
            leaves = [x.requires_grad_() for x in (*leaves, torch.full((40,), 0.2))]
            runs = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                out, lse = nwfast.nadaraya_watson(*leaves, backend="native", method="dense", return_lse=True)
                runs.append((out, lse, *torch.autograd.grad((out.square().sum(), lse.sum()), leaves)))
            for run in runs[1:]:
                assert all(map(torch.equal, run, runs[0]))
    finally:
        torch.set_num_threads(before)
