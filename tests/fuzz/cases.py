"""One call of the public function with all it is given, drawn at random from the situations that break kernels."""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

import nwfast

_FEATURES = [1, 2, 3, 4, 5, 6, 7, 8, 17, 64, 257, 1000]
_SHARES = [0.2, 0.22, 0.18, 0.08, 0.05, 0.05, 0.04, 0.06, 0.04, 0.04, 0.02, 0.02]
INTERPRETED = 600  # rows times features, that Triton's interpreter walks over by itself
LARGEST_PRODUCT = 150_000  # pairs of a query and a key, times channels and features


@dataclasses.dataclass
class Case:
    """Arguments of a call, cotangents of its results and how the tensors lie in memory."""

    query: Tensor
    key: Tensor
    value: Tensor
    w: Tensor
    key_weight: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor | None  # None: lse is returned but no gradient goes into it
    exclude_self: bool = False
    return_lse: bool = True
    w_is_number: bool = False
    method: str = "auto"
    backend: str = "native"
    entry: str = "function"  # or "index", "module"
    needs: tuple[str, ...] = ("query", "key", "value", "w", "key_weight")
    layout: str = "plain"  # or "strided", "transposed", "expanded": of query, key and value
    situation: str = ""

    def lse_shape(self) -> tuple[int, ...]:
        """The shape of lse, which value's missing channel dimension does not change."""
        has_channels = self.value.ndim == 2 if self.query.ndim == 1 else self.value.ndim == self.key.ndim
        if self.query.ndim == 1 and self.key.ndim == 2:
            has_channels = False
        return tuple(self.grad_out.shape[:-1] if has_channels else self.grad_out.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable inputs by name."""
        found = {"query": self.query, "key": self.key, "value": self.value, "w": self.w}
        if self.key_weight is not None:
            found["key_weight"] = self.key_weight
        return found


def out_shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The shape of the result."""
    if query.ndim == 1:
        return (*query.shape, *value.shape[1:]) if key.ndim == 1 else tuple(query.shape)
    wide = value if value.ndim == key.ndim else value[..., None]
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], wide.shape[:-2])
    return (*batch, query.shape[-2], *((wide.shape[-1],) if value.ndim == key.ndim else ()))


def _size(rng) -> int:
    return int(
        math.exp(rng.uniform(*rng.choice([[0, 2.2], [0, 2.2], [1.5, 4.2], [3, 6], [5.5, 8.006]]))) + 0.5
    )


def _round(rng, array):
    """Now and then numbers that binary arithmetic holds: ties, duplicates and zeros are then frequent."""
    return np.round(array * 8) / 8 if rng.random() < 0.15 else array


def _places(rng, shape, kind, wide):
    """Coordinates of keys; about 1 wide, unless their kind says otherwise."""
    u = rng.random(shape)
    if kind == "uniform":
        return u
    if kind == "normal":
        return rng.standard_normal(shape)
    if kind == "duplicates":
        return np.round(u * rng.integers(1, 12)) / 12
    if kind == "clusters":
        centres = np.sort(rng.random(rng.integers(2, 6))) * 10.0 ** rng.uniform(-1, 6)
        return rng.choice(centres, shape[:-1])[..., None] + u * 10.0 ** rng.uniform(-6, 0)
    if kind == "offset":
        return u + rng.choice([-1, 1]) * 10.0 ** rng.uniform(1, 12 if wide else 6)
    if kind == "mixed":
        return rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(-6, 4, shape)
    if kind == "outliers":
        far = rng.choice(
            [1e5, 1e10, 1e15, 1e16, 1e20, 1e30, 3e38, 1e100 if wide else 1e12, 1e300 if wide else 1e8]
        )
        return np.where(rng.random(shape) < rng.choice([0.02, 0.3]), far * rng.choice([-1, 1]), u)
    if kind == "subnormal":
        return np.round(u * rng.integers(2, 2000)) * (5e-324 if wide else 1.401298464324817e-45)
    if kind == "tiny":
        return u * 10.0 ** rng.uniform(-300 if wide else -37, -10)
    if kind == "huge":
        return rng.standard_normal(shape) * 10.0 ** rng.uniform(10, 290 if wide else 37)
    if kind == "grid":
        return np.broadcast_to((np.arange(shape[-2]) * 10.0 ** rng.integers(-3, 3))[:, None], shape) + 0 * u
    return np.full(shape, u.flat[0])  # "one place"


