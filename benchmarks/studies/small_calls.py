"""Where the microseconds of a call on the chapter's fifty points go, layer by layer.

    python benchmarks/studies/small_calls.py [--backend native] [--rounds 31]

Processor time with one thread, in microseconds: medians of alternating rounds of 100 calls. Below the textbook's lines
and ours stand the layers of ours: an operator's call on two points (the dispatcher), what fifty points add to it (the
kernel), what Python adds (checks, choice of a kernel), and for the loss what an autograd.Function that computes nothing
costs with its backward pass: less than that no operator can take. And many bandwidths: vmap over twenty of them with a
hundred thousand points, in calls on one.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # measure this checkout, wherever called from

import torch
from torch.nn.functional import mse_loss

import nwfast
from nwfast.op.schema import KERNELS, LEAVE_ONE_OUT

CALLS = 100
MANY, BANDWIDTHS = 100_000, 20


class Nothing(torch.autograd.Function):
    """A loss whose value and derivative are known beforehand."""

    VALUE, SLOPE = torch.tensor(0.0), torch.zeros(1)

    @staticmethod
    def forward(ctx, w):
        return Nothing.VALUE.clone()

    @staticmethod
    def backward(ctx, grad):
        return Nothing.SLOPE


def medians(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, float]:
    """Microseconds of each call."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(min(repeats, 20)):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            for _ in range(repeats):
                call()
            taken[name].append((time.process_time() - begin) / repeats * 1e6)
    return {name: statistics.median(times) for name, times in taken.items()}


def calls_of(backend: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name. The chapter's model is given the keys (n, n - 1) without each row's own."""
    generator = torch.Generator().manual_seed(0)
    n = 50
    x = (5 * torch.rand(n, generator=generator)).sort().values
    y = 2 * x.sin() + x**0.8 + 0.5 * torch.randn(n, generator=generator)
    w = torch.rand(1, generator=generator).requires_grad_()
    plain, two = w.detach(), (x[:2].clone(), y[:2].clone())
    others = ~torch.eye(n, dtype=torch.bool)
    keys, values = x.repeat(n, 1)[others].reshape(n, -1), y.repeat(n, 1)[others].reshape(n, -1)
    optimiser = torch.optim.SGD([w], lr=1e-9)

    def textbook(key, value):
        q = x.repeat_interleave(key.shape[1]).reshape(-1, key.shape[1])
        weights = torch.softmax(-(((q - key) * w) ** 2) / 2, dim=1)
        return torch.bmm(weights.unsqueeze(1), value.unsqueeze(-1)).reshape(-1)

    def chapter_loss():
        return (mse_loss(textbook(keys, values), y, reduction="none") / 2).sum()

    def op_loss():
        fitted = nwfast.nadaraya_watson(x, x, y, w, exclude_self=True, backend=backend)
        return (mse_loss(fitted, y, reduction="none") / 2).sum()

    def loss():
        return nwfast.leave_one_out_loss(x, y, w, reduction="sum", backend=backend)

    def backward(of):
        w.grad = None
        of().backward()

    def step(of):
        optimiser.zero_grad()
        of().backward()
        optimiser.step()

    whole, whole_values = x.repeat(n, 1), y.repeat(n, 1)
    no_grad = torch.no_grad()
    calls: dict[str, Callable[[], object]] = {
        "forward: textbook": no_grad(lambda: textbook(whole, whole_values)),
        "forward: nadaraya_watson": no_grad(lambda: nwfast.nadaraya_watson(x, x, y, w, backend=backend)),
        "loss and backward: chapter": lambda: backward(chapter_loss),
        "loss and backward: nadaraya_watson": lambda: backward(op_loss),
        "loss and backward: leave_one_out_loss": lambda: backward(loss),
        "loss and backward: a function that computes nothing": lambda: backward(lambda: Nothing.apply(w)),
        "step: chapter": lambda: step(chapter_loss),
        "step: leave_one_out_loss": lambda: step(loss),
    }
    if backend == "native":
        stateless, operator = KERNELS["native"].stateless, LEAVE_ONE_OUT["native"]
        rest = None, False, False, False, False
        calls |= {
            "operator of the forward pass: 50 points": lambda: stateless(x, x, y, plain, *rest),
            "operator of the forward pass: 2 points": lambda: stateless(two[0], *two, plain, *rest),
            "operator of the loss: 50 points": lambda: operator(x, y, plain, None, False, True),
            "operator of the loss: 2 points": lambda: operator(*two, plain, None, False, True),
            "loss, its graph not used": loss,
        }
    return calls


def many_bandwidths(backend: str) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(MANY, generator=generator)
    y = (9 * x).sin() + 0.3 * torch.randn(MANY, generator=generator)
    ws = torch.logspace(1, 3, BANDWIDTHS)

    def loss(w):
        return nwfast.leave_one_out_loss(x, y, w, backend=backend)

    return {
        "one by one": lambda: [loss(w) for w in ws],
        "vmap": lambda: torch.vmap(loss)(ws),
        "one by one, with gradients": lambda: [torch.func.grad(loss)(w) for w in ws],
        "vmap, with gradients": lambda: torch.vmap(torch.func.grad(loss))(ws),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="native", choices=["native", "numba"])
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = medians(calls_of(arguments.backend), arguments.rounds, CALLS)
    for name, microseconds in found.items():
        print(f"{name:<56}{microseconds:8.1f}")
    for kind, ours in (
        ("forward", "nadaraya_watson"),
        ("loss and backward", "nadaraya_watson"),
        ("loss and backward", "leave_one_out_loss"),
        ("step", "leave_one_out_loss"),
    ):
        theirs = found[f"{kind}: {'textbook' if kind == 'forward' else 'chapter'}"]
        print(f"{kind}, {ours}: {theirs / found[f'{kind}: {ours}']:.2f} times as fast as the textbook")
    many = medians(many_bandwidths(arguments.backend), 5, 1)
    for kind in ("", ", with gradients"):
        singles = many[f"vmap{kind}"] / many[f"one by one{kind}"] * BANDWIDTHS
        print(f"{BANDWIDTHS} bandwidths, {MANY} points{kind}: {singles:.1f} calls on one")


if __name__ == "__main__":
    main()
