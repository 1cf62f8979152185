"""Small problems on the emulated kernels, against the textbook: prints "right" or "wrong" and the errors.

Arguments: pairs of a library and a case, one of CASES. Each pair has a process of its own, forked from this one, since
operators can be registered only once; "== library case" comes before what it prints.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from op.test_functional import make
from oracle import gradients, textbook

import nwfast

# Shapes of query, key, value, w and key_weight, dtype.
CASES = {
    "sorted": ((523,), (1219,), (1219,), (), None, torch.float32),
    "unsorted": ((523,), (1219,), (1219,), (), None, torch.float32),
    "tiled": ((131, 3), (203, 3), (203, 11), (3,), (203,), torch.float32),
    "few channels": ((131, 2), (203, 2), (203, 3), (), None, torch.float32),
    "halves": ((131, 3), (203, 3), (203, 11), (3,), None, torch.float16),
}


def run(case: str) -> None:
    torch.manual_seed(0)
    *shapes, dtype = CASES[case]
    single = len(shapes[0]) == 1
    inputs = make(shapes, dtype, 30.0 if single else 3.0)
    if case == "sorted":
        inputs[0], inputs[1] = inputs[0].sort().values, inputs[1].sort().values
    leaves = [x if x is None else x.requires_grad_() for x in inputs]
    query, key, value, w, key_weight = leaves
    out = nwfast.nadaraya_watson(query, key, value, w, key_weight=key_weight, backend="cuda")
    grad = torch.randn(out.shape).to(dtype)
    present = [x for x in leaves if x is not None]
    found = [out, *torch.autograd.grad(out, present, grad)]
    wide = [x if x is None else x.detach().double() for x in leaves]
    exact = [textbook(*wide)[0], *(x for x in gradients(wide, grad.double()) if x is not None)]
    matrices = [x.detach()[:, None] if x.ndim == 1 else x.detach() for x in (query, key, value)]
    state = torch.ops.nwfast.cuda_forward(*matrices, w.detach().reshape(-1), key_weight, False, False, False)[
        2
    ]
    alone = int((state[:, 0] != 0).sum())  # rows left to the kernels in double, which are right anyway
    errors = [
        float((a - b).detach().abs().max() / b.detach().abs().max())
        for a, b in zip(found, exact, strict=True)
    ]
    most = 1e-4 if dtype == torch.float32 else 1e-2
    print("right" if all(error < most for error in errors) and alone == 0 else "wrong", errors, alone)


for library, case in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    print("==", library, case, flush=True)
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    os.environ["NWFAST_EMULATED_LIBRARY"] = library
    import plugin  # noqa: F401

    run(case)
    sys.stdout.flush()
    os._exit(0)