_KINDS = (
    ["uniform"] * 5 + ["normal", "duplicates", "grid", "one place"] + ["clusters", "offset", "mixed", "outliers"] * 2
    + ["subnormal", "tiny", "huge"]
)  # fmt: skip


def _queries(rng, shape, keys, kind):
    """Queries where keys are, on them, in between, or far from all."""
    flat = keys.reshape(-1, keys.shape[-1])
    with np.errstate(over="ignore", invalid="ignore"):
        spread = float(np.median(np.abs(flat - np.median(flat)))) or float(np.abs(flat).max()) or 1.0
    near = flat[rng.integers(0, len(flat), int(np.prod(shape[:-1])))].reshape(shape)
    if kind == "on keys":
        return near
    if kind == "between":
        other = flat[rng.integers(0, len(flat), int(np.prod(shape[:-1])))].reshape(shape)
        return near / 2 + other / 2
    jitter = rng.standard_normal(shape) * spread
    if kind == "far":
        return near + rng.choice([-1, 1], shape) * spread * 10.0 ** rng.uniform(0, 9)
    if kind == "some far":
        return near + jitter * np.where(rng.random((*shape[:-1], 1)) < 0.2, 10.0 ** rng.uniform(1, 9), 0.1)
    return near + jitter * 10.0 ** rng.uniform(-4, 0.5)


def _values(rng, shape):
    kind = rng.choice(
        ["normal", "normal", "offset", "one sign", "mixed", "large", "constant", "small", "integers"]
    )
    u = rng.standard_normal(shape)
    if kind == "offset":
        return u + rng.choice([-1, 1]) * 10.0 ** rng.uniform(0, 6)
    if kind == "one sign":
        return 1 + rng.random(shape)
    if kind == "mixed":
        return u * 10.0 ** rng.uniform(-8, 4, shape)
    if kind == "large":
        return u * 10.0 ** rng.uniform(5, 25)
    if kind == "small":
        return u * 10.0 ** rng.uniform(-25, -5)
    if kind == "constant":
        return np.full(shape, rng.choice([0.0, 1.0, -3.7, 1e4]))
    return np.round(u * 3) if kind == "integers" else u


def _w(rng, shape, keys, queries, largest):
    """Inverse bandwidths from average pooling over smooth fits to one key a row."""
    chance = rng.random()
    if chance < 0.04:
        return np.zeros(shape)
    if chance < 0.08:
        return np.full(shape, rng.choice([1e-30, 1e-10, 1e10, 1e15, 1e20, 1e30, largest]))
    with np.errstate(over="ignore", invalid="ignore"):
        spread = float(np.median(np.abs(keys - np.median(keys)))) or float(np.abs(keys).max()) or 1.0
        result = (
            rng.choice([-1, 1], p=[0.1, 0.9])
            * 10.0 ** rng.uniform(-2, 3.5)
            / spread
            * rng.uniform(0.5, 2, shape)
        )
    if chance < 0.2 and math.prod(shape) > 1:
        result = result * rng.choice([0, 1e-3, 1, 30], shape)
    return np.clip(result, -largest, largest)


def _mask(rng, case_arrays, weight, dtype):
    """Weights of zero, with keys under them that must not matter."""
    query, key, value = case_arrays
    masked = rng.random(weight.shape) < rng.choice([0.1, 0.5, 0.9])
    if masked.ndim == 1 and rng.random() < 0.3:  # padding
        masked[:] = np.arange(len(masked)) >= len(masked) * rng.random()
    weight = np.where(masked, rng.choice([0.0, -0.0]), weight)
    kind = rng.choice(["as they are", "near", "broken", "huge"])
    places = (
        np.broadcast_to(masked, key.shape[:-1])
        if masked.ndim == 1 or masked.shape == key.shape[:-1]
        else None
    )
    if places is None or kind == "as they are":
        return weight, key, value, kind
    key, value = key.copy(), value.copy()
    whole = masked if masked.ndim == 1 else np.ones(0)
    if kind == "near":
        flat = query.reshape(-1, query.shape[-1])
        key[places] = flat[rng.integers(0, len(flat), int(places.sum()))]
    else:
        bad = [np.nan, np.inf, -np.inf] if kind == "broken" else [1e30, -1e30, 3e38]
        key[places] = rng.choice(bad)
        if whole.size:
            value[..., whole, :] = rng.choice(bad)
    return weight, key, value, kind


