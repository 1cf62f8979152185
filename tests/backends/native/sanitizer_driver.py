"""Runs the C++ kernels over odd shapes; test_sanitizers.py starts it in a process with the sanitizers' build.

Sizes stand on both sides of every vector and tile width. Results are compared with the reference, loosely: the point
is what memory the kernels touch on the way. With "fewer", as many forms, in fewer points of one feature and channel.
"""

import importlib
import itertools
import sys

import numpy as np
import torch

import nwfast

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257, 1000)
WIDTHS = ((1, 1), (1, 2), (1, 17), (2, 1), (3, 1), (3, 5), (3, 64), (9, 33), (70, 3))  # features, channels
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def check(query, key, value, w, method="dense", **options) -> None:
    """Forward and backward to everything that asks for a gradient, native against the reference."""
    leaves = [tensor for tensor in (query, key, value, w, options.get("key_weight")) if tensor is not None]
    results = []
    for backend in ("native", "reference"):
        inputs = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves]
        weight = {"key_weight": inputs[4]} if len(inputs) == 5 else {}
        chosen = {**options, **weight, "method": method if backend == "native" else "auto"}
        out = nwfast.nadaraya_watson(*inputs[:4], **chosen, backend=backend)
        outputs = [part.double() for part in (out if isinstance(out, tuple) else (out,))]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        if wanted:
            loss = sum(
                (output * torch.sin(torch.arange(output.numel())).view_as(output)).sum() for output in outputs
            )
            outputs += [gradient.double() for gradient in torch.autograd.grad(loss, wanted)]
        results.append(outputs)
    tolerance = TOLERANCE[query.dtype]
    steepest = float(
        w.detach().double().square().amax()
    )  # the size of the terms that cancel in the keys' gradient
    for native, reference in zip(*results, strict=True):
        largest = float(reference.detach().nan_to_num().abs().amax()) if reference.numel() else 0.0
        scale = max(1.0, largest, steepest)
        torch.testing.assert_close(
            native, reference, rtol=0, atol=tolerance * scale, equal_nan=True,
            msg=lambda text: f"{text}\nM, N, D, C {sizes_of(query, key, value)}, {query.dtype}, {list(options)}",
        )  # fmt: skip


def sizes_of(query, key, value) -> tuple:
    return tuple(query.shape), tuple(key.shape), tuple(value.shape)


def general_form(generator: np.random.Generator) -> None:
    """(..., M, D) tensors of all dtypes with random options, layouts and gradients asked for."""

    def coin() -> bool:
        return bool(generator.random() < 0.4)

    def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        drawn = torch.from_numpy(generator.uniform(0, 2, shape)).to(dtype)
        if len(shape) > 1 and coin():  # columns, not rows, lie together
            drawn = drawn.mT.contiguous().mT
        return drawn.requires_grad_(coin())

    for number, (n_keys, (features, channels)) in enumerate(itertools.product(SIZES, WIDTHS)):
        dtype = DTYPES[number % len(DTYPES)]
        exclude_self = n_keys < 300 and coin()
        n_queries = n_keys if exclude_self else int(generator.choice(SIZES[:14]))
        batch = ((), (), (2,), (2, 3))[int(generator.integers(4))] if n_keys < 200 else ()
        shared = (1,) * len(batch)
        query = tensor(dtype, *batch, n_queries, features)
        key = tensor(dtype, *(shared if coin() else batch), n_keys, features)
        value = tensor(dtype, *batch, n_keys, channels)
        if coin():
            value = value.detach()[..., :1].expand(*batch, n_keys, channels)  # stride 0
        w = tensor(dtype, *(batch if coin() else ()), features if coin() else 1)
        options = {"exclude_self": exclude_self, "return_lse": coin()}
        if coin():
            options["key_weight"] = tensor(dtype, *(shared if coin() else batch), n_keys)
        check(query, key, value, w, **options)


