"""Computes cases in a process of its own, which may crash or hang: reads them from stdin, writes results to stdout."""

import pickle
import struct
import sys

import torch
from cases import Case
from torch import Tensor


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers otherwise in memory."""
    if layout == "strided":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), torch.nan, dtype=tensor.dtype)
        view = wide[..., 1::2]
        view.copy_(tensor)
        return view
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.mT.contiguous().mT
    if layout == "expanded" and tensor.ndim > 2 and tensor.shape[0] == 1:
        return tensor.contiguous().expand(tensor.shape)
    if layout == "expanded" and len(tensor) > 1 and bool((tensor == tensor[:1]).all()):
        return tensor[:1].expand(tensor.shape)
    return tensor.contiguous()


def compute(case: Case) -> dict[str, Tensor]:
    """out, lse and gradients by name, those that the case asks for."""
    import nwfast

    leaves = {}
    for name, tensor in case.tensors().items():
        layout = case.layout if name in ("query", "key", "value") else "plain"
        leaves[name] = laid_out(tensor, layout).detach().requires_grad_(name in case.needs)
    w = case.w.item() if case.w_is_number else leaves["w"]
    options = dict(method=case.method, backend=case.backend)
    if case.entry == "index":
        index = nwfast.KeyIndex(
            leaves["key"], leaves["value"], key_weight=leaves.get("key_weight"), **options
        )
        query = leaves["query"]
        result = index(query, w, exclude_self=case.exclude_self, return_lse=case.return_lse)
    elif case.entry == "module":
        net = nwfast.NWKernelRegression(w=case.w.clone(), **options)
        net.w.requires_grad_("w" in case.needs)
        leaves["w"] = net.w
        result = net(leaves["query"], leaves["key"], leaves["value"], exclude_self=case.exclude_self)
    else:
        result = nwfast.nadaraya_watson(
            leaves["query"],
            leaves["key"],
            leaves["value"],
            w,
            key_weight=leaves.get("key_weight"),
            exclude_self=case.exclude_self,
            return_lse=case.return_lse,
            **options,
        )
    out, lse = result if case.return_lse else (result, None)
    found = {"out": out.detach()}
    if lse is not None:
        found["lse"] = lse.detach()
    if case.needs:
        outputs, cotangents = [out], [case.grad_out]
        if case.grad_lse is not None and lse.requires_grad:
            outputs, cotangents = [out, lse], [case.grad_out, case.grad_lse]
        if not out.requires_grad:
            raise AssertionError("out does not require a gradient")
        wanted = [leaves[name] for name in case.needs]
        gradients = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
        for name, gradient in zip(case.needs, gradients, strict=True):
            if gradient is None:
                raise AssertionError(f"no gradient of {name}")
            found[name] = gradient
    return found


def main() -> None:
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while size := requests.read(8):
        case = pickle.loads(requests.read(struct.unpack("<q", size)[0]))
        try:
            reply = {name: tensor.contiguous() for name, tensor in compute(case).items()}
        except Exception as error:  # a refusal or a fault: the other side tells
            reply = f"{type(error).__name__}: {error}"
        data = pickle.dumps(reply)
        replies.write(struct.pack("<q", len(data)) + data)
        replies.flush()


if __name__ == "__main__":
    main()
