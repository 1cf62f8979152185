"""JAX: the two lines under jit, mapped over blocks of queries; and kerneljax, kernel smoothing written in JAX."""

import functools

import numpy as np
from torch import Tensor

from benchmarks.problems.workloads import Call, Data

from .peer import Peer, missing

BLOCK = 256  # queries: faster than the whole matrix, and O(block N) memory


def _arrays(*tensors: Tensor) -> list:
    import jax.numpy as jnp

    return [jnp.asarray(tensor.numpy()) for tensor in tensors]


@functools.cache
def _function():
    import jax
    import jax.numpy as jnp

    def row(q, key, value, w):
        scores = -jnp.sum(((q - key) * w).reshape(key.shape[0], -1) ** 2, axis=-1) / 2
        return jax.nn.softmax(scores) @ value

    def smooth(query, key, value, w):
        # Without the checkpoint the backward pass keeps the matrix.
        one = jax.checkpoint(lambda q: row(q, key, value, w))
        return jax.lax.map(one, query, batch_size=BLOCK)

    return smooth


@functools.cache
def _jitted():
    import jax

    return jax.jit(_function())


@functools.cache
def _jitted_gradient(positions: tuple[int, ...]):
    import jax

    def out_and_gradients(query, key, value, w, cotangent):
        inputs = [query, key, value, w]

        def function(*some):
            given = list(inputs)
            for position, array in zip(positions, some, strict=True):
                given[position] = array
            return _function()(*given)

        out, pull = jax.vjp(function, *(inputs[position] for position in positions))
        return out, *pull(cotangent)

    return jax.jit(out_and_gradients)


def _forward(given: Data) -> Call:
    inputs = _arrays(*given.inputs)
    return lambda: (_jitted()(*inputs).block_until_ready(),)


def _gradients(given: Data, wanted: str) -> Call:
    import jax

    inputs = _arrays(*given.inputs, given.cotangent)
    function = _jitted_gradient(tuple("qkvw".index(letter) for letter in wanted))
    return lambda: jax.block_until_ready(function(*inputs))


def _small(kind: str, chapter: tuple[Tensor, ...]) -> Call:
    import jax
    import jax.numpy as jnp

    x, y, keys, values = _arrays(*chapter)
    w, cotangent = jnp.ones(1), jnp.linspace(-1, 2, len(x))

    def lines(w):
        weights = jax.nn.softmax(-(((x[:, None] - keys) * w) ** 2) / 2, axis=1)
        return (weights * values).sum(1)

    if kind == "forward":
        forward = jax.jit(lines)
        return lambda: (forward(w).block_until_ready(),)

    def both(w):
        out, pull = jax.vjp(lines, w)
        return out, *pull(cotangent)

    def step(w):
        def loss(w):
            errors = (lines(w) - y) ** 2 / 2
            return errors.sum(), errors

        gradient, errors = jax.grad(loss, has_aux=True)(w)
        return errors, gradient, w - 1e-9 * gradient

    if kind == "forward + backward":
        function = jax.jit(both)
        return lambda: jax.block_until_ready(function(w))
    trained = jax.jit(step)
    return lambda: jax.block_until_ready(trained(w))[:2]


def _bandwidth(h: float):
    import jax.numpy as jnp
    import kerneljax

    return kerneljax.Bandwidth(h=jnp.array([h]), lam_uno=jnp.zeros(0), lam_ord=jnp.zeros(0))


def _local_constant(given: Data) -> Call:
    import kerneljax

    query, key, value = _arrays(given.query, given.key, given.value)
    bandwidth = _bandwidth(1 / float(given.w))

    def call() -> tuple:
        fit = kerneljax.local_poly(key, value, bandwidth, at=query, degree=0, chunk=BLOCK)
        return (fit.mean.block_until_ready(),)

    return call


def _select(x: Tensor, y: Tensor) -> Call:
    import kerneljax

    inputs, targets = _arrays(x, y)
    criterion = kerneljax.RegressionCriterion(method="cv_ls", degree=0)

    def call() -> tuple[float]:
        found = kerneljax.select_bandwidth(inputs, criterion, y=targets, n_starts=1, chunk=BLOCK)
        return (1 / float(np.asarray(found.bandwidth.h)[0]),)

    return call


PEERS = (
    Peer(
        name="JAX",
        about=f"the two lines of a query, `jit`, `lax.map` with `batch_size={BLOCK}`, `checkpoint` for the gradients",
        why_not=functools.cache(lambda: missing("jax", "jaxlib")),
        package="jax",
        forward=_forward,
        gradients=_gradients,
        small=_small,
        seconds_per_pair=2.5e-9,
    ),
    Peer(
        name="kerneljax",
        about=f'`local_poly` of degree 0 with `chunk={BLOCK}`; `select_bandwidth` by "cv_ls" from one start',
        why_not=functools.cache(lambda: missing("jax", "kerneljax")),
        package="kerneljax",
        forward=_local_constant,
        select=_select,
        most_features=1,
        one_channel=True,
        seconds_per_pair=1e-8,
    ),
)