def one_feature(generator: np.random.Generator, fewer: bool) -> None:
    """The (M,) and (M, N) forms, keys sorted or not, bandwidths from flat to one-hot, queries beyond the data."""
    sizes = SIZES[:-1] if fewer else SIZES
    for n_keys, w in itertools.product(sizes, (0.0, 0.7, 40.0, 3e4)):
        query = torch.from_numpy(generator.uniform(-3, 8, int(generator.choice(sizes)))).requires_grad_()
        key = torch.from_numpy(np.sort(generator.uniform(0, 5, n_keys))).requires_grad_()
        value = torch.from_numpy(generator.normal(size=n_keys)).requires_grad_()
        bandwidth = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        check(query, key, value, bandwidth)
        check(
            query.detach().float(), key.detach().float(), value.detach().float(), bandwidth.detach().float()
        )
        shuffled = key.detach()[torch.from_numpy(generator.permutation(n_keys))].requires_grad_()
        check(shuffled, shuffled, value, bandwidth, exclude_self=True)
    for n_queries, n_keys in ((1, 1), (5, 49), (50, 17), (33, 130)):
        rows = torch.from_numpy(generator.uniform(0, 5, (2, n_queries, n_keys))).float().requires_grad_()
        query = torch.linspace(-1, 6, n_queries, requires_grad=True)
        check(query, rows[0], rows[1], torch.ones(1, requires_grad=True))


