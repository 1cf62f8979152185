"""Hash what every kernel gives: two commits that print the same lines give the same bits.

    python tests/tools/hash_results.py [--backend native,numba] > before.txt

One line for each backend, method, form of the arguments, dtype and result: out, lse and the gradients of all inputs.
The data are NumPy's, from fixed seeds, so that the lines depend on the package alone, and on the machine's instruction
set (NWFAST_CPU_CAPABILITY chooses the native one's).
"""

import argparse
import hashlib

import numpy as np
import torch

import nwfast

# Shapes of query, key, value, w and key_weight (None: none), and whether each query leaves out its own key.
FORMS = {
    "1-D": ((301,), (517,), (517,), (), None, False),
    "1-D, weights": ((301,), (517,), (517,), (), (517,), False),
    "1-D, channels": ((130,), (517,), (517, 3), (), None, False),
    "leave-one-out": ((260,), (260,), (260,), (), None, True),
    "keys of each query": ((40,), (40, 61), (40, 61), (), None, False),
    "features": ((90, 3), (170, 3), (170, 5), (3,), None, False),
    "features, weights": ((90, 2), (170, 2), (170, 1), (2,), (170,), False),
    "many features": ((33, 70), (80, 70), (80, 33), (70,), None, False),
    "products of many features": ((130, 40), (170, 40), (170, 9), (40,), None, False),
    "leave-one-out, features": ((90, 4), (90, 4), (90, 2), (4,), (90,), True),
    "batches": ((3, 2, 50, 1), (1, 2, 90, 1), (3, 1, 90, 2), (3, 2, 1), (90,), False),
    "batches, features": ((2, 50, 3), (2, 90, 3), (1, 90, 4), (2, 3), (2, 90), False),
}
# How the coordinates lie, and the inverse bandwidth.
DATA = {"smooth": (1.0, 2.0), "narrow": (1.0, 300.0), "far": (1e4, 30.0)}
NAMES = ("query", "key", "value", "w", "key_weight")


def draw(form, data, dtype):
    """Tensors of a form; queries of "far" lie beyond all keys."""
    *shapes, exclude_self = FORMS[form]
    scale, w = DATA[data]
    generator = np.random.default_rng(7)
    query, key, value, ws, weight = (
        None if shape is None else torch.from_numpy(np.asarray(generator.random(shape))) for shape in shapes
    )
    if exclude_self:
        query = key.clone()
    elif data == "far":
        query = query * scale
    tensors = [query, key, value * 3 - 1, w * (0.5 + ws), weight]
    return [None if x is None else x.to(dtype).requires_grad_() for x in tensors], exclude_self


def digest(tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[
        :16
    ]


def lines(backend):
    methods = ("dense", "fgt") if backend in ("native", "numba") else ("dense",)
    for form in FORMS:
        for data in DATA:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                tensors, exclude_self = draw(form, data, dtype)
                for method in methods:
                    if method == "fgt" and tensors[0].ndim > 1 and tensors[0].shape[-1] > 1:
                        continue
                    leaves = [x for x in tensors if x is not None]
                    out, lse = nwfast.nadaraya_watson(
                        *tensors[:4], key_weight=tensors[4], exclude_self=exclude_self, return_lse=True,
                        backend=backend, method=method,
                    )  # fmt: skip
                    generator = np.random.default_rng(8)
                    cotangents = [
                        torch.from_numpy(np.asarray(generator.standard_normal(x.shape))).to(x.dtype)
                        for x in (out, lse)
                    ]
                    both = torch.autograd.grad((out, lse), leaves, cotangents)
                    alone = nwfast.nadaraya_watson(
                        *tensors[:4],
                        key_weight=tensors[4],
                        exclude_self=exclude_self,
                        backend=backend,
                        method=method,
                    )
                    without = torch.autograd.grad(alone, leaves, cotangents[0])
                    results = {"out": out, "lse": lse, "out alone": alone}
                    results |= {f"d {name}": x for name, x in zip(NAMES, both, strict=False)}
                    results |= {f"d {name} alone": x for name, x in zip(NAMES, without, strict=False)}
                    for name, tensor in results.items():
                        dtype_name = str(dtype).removeprefix("torch.")
                        yield f"{backend} {method} | {form} | {data} | {dtype_name} | {name}: {digest(tensor)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="native,numba,reference")
    for backend in parser.parse_args().backend.split(","):
        for line in lines(backend):
            print(line)


if __name__ == "__main__":
    main()
