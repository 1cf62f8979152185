"""The operators: schemas, fakes, implementations, autograd formulas. The only module that knows torch.library.

For each kernel (`nwfast.backends.operators`) there are two operators, `nwfast::<kernel>_forward` and
`nwfast::<kernel>_backward`, with the contract of `nwfast.backends`. Implementations come from the C++ extensions
(native, cuda) or from Python (numba, triton). The CPU's kernels have a third, `nwfast::<kernel>_output`, a forward
pass without the state that only gradients of keys, values and key weights need. `KERNELS` holds them by the kernels'
names, with the autograd.Functions around them. The native backend has two more, `COMPRESS` and
`PREDICT`, for keys that are prepared (`prepared`).
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.reference import arithmetic_dtype
from .autograd import formula, functions_around, save_all, save_for_second, second
from .by_reference import NEEDS

_FORWARD_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor w, Tensor? key_weight, bool exclude_self, bool tangent_w, "
    "bool tangent_q) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_OUTPUT_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor w, Tensor? key_weight, bool exclude_self, bool lse, "
    "bool tangent_w, bool tangent_q) -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor w, Tensor? key_weight, "
    "Tensor out, Tensor state, Tensor tangent_w, Tensor tangent_q, bool exclude_self, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_LIBRARY = torch.library.Library("nwfast", "FRAGMENT")


def _register_fake(name: str, fake: Callable) -> None:
    """As torch.library.register_fake, which takes half a millisecond to find out who calls it."""
    registry = torch._library.simple_registry.singleton  # private API, which the tests of fake tensors use
    registry.find(name).fake_impl.register(fake, __name__, lib=_LIBRARY)


def _register_autograd(operator: Any, backward: Callable, setup_context: Callable) -> None:
    """As torch.library.register_autograd, whose kernel takes a millisecond to make: made when it is first called."""

    @functools.cache
    def kernel() -> Callable:
        registration = torch._library.autograd  # private API, which compiled calls in the tests use
        return registration.make_autograd_impl(operator, registration.Info(backward, setup_context))

    def run(keyset, *args, **kwargs):
        return kernel()(keyset, *args, **kwargs)

    _LIBRARY.impl(operator._opname, run, "Autograd", with_keyset=True)


def define(
    name: str, schema: str, run: Callable, fake: Callable, backward: Callable, setup_context: Callable
) -> Any:
    """An operator in Python, of other operators, with its derivative."""
    torch.library.define(f"nwfast::{name}", schema)
    torch.library.impl(f"nwfast::{name}", "CompositeExplicitAutograd", run)
    _register_fake(f"nwfast::{name}", fake)
    operator = getattr(torch.ops.nwfast, name).default
    _register_autograd(operator, backward, setup_context)
    return operator


class _Kernels:
    """A kernel's operators, and the autograd.Functions around them."""

    def __init__(self, name: str):
        self.name = name
        forward_name, backward_name = f"nwfast::{name}_forward", f"nwfast::{name}_backward"
        torch.library.define(forward_name, _FORWARD_SCHEMA)
        torch.library.define(backward_name, _BACKWARD_SCHEMA)
        _register_fake(forward_name, _fake_forward)
        _register_fake(backward_name, _fake_backward)
        self.forward: Callable = getattr(torch.ops.nwfast, f"{name}_forward").default
        self.backward: Callable = getattr(torch.ops.nwfast, f"{name}_backward").default
        self.stateless: Any = None
        if name.startswith(("native", "numba")):
            torch.library.define(f"nwfast::{name}_output", _OUTPUT_SCHEMA)
            _register_fake(f"nwfast::{name}_output", _fake_output)
            self.stateless = getattr(torch.ops.nwfast, f"{name}_output").default
        _register_autograd(
            self.forward,
            lambda ctx, *grads: (*formula(ctx, self.backward, *grads[:2]), None, None, None),
            save_all,
        )
        _register_autograd(self.backward, second, save_for_second)

    def __getattr__(self, name: str) -> Any:
        # Made at the first call that needs them: they would take a quarter of the time of an import.
        if name == "direct" and not self.name.startswith("native"):
            # Past the dispatcher: the eager function, and what gives results alone.
            forward, output, backward = (_implementation(self.name, function) for function in _FUNCTIONS)

            def backward_of_plain(grad_out, grad_lse, *rest):
                # torch.autograd.grad(is_grads_batched=True) maps over the cotangents with no sign of it but this.
                batched = torch._C._functorch.is_legacy_batchedtensor
                mapped = batched(grad_out) or (grad_lse is not None and batched(grad_lse))
                plain = not mapped and torch._C._len_torch_dispatch_stack() == 0
                return (backward if plain else self.backward)(grad_out, grad_lse, *rest)

            self.direct = functions_around(forward, backward_of_plain, None)[0], output
            return self.direct
        if name not in ("eager", "transformable", "mapped"):
            raise AttributeError(name)
        native = self.name.startswith("native")
        features = backends.FGT_FEATURES["native"] if self.name.startswith("native_") else 1
        self.eager, self.transformable, self.mapped = functions_around(
            self.forward, self.backward, self.stateless if native else None, features
        )
        return self.__dict__[name]