def draw(rng, backends, methods, entries=("function", "index", "module")) -> Case:
    """A case at random."""
    dtype = rng.choice(["float32", "float64", "float16", "bfloat16"], p=[0.55, 0.33, 0.06, 0.06])
    dtype = getattr(torch, dtype)
    backend = str(rng.choice(backends))
    wide = dtype == torch.float64
    form = str(rng.choice(["1-D", "per query", "general"], p=[0.5, 0.08, 0.42]))
    d = 1 if form != "general" else int(rng.choice(_FEATURES, p=_SHARES))
    d = min(d, 64) if backend == "triton" else d  # the interpreter takes them one by one
    c = 0 if form == "per query" or rng.random() < 0.55 else int(rng.choice([1, 2, 3, 4, 8, 9, 16, 17, 20]))
    exclude_self = form != "per query" and rng.random() < 0.2
    while True:
        n = _size(rng)
        m = n if exclude_self else _size(rng)
        if backend == "triton":
            n, m = min(n, 90), min(m, 20)
            m = n = min(m, n) if exclude_self else m or n
            if not exclude_self:
                n = min(_size(rng), 90)
        if m * n * (max(1, c) + d) <= LARGEST_PRODUCT:
            break
    batch = ()
    if form == "general" and rng.random() < 0.4:
        batch = tuple(int(b) for b in rng.integers(1, 4, rng.integers(1, 3)))
        while m * n * (max(1, c) + d) * math.prod(batch) > 2 * LARGEST_PRODUCT:
            m = n = max(1, min(m, n) // 2)

    while backend == "triton" and m > 1 and m * d * math.prod(batch) > INTERPRETED:
        m //= 2
        n = m if exclude_self else n

    def some(dims):  # leading dimensions that broadcast
        return tuple(1 if rng.random() < 0.25 else size for size in dims)

    key_kind = str(rng.choice(_KINDS))
    if form == "per query":
        key_shape, query_shape, value_shape = (m, n, 1), (m, 1, 1), (m, n, 1)
    else:
        key_shape, query_shape, value_shape = (
            (*some(batch), n, d),
            (*some(batch), m, d),
            (*some(batch), n, max(1, c)),
        )
    # Squares of float64 coordinates beyond the range of float32 may leave that of float64 in the kernels of GPUs and in
    # the plain formula of the reference.
    keys = _round(rng, _places(rng, key_shape, key_kind, wide and backend not in ("triton", "reference")))
    query_kind = str(rng.choice(["near", "near", "on keys", "between", "far", "some far"]))
    if exclude_self and key_shape == query_shape and rng.random() < 0.7:
        queries, query_kind = keys.copy(), "the keys"
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            queries = _round(rng, _queries(rng, query_shape, keys, query_kind))
    order = "unsorted"
    values = _values(rng, value_shape)
    if d == 1 and rng.random() < 0.35:
        order = "sorted"
        keys, queries = np.sort(keys, -2), np.sort(queries, -2)

    limit = torch.finfo(dtype).max
    arithmetic_limit = torch.finfo(torch.float64 if wide else torch.float32).max

    def cast(array, t=dtype):
        finite = np.isfinite(array)
        return torch.from_numpy(np.where(finite, np.clip(array, -limit, limit), array)).to(t)

    full = torch.broadcast_shapes(query_shape[:-2], key_shape[:-2], value_shape[:-2])
    w_shapes = [(), (1,)]
    if form == "general":
        w_shapes += [(d,), (d,)]
        if batch:
            w_shapes += [(*full, d), (*full, 1), (full[-1], d)]
    elif form == "per query":
        w_shapes += [(m, 1)]
    w_shape = w_shapes[rng.integers(len(w_shapes))]
    w = _w(rng, w_shape, keys, queries, arithmetic_limit)
    w_is_number = w_shape == () and rng.random() < 0.4
    w_dtype = torch.float64 if wide else torch.float32
    if not w_is_number and (wide or dtype == torch.float32 or rng.random() < 0.5):
        w_dtype = dtype
    if d > 8:  # the distance grows with the number of features
        w = w / math.sqrt(d)

    key_weight, mask_kind = None, ""
    if rng.random() < 0.4:
        weight_shape = (n,) if form == "1-D" or rng.random() < 0.6 else key_shape[:-1]
        key_weight = rng.random(weight_shape) + 0.1
        if rng.random() < 0.4:
            key_weight = 10.0 ** rng.uniform(-12 if dtype != torch.float16 else -4, 4, weight_shape)
        if rng.random() < 0.6:
            key_weight, keys, values, mask_kind = _mask(rng, (queries, keys, values), key_weight, dtype)
    spoiled = ""
    if rng.random() < 0.08:
        spoiled = str(rng.choice(["query NaN", "query inf", "own key"]))
        flat = queries.reshape(-1, d)
        if spoiled == "query NaN":
            flat[rng.integers(len(flat)), rng.integers(d)] = np.nan
        elif spoiled == "query inf":
            flat[rng.integers(len(flat))] = rng.choice([np.inf, -np.inf])
        elif exclude_self:
            row = rng.integers(n)
            (keys if rng.random() < 0.5 else values)[..., row, :] = np.nan
        queries = flat.reshape(queries.shape)

    query, key, value = cast(queries), cast(keys), cast(values)
    if form == "per query":
        query, key, value = query[:, 0, 0], key[..., 0], value[..., 0]
    elif form == "1-D":
        query, key = query[..., 0], key[..., 0]
    if form != "per query" and c == 0:
        value = value[..., 0]
    shape = out_shape(query, key, value)
    grad_out = cast(rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3))
    case = Case(
        query, key, value,
        torch.from_numpy(np.asarray(np.clip(w, -torch.finfo(w_dtype).max, torch.finfo(w_dtype).max))).to(w_dtype),
        None if key_weight is None else cast(key_weight),
        grad_out, None, exclude_self, w_is_number=w_is_number, backend=backend,
    )  # fmt: skip
    case.return_lse = rng.random() < 0.6
    if case.return_lse and rng.random() < 0.5:
        lse_dtype = torch.float64 if wide else torch.float32
        case.grad_lse = torch.from_numpy(np.asarray(rng.standard_normal(case.lse_shape()))).to(lse_dtype)
    if rng.random() < 0.3 or spoiled:  # rows that are padding: no cotangent
        rows = torch.from_numpy(np.asarray(rng.random(case.lse_shape()) < 0.3))
        rows |= ~_finite_rows(case, rows)
        wide_rows = rows if rows.ndim == grad_out.ndim else rows[..., None]
        case.grad_out = torch.where(wide_rows, torch.zeros((), dtype=dtype), grad_out)
        if case.grad_lse is not None:
            case.grad_lse = torch.where(rows, torch.zeros((), dtype=case.grad_lse.dtype), case.grad_lse)
    most = nwfast.backends.FGT_FEATURES.get(backend, 0)
    possible = [m for m in methods if m != "fgt" or d <= most] or ["auto"]
    case.method = str(rng.choice(possible))
    names = [name for name in case.tensors() if not (name == "w" and w_is_number)]
    case.needs = tuple(names)
    if rng.random() < 0.4:
        case.needs = tuple(name for name in names if rng.random() < 0.5)
    case.layout = str(rng.choice(["plain", "strided", "transposed", "expanded"], p=[0.7, 0.1, 0.1, 0.1]))
    if backend != "triton" and rng.random() < 0.15:
        if form == "1-D" and w_shape in ((), (1,)) and "index" in entries and rng.random() < 0.7:
            case.entry = "index"
        elif (
            w.ndim and not w_is_number and key_weight is None and not case.return_lse and "module" in entries
        ):
            case.entry = "module"
    case.situation = ", ".join(
        filter(
            None,
            [
                f"keys {key_kind}",
                f"queries {query_kind}",
                order,
                mask_kind and f"masked {mask_kind}",
                spoiled,
            ],
        )
    )
    return case


def _finite_rows(case, rows):
    finite = case.query.isfinite()
    if case.query.ndim > 1:
        finite = finite.all(-1)
    return finite.broadcast_to(rows.shape)
