"""Compares what a worker computed with what is right, and makes failing cases small."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from cases import Case
from exact import BOXES, Real, allowed, solve
from torch import Tensor


@dataclasses.dataclass
class Failure:
    """What of a case is wrong, where, and by how much."""

    result: str  # out, lse, the name of an input whose gradient it is, or "call"
    kind: str  # "wrong", "NaN", "not NaN", "shape", or what the process said or did
    detail: str = ""

    def __str__(self) -> str:
        what = self.result if self.result in ("out", "lse", "call") else f"gradient of {self.result}"
        return f"{what}: {self.kind}{self.detail and ', '}{self.detail}"


def judge(case: Case, reply: dict[str, Tensor] | str) -> list[Failure]:
    """All failures of a reply; a reply that is a string is one."""
    if isinstance(reply, str):
        return [Failure("call", reply.splitlines()[0][:300])]
    with np.errstate(all="ignore"):
        right = solve(
            *(case.query, case.key, case.value, case.w, case.key_weight, case.grad_out, case.grad_lse),
            exclude_self=case.exclude_self,
            plain=case.backend == "reference",
            boxes=0.0 if case.method == "dense" else BOXES,
        )
        return [f for name, found in reply.items() for f in _compare(name, found, right[name], case)]


def _compare(name, found, right, case) -> Iterator[Failure]:
    if tuple(found.shape) != right.value.shape:
        yield Failure(name, "shape", f"{tuple(found.shape)} for {right.value.shape}")
        return
    got = found.double().numpy().astype(Real)
    exact = right.value
    limits = torch.finfo(found.dtype)
    bound = allowed(found, right, case.key.numel() + case.query.numel())
    judged = np.isfinite(right.bound)
    bound = np.where(judged, bound, np.inf)
    overflow = np.abs(exact) + bound > 0.9 * limits.max  # then inf, or the largest number
    want_nan = np.isnan(exact)
    beyond = np.isinf(exact) & (name == "key_weight")  # any number will do
    want_inf = np.isinf(exact) & ~beyond
    fine = np.isfinite(exact) & ~overflow
    wrong = {
        "not NaN": judged & want_nan & ~np.isnan(got),
        "NaN": (judged | beyond)
        & ~want_nan
        & np.isnan(got)
        & ((name in ("out", "lse", "key_weight")) | fine),
        "not infinite": want_inf & (got != exact) & ~np.isnan(got),
        "wrong": judged & fine & ~np.isnan(got) & ~(np.abs(got - exact) <= bound),
    }
    for kind, where in wrong.items():
        if where.any():
            excess = np.where(where, np.abs(got - exact) / np.where(bound > 0, bound, 1e-300), -1)
            place = np.unravel_index(np.nanargmax(excess) if not np.isnan(excess).all() else 0, where.shape)
            if not where[place]:
                place = tuple(axis[0] for axis in np.nonzero(where))
            yield Failure(
                name,
                kind,
                f"{float(got[place]):.9g} at {tuple(map(int, place))} for {float(exact[place]):.9g}, error "
                f"{float(abs(got[place] - exact[place])):.3g}, allowed {float(bound[place]):.3g}",
            )


# Making a failing case small.

_NAMES = ("query", "key", "value", "w", "key_weight", "grad_out", "grad_lse")


def _changed(case: Case, **parts) -> Case:
    return dataclasses.replace(case, **parts)


def _pick(tensor: Tensor | None, dim: int, indices: list[int]) -> Tensor | None:
    return None if tensor is None else tensor.index_select(dim, torch.tensor(indices))


def _has_channels(case: Case) -> bool:
    return case.grad_out.ndim > len(case.lse_shape())


def _of_keys(case: Case, indices: list[int]) -> Case:
    general = case.query.ndim > 1
    per_query = not general and case.key.ndim == 2
    has_channels = _has_channels(case)
    smaller = _changed(
        case,
        key=_pick(case.key, -2 if general else -1, indices),
        value=_pick(case.value, -2 if has_channels else -1, indices),
        key_weight=_pick(case.key_weight, -1, indices),
    )
    return _of_queries(smaller, indices) if case.exclude_self and not per_query else smaller


def _of_queries(case: Case, indices: list[int]) -> Case:
    general = case.query.ndim > 1
    parts = {
        "query": _pick(case.query, -2 if general else 0, indices),
        "grad_out": _pick(case.grad_out, -2 if _has_channels(case) else -1, indices),
        "grad_lse": _pick(case.grad_lse, -1, indices),
    }
    if not general and case.key.ndim == 2:
        parts |= {name: _pick(getattr(case, name), 0, indices) for name in ("key", "value")}
        if case.key_weight is not None and case.key_weight.ndim == 2:
            parts["key_weight"] = _pick(case.key_weight, 0, indices)
        if case.w.ndim == 2:
            parts["w"] = _pick(case.w, 0, indices)
    return _changed(case, **parts)


def _of_features(case: Case, indices: list[int]) -> Case:
    w = case.w
    if w.ndim and w.shape[-1] > 1:
        w = _pick(w, -1, indices)
    return _changed(case, query=_pick(case.query, -1, indices), key=_pick(case.key, -1, indices), w=w)


def _of_channels(case: Case, indices: list[int]) -> Case:
    return _changed(case, value=_pick(case.value, -1, indices), grad_out=_pick(case.grad_out, -1, indices))


def _without_batch(case: Case) -> Iterator[Case]:
    """One element of the batch, in two dimensions."""
    if case.query.ndim < 3:
        return
    has_channels = _has_channels(case)
    full = case.lse_shape()[:-1]
    for number in range(int(np.prod(full))):
        where = np.unravel_index(number, full)

        def at(tensor, trailing, where=where):
            if tensor is None:
                return None
            leading = tensor.ndim - trailing
            for size_at in range(leading):
                index = where[len(where) - leading + size_at]
                tensor = tensor[index if tensor.shape[0] > 1 else 0]
            return tensor

        yield _changed(
            case,
            query=at(case.query, 2),
            key=at(case.key, 2),
            value=at(case.value, 2 if has_channels else 1),
            w=at(case.w, min(case.w.ndim, 1)),
            key_weight=at(case.key_weight, 1),
            grad_out=at(case.grad_out, 2 if has_channels else 1),
            grad_lse=at(case.grad_lse, 1),
        )


def _fewer(count: int) -> Iterator[list[int]]:
    """Which of so many things to keep: halves first, then all but a few."""
    pieces = 2
    while count > 1:
        step = -(-count // pieces)
        starts = list(range(0, count, step))
        if pieces == 2:
            yield from ([*range(s, min(s + step, count))] for s in starts)
        yield from (
            kept for s in starts if (kept := [*range(s), *range(min(s + step, count), count)]) and pieces > 2
        )
        if step == 1:
            return
        pieces *= 2


def _simpler(case: Case) -> Iterator[Case]:
    """Cases that are a step simpler, the boldest first."""
    yield from _without_batch(case)
    general, per_query = case.query.ndim > 1, case.query.ndim == 1 and case.key.ndim == 2
    for kept in _fewer(case.key.shape[-2] if general else case.key.shape[-1]):
        yield _of_keys(case, kept)
    if not case.exclude_self:
        for kept in _fewer(case.query.shape[-2] if general else case.query.shape[0]):
            yield _of_queries(case, kept)
    if _has_channels(case):
        for kept in _fewer(case.value.shape[-1]):
            yield _of_channels(case, kept)
        if case.value.shape[-1] == 1:
            yield _changed(case, value=case.value[..., 0], grad_out=case.grad_out[..., 0])
    if general:
        for kept in _fewer(case.query.shape[-1]):
            yield _of_features(case, kept)
        if case.query.ndim == 2 and case.query.shape[1] == 1 and case.w.ndim < 2:
            yield _changed(case, query=case.query[:, 0], key=case.key[:, 0])
    if per_query and len(case.query) == 1:
        weight = case.key_weight
        yield _changed(
            case,
            key=case.key[0],
            value=case.value[0],
            w=case.w.reshape(-1)[:1],
            key_weight=weight[0] if weight is not None and weight.ndim == 2 else weight,
        )
    if case.entry != "function":
        yield _changed(case, entry="function")
    if case.exclude_self:
        yield _changed(case, exclude_self=False)
    if case.key_weight is not None:
        needs = tuple(name for name in case.needs if name != "key_weight")
        yield _changed(case, key_weight=None, needs=needs)
        for number in (1.0,):
            yield _changed(case, key_weight=torch.where(case.key_weight > 0, number, case.key_weight))
    if case.grad_lse is not None:
        yield _changed(case, grad_lse=None)
    if case.return_lse and case.grad_lse is None:
        yield _changed(case, return_lse=False)
    for name in case.needs:
        yield _changed(case, needs=tuple(other for other in case.needs if other != name))
    if case.layout != "plain":
        yield _changed(case, layout="plain")
    if case.method == "auto":
        yield _changed(case, method="dense")
    if case.w.ndim > 1:
        yield _changed(case, w=case.w.reshape(-1, case.w.shape[-1])[0])
    if case.w.ndim == 1:
        yield _changed(case, w=case.w[0])
    if case.query.dtype in (torch.float16, torch.bfloat16):
        yield _changed(
            case,
            **{name: tensor.float() for name in _NAMES if (tensor := getattr(case, name)) is not None},
        )


def _rounder(case: Case) -> Iterator[Case]:
    """Rounder numbers: zeros and ones, then few digits; whole tensors, then entry by entry where there are few."""
    for name in ("grad_out", "grad_lse", "value", "key_weight", "w", "query", "key"):
        tensor = getattr(case, name)
        if tensor is None or (name == "w" and tensor.ndim == 0 and tensor in (0, 1)):
            continue
        single = [(...,)]
        if 1 < tensor.numel() <= 12:
            single += [np.unravel_index(i, tuple(tensor.shape)) for i in range(tensor.numel())]
        for place in single:
            part = tensor[place]
            options = [torch.ones_like(part)] if name != "key" else []
            options += [torch.zeros_like(part)] if name in ("query", "key", "value", "grad_out") else []
            options += [_digits(part, n) for n in (1, 2, 3)]
            for option in options:
                if torch.equal(option, part) or (_size_of(option) >= _size_of(part)):
                    continue
                changed = tensor.clone()
                changed[place] = option
                yield _changed(case, **{name: changed})


def _digits(tensor: Tensor, digits: int) -> Tensor:
    rounded = [float(f"{x:.{digits - 1}e}") for x in tensor.double().reshape(-1).tolist()]
    return torch.tensor(rounded, dtype=torch.float64).reshape(tensor.shape).to(tensor.dtype)


def _size_of(tensor: Tensor) -> int:
    """The length of the numbers when written."""
    return sum(
        0 if x == 1 else 1 if x == 0 else 1 + len(f"{x:.17g}".rstrip("0"))
        for x in tensor.reshape(-1).tolist()
    )


def shrink(
    case: Case, failure: Failure, fails: Callable[[Case], Failure | None], seconds: float
) -> tuple[Case, Failure]:
    """The smallest case found in the time that still fails the same way."""
    end = time.monotonic() + seconds
    for steps in (_simpler, _rounder):
        found = True
        while found:
            found = False
            for candidate in steps(case):
                if time.monotonic() > end:
                    return case, failure
                again = fails(candidate)
                if again is not None:
                    case, failure, found = candidate, again, True
                    break
    return case, failure


def as_python(case: Case, failure: Failure) -> str:
    """A program that shows the failure."""
    dtype = str(case.query.dtype)
    lines = [f"# {failure}", f"# {case.situation}", "import torch, nwfast"]

    def written(tensor, requires):
        numbers = tensor.tolist() if tensor.numel() <= 4000 else "..."
        own = f", dtype={tensor.dtype}" if tensor.dtype != torch.float32 else ""
        text = repr(numbers).replace("nan", "torch.nan").replace("inf", "torch.inf")
        return f"torch.tensor({text}{own}{', requires_grad=True' * requires})"

    for name, tensor in case.tensors().items():
        lines.append(f"{name} = {written(tensor, name in case.needs)}")
    w = "w.item()" if case.w_is_number else "w"
    options = [] if case.key_weight is None else ["key_weight=key_weight"]
    options += ["exclude_self=True"] if case.exclude_self else []
    where = [f'method="{case.method}"', f'backend="{case.backend}"']
    if case.layout != "plain":
        lines.append(f"# layout of query, key, value: {case.layout} (tests/fuzz/worker.py, laid_out)")
    result = "out, lse" if case.return_lse else "out"
    options += ["return_lse=True"] if case.return_lse else []
    if case.entry == "index":
        built = [o for o in options if o.startswith("key_weight")] + where
        called = [o for o in options if not o.startswith("key_weight")]
        lines.append(f"index = nwfast.KeyIndex(key, value, {', '.join(built)})")
        lines.append(f"{result} = index({', '.join(['query', w, *called])})")
    elif case.entry == "module":
        called = ["exclude_self=True"] if case.exclude_self else []
        lines.append(f"net = nwfast.NWKernelRegression(w=w.detach(), {', '.join(where)}); w = net.w")
        lines.append(f"{result} = net({', '.join(['query', 'key', 'value', *called])})")
    else:
        arguments = ", ".join(["query", "key", "value", w, *options, *where])
        lines.append(f"{result} = nwfast.nadaraya_watson({arguments})")
    lines.append(f"print({result})")
    if case.needs:
        outputs, cotangents = "[out]", f"[{written(case.grad_out, False)}]"
        if case.grad_lse is not None:
            outputs = "[out, lse]"
            cotangents = f"[{written(case.grad_out, False)}, {written(case.grad_lse, False)}]"
        lines.append(f"print(torch.autograd.grad({outputs}, [{', '.join(case.needs)}], {cotangents}))")
    assert dtype
    return "\n".join(lines)
