"""A small call of every kind for compute-sanitizer to watch: python sanitized_calls.py BACKEND."""

import sys

import torch

import nwfast

SHAPES = {
    "1-D": ((67,), (133,), (133,), None, False),
    "few queries": ((3,), (5000,), (5000,), None, False),
    "leave-one-out": ((65,), (65,), (65,), None, True),
    "weights, per-query keys": ((9,), (9, 33), (9, 33), (9, 33), False),
    "features": ((35, 3), (70, 3), (70, 1), (70,), False),
    "channels": ((35, 3), (70, 3), (70, 20), None, False),
    "crossed batch": ((2, 1, 17, 2), (1, 3, 19, 2), (2, 3, 19, 4), (1, 3, 19), False),
}


def main(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.float16):
        for *shapes, exclude_self in SHAPES.values():
            leaves = [
                shape
                if shape is None
                else torch.rand(shape, generator=generator).to("cuda", dtype).requires_grad_()
                for shape in shapes
            ]
            w = torch.tensor(4.0).to("cuda", dtype).requires_grad_()
            for return_lse in (False, True):
                result = nwfast.nadaraya_watson(
                    *leaves[:3],
                    w,
                    key_weight=leaves[3],
                    exclude_self=exclude_self,
                    backend=backend,
                    return_lse=return_lse,
                )
                results = list(result) if return_lse else [result]
                required = [x for x in (*leaves, w) if x is not None]
                gradients = torch.autograd.grad(results, required, [torch.ones_like(x) for x in results])
                assert all(x.isfinite().all() for x in (*results, *gradients))
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