def fast_gauss_transform(generator: np.random.Generator, fewer: bool) -> None:
    """Crowded and empty boxes, gaps with and without queries, duplicates, masked keys, channels and batches."""
    part = 4 if fewer else 1
    clusters = np.r_[
        generator.normal(size=700 // part),
        generator.uniform(0, 40, 300 // part),
        np.full(300 // part, 3.0),
        90,
        91,
    ]
    uniform = generator.uniform(0, 5, 1500 // part)
    keys = {"uniform": uniform, "clusters": clusters, "few": generator.uniform(0, 5, 9)}
    for (name, drawn), w in itertools.product(keys.items(), (0.0, 0.3, 5.0, 80.0, 3e3)):
        n = len(drawn)
        query = np.r_[generator.uniform(-3, 8, 500 // part), drawn[: n // 2], [200.0, 3e4]]
        dtype = torch.float64 if name != "uniform" or w > 1 else torch.float32
        arrays = query, drawn, np.sin(drawn), generator.uniform(0.1, 2, n)
        tensors = [torch.from_numpy(array).to(dtype) for array in arrays]
        tensors[3][::5] = 0
        bandwidth = torch.tensor(w, dtype=dtype, requires_grad=True)
        leaves = [tensor.requires_grad_() for tensor in tensors]
        near = leaves[0].detach()[:-2].requires_grad_()
        check(leaves[0].detach(), *leaves[1:3], bandwidth.detach(), method="fgt")
        check(near, *leaves[1:3], bandwidth, method="fgt", return_lse=True)
        sorted_key = tensors[1].detach().sort().values.requires_grad_()
        check(sorted_key, sorted_key, leaves[2], bandwidth, method="fgt", exclude_self=True)
        channels = torch.stack([tensors[2].detach()] * 3, -1).requires_grad_()
        check(near, leaves[1], channels, bandwidth, method="fgt")
        if w < 1:  # a masked key amid a wide gap has too large a gradient to compare
            check(near, *leaves[1:3], bandwidth, method="fgt", key_weight=leaves[3])
    for dtype, n_keys in itertools.product(DTYPES, SIZES):
        shape = (2, 1, n_keys, 1)
        key = torch.from_numpy(generator.uniform(0, 2, shape)).to(dtype).requires_grad_()
        query = torch.from_numpy(generator.uniform(0, 2, (1, 2, 33, 1))).to(dtype).requires_grad_()
        value = torch.from_numpy(generator.normal(size=(2, 2, n_keys, 2))).to(dtype).requires_grad_()
        check(query, key, value, torch.tensor([3.0], dtype=dtype, requires_grad=True), method="fgt")


def several_features(generator: np.random.Generator, fewer: bool) -> None:
    """Grids of boxes, expanded or not: crowds, gaps, lone points, rows far from all keys, masked keys, batches."""
    n = 400 if fewer else 1500
    for features, w, dtype in itertools.product(
        (2, 3), (0.0, 2.0, 30.0, 1e4), (torch.float64, torch.float32)
    ):
        clusters = generator.uniform(0, 1, (n, features)) * 0.2 + generator.integers(0, 3, (n, 1))
        drawn = generator.uniform(0, 1, (n, features)) if w == 2.0 else clusters
        drawn[:: n // 3] *= 40
        query = np.r_[drawn[: n // 3], generator.uniform(-1, 4, (n // 4, features)), [[1e4] * features]]
        arrays = (
            query,
            drawn,
            np.sin(drawn[:, :1] * [1.0, 3.0]),
            np.full(features, w),
            generator.uniform(0.1, 2, n),
        )
        leaves = [torch.from_numpy(array).to(dtype).requires_grad_() for array in arrays]
        with torch.no_grad():
            leaves[4][::5] = 0
        near = leaves[0].detach()[:-1].requires_grad_()
        check(leaves[0].detach(), *leaves[1:4], method="fgt")
        check(near, *leaves[1:4], method="fgt", return_lse=True)
        check(leaves[1], leaves[1], leaves[2][:, :1].detach(), leaves[3], method="fgt", exclude_self=True)
        if w == 2.0:
            check(near, *leaves[1:4], method="fgt", key_weight=leaves[4])
    for dtype, n_keys in itertools.product(DTYPES, SIZES[:14]):
        key, query = (torch.from_numpy(generator.uniform(0, 2, shape)).to(dtype).requires_grad_()
                      for shape in ((2, 1, n_keys, 2), (1, 2, 33, 2)))  # fmt: skip
        value = torch.from_numpy(generator.normal(size=(2, 2, n_keys, 2))).to(dtype).requires_grad_()
        check(query, key, value, torch.tensor([3.0], dtype=dtype, requires_grad=True), method="fgt")


def many_features(generator: np.random.Generator) -> None:
    """Matrix products: blocks, panels and tiles that are full or not, and rows that are left to differences."""
    sizes = ((96, 1, 16, 13), (97, 95, 33, 64), (107, 97, 70, 100), (203, 193, 40, 9))
    for (n_queries, n_keys, features, channels), dtype in itertools.product(sizes, DTYPES[::2]):
        query, key, value = (
            torch.from_numpy(generator.uniform(0, 2, shape)).to(dtype)
            for shape in ((n_queries, features), (n_keys, features), (n_keys, channels))
        )
        query[::5] += 9
        leaves = [x.requires_grad_() for x in (query, key, value, torch.full((features,), 0.3, dtype=dtype))]
        weight = torch.from_numpy(generator.uniform(0.1, 2, n_keys)).to(dtype).requires_grad_()
        check(*leaves, return_lse=True)
        check(*leaves, key_weight=weight)
        check(key, key, value, leaves[3], exclude_self=n_keys > 1)


def special_values() -> None:
    """No queries, no keys of weight, NaN and infinity: nothing of it may lead an index astray."""
    x, nan = torch.linspace(0, 4, 37), float("nan")
    assert nwfast.nadaraya_watson(x[:0], x, x, backend="native").shape == (0,)
    none = torch.zeros(37)
    assert nwfast.nadaraya_watson(x, x, x, key_weight=none, backend="native").isnan().all()
    for bad in (nan, float("inf"), -float("inf"), 3e38):
        for place in range(3):
            inputs = [x.clone().requires_grad_() for _ in range(3)]
            with torch.no_grad():
                inputs[place][::5] = bad
            out = nwfast.nadaraya_watson(*inputs, torch.tensor(2.0, requires_grad=True), backend="native")
            out.sum().backward()


def read_out_of_bounds() -> None:
    """Hand the kernels a tensor that claims more values than its memory holds."""
    memory = np.zeros(4096)
    claimed = np.lib.stride_tricks.as_strided(memory, shape=(3 * memory.size,))
    value = torch.from_numpy(claimed)
    key = torch.zeros_like(value, memory_format=torch.contiguous_format).uniform_()
    print(nwfast.nadaraya_watson(key[:8], key, value, backend="native"))


if __name__ == "__main__":
    assert nwfast.backends.available()["native"] is True
    torch.manual_seed(0)
    torch.set_num_threads(2)
    if sys.argv[1:] == ["read_out_of_bounds"]:
        read_out_of_bounds()
    elif sys.argv[1:] == ["general"]:
        general_form(np.random.default_rng(1))
    else:
        generator, fewer = np.random.default_rng(0), sys.argv[1:] == ["fewer"]
        general_form(generator)
        one_feature(generator, fewer)
        fast_gauss_transform(generator, fewer)
        several_features(generator, fewer)
        many_features(generator)
        special_values()
    print("done with", importlib.import_module("nwfast._C").instruction_set())