def _fake_forward(query, key, value, w, key_weight, exclude_self, tangent_w, tangent_q):
    rows = (*backends.batch_shape(query, key, value), query.shape[-2])
    dtype = arithmetic_dtype(query.dtype)

    def tangent(wanted: bool, columns: int) -> Tensor:
        return query.new_empty((*rows, columns) if wanted else (0,), dtype=dtype)

    return (
        query.new_empty((*rows, value.shape[-1]), dtype=dtype),
        query.new_empty(rows, dtype=dtype),
        query.new_empty((*rows, 2), dtype=torch.float64),
        tangent(tangent_w, value.shape[-1]),
        tangent(tangent_q, query.shape[-1] * value.shape[-1]),
    )


def _fake_output(query, key, value, w, key_weight, exclude_self, lse, tangent_w, tangent_q):
    out, full_lse, _, *tangents = _fake_forward(
        query, key, value, w, key_weight, exclude_self, tangent_w, tangent_q
    )
    return out, full_lse if lse else full_lse.new_empty(0), *tangents


def _fake_backward(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    w,
    key_weight,
    out,
    state,
    tangent_w,
    tangent_q,
    exclude_self,
    needs,
):
    batch = backends.batch_shape(query, key, value)
    dtype = arithmetic_dtype(query.dtype)
    shapes = (
        (*batch, *query.shape[-2:]),
        (*batch, *key.shape[-2:]),
        (*batch, *value.shape[-2:]),
        w.shape,
        (*batch, key.shape[-2]),
    )
    dtypes = (dtype, dtype, dtype, w.dtype, dtype)
    return tuple(
        query.new_empty(shape, dtype=own) if needs & flag else query.new_empty(0, dtype=dtype)
        for shape, own, flag in zip(shapes, dtypes, NEEDS, strict=True)
    )


_FUNCTIONS = ("forward", "output", "backward")


def _register_python(name: str, *dispatch_keys: str) -> None:
    """Register a kernel that is a Python module, imported at the first call."""
    for function in _FUNCTIONS if name.startswith("numba") else ("forward", "backward"):
        for dispatch_key in dispatch_keys:
            torch.library.impl(f"nwfast::{name}_{function}", dispatch_key, _implementation(name, function))


def _implementation(name: str, function: str) -> Callable:
    def kernel(*args):
        return getattr(backends.load(name), function)(*args)

    @functools.cache
    def untraced():
        return torch.compiler.disable(kernel)

    def run(*args):
        # Where Dynamo gives up a frame it goes on with the Python functions called from it, down to these kernels
        # and their data pointers. disable() imports Dynamo, which takes seconds: only if it is there already.
        return (untraced() if "torch._dynamo" in sys.modules else kernel)(*args)

    return run


_COMPRESSED = ("key", "value", "key_weight", "boxes", "moments", "matrices", "numbers")
torch.library.define(
    "nwfast::native_fgt_compress",
    f"(Tensor key, Tensor value, Tensor w, Tensor? key_weight) -> ({', '.join(['Tensor'] * len(_COMPRESSED))})",
)
torch.library.define(
    "nwfast::native_fgt_predict",
    f"(Tensor query, {', '.join(f'Tensor {name}' for name in _COMPRESSED)}) -> (Tensor, Tensor)",
)
COMPRESS, PREDICT = torch.ops.nwfast.native_fgt_compress, torch.ops.nwfast.native_fgt_predict
_SERIES = ("cells", "series", "bound", "numbers")
torch.library.define(
    "nwfast::native_grid_compress",
    f"(Tensor key, Tensor value, Tensor w, Tensor? key_weight) -> ({', '.join(['Tensor'] * len(_SERIES))})",
)
torch.library.define(
    "nwfast::native_grid_predict",
    f"(Tensor query, {', '.join(f'Tensor {name}' for name in _SERIES)}) -> (Tensor, Tensor, Tensor)",
)
GRID_COMPRESS, GRID_PREDICT = torch.ops.nwfast.native_grid_compress, torch.ops.nwfast.native_grid_predict


# The loss (), and where it is asked for its gradient, of the shape of w.
_LEAVE_ONE_OUT = ("native", "native_fgt", "native_auto")
for _name in _LEAVE_ONE_OUT:
    torch.library.define(
        f"nwfast::{_name}_leave_one_out",
        "(Tensor x, Tensor y, Tensor w, Tensor? key_weight, bool mean, bool differentiate) -> (Tensor, Tensor)",
    )
LEAVE_ONE_OUT = {name: getattr(torch.ops.nwfast, f"{name}_leave_one_out").default for name in _LEAVE_ONE_OUT}

# Local lines in one pass, where the linear method serves: see csrc/cpu/local_linear.cpp.
_LINES = ("native_fgt", "native_auto")
for _name in _LINES:
    torch.library.define(
        f"nwfast::{_name}_local_linear",
        "(Tensor query, Tensor key, Tensor value, Tensor w, Tensor? key_weight, bool exclude_self, bool moments) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
LINES = {name: getattr(torch.ops.nwfast, f"{name}_local_linear").default for name in _LINES}

KERNELS = {name: _Kernels(name) for name in backends.operators()}
for _name in KERNELS:
    if _name.startswith("numba"):
        _register_python(_name, "CPU")
_register_python("triton", "CUDA", "CPU")
