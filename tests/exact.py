"""What the op should return, in long double, and how far rounding alone may take a kernel from it.

Scores are taken relative to the nearest kept key r of each row, so that no distance costs digits:

    s_j - s_r = -sum_f w_f^2 (k_r - k_j)(2 q - k_j - k_r) / 2

Left-out keys are dropped. The bounds follow the rounding of each term through the formulas, u times sums of absolute
terms: a score carries its own size relative to the nearest key, and where that key is near also that of its distance,
which kernels may leave in until it matters. Bounds are computed in float64, in a third of the time, where no number is
so large or small that one of their products might not be held: `_bound_type`.
"""

import dataclasses

import numpy as np
import torch

Real = np.longdouble
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Half a squared distance, in bandwidths, from which on a row is far: its nearest key's distance may cost nothing then.
# With one feature and one channel kernels have sums of their own for such rows. Tiles of keys, whose scores are sums of
# squares, are the textbook's arithmetic, and as good, for as long as its weights are numbers: up to -log(tiny).
FAR = 64.0
# Below it float16 rounds as it does there.
SMALL_HALVES = Real(2.0) ** -14
# What linear time interpolates over, in bandwidths.
BOXES = 4.0
# The share of the nearest key's term that all keys beyond the windows of linear time may add: docs/linear-time.md. A
# single one of N is left out below this share of 1 / N or, where a window has shrunk, of 1 / 64; a box below 0.4 of it,
# beside the row's sum, and of several features what lies beyond the window below all of it.
BEYOND = {torch.float64: 2.5e-14, torch.float32: 5e-9}
SHRUNK = 64
BOX = 0.4


@dataclasses.dataclass
class Bounded:
    """Right values and, for each, the largest error; an infinite bound: nothing is promised."""

    value: np.ndarray
    bound: np.ndarray

    @classmethod
    def zeros(cls, *shape: int) -> "Bounded":
        return cls(np.zeros(shape, Real), np.zeros(shape, Real))


def exp(x: np.ndarray) -> np.ndarray:
    """np.exp of long double without what is 0: where that underflows it takes five times as long."""
    return np.exp(np.where(x < -11420, -np.inf, x))


def _bound_type(*arrays):
    """What bounds can be computed in, from all that goes into them."""
    for array in arrays:
        size = np.abs(array[np.isfinite(array) & (array != 0)])
        if size.size and not (size.min() > 2.0**-100 and size.max() < 2.0**100):
            return Real
    return np.float64


def _nearest(q, k, w, kept, bound):
    """Scores (M, N) relative to each row's nearest kept key, their conditions, and that key's number."""
    distance = np.zeros((len(q), len(k)), Real)
    for f in range(len(w)):
        distance += ((q[:, None, f] - k[None, :, f]) * w[f]) ** 2
    reference = np.where(kept, distance, np.inf).argmin(1)
    for last in (False, False, True):  # the first choice may be a rounded tie of keys that differ
        relative, condition = np.zeros_like(distance), np.zeros(distance.shape, bound)
        for f in range(len(w)):
            to_key, to_nearest = q[:, None, f] - k[None, :, f], (q[:, f] - k[reference, f])[:, None]
            step = (k[reference, f][:, None] - k[None, :, f]) * w[f]
            relative -= step * ((to_key + to_nearest) * w[f]) / 2
            lengths = np.abs(to_key.astype(bound, copy=False)) + np.abs(to_nearest.astype(bound))
            condition += np.abs(step.astype(bound, copy=False)) * (lengths * bound(abs(w[f]))) / 2
        best = np.where(kept, relative, -np.inf).argmax(1)
        if last or not (np.take_along_axis(relative, best[:, None], 1) > 0).any():
            break
        reference = best
    # Ties below the precision of long double, which the bounds allow for: none may overflow. Scores become those
    # relative to the best key, and the condition of the reference is that of the two.
    best = np.where(kept, relative, -np.inf).argmax(1)[:, None]
    above = np.maximum(np.where(kept, relative, 0).max(1, keepdims=True), 0)
    condition += np.where(above > 0, np.take_along_axis(condition, best, 1), 0)
    relative -= above
    return relative, condition, reference


def element(q, k, v, w, a, g, gl, exclude_self, unit, tiny, far, boxes, share=0.0, halves=0.0, plain=False):
    """Results and gradients of one batch element: (M, D), (N, D), (N, C), (D,), (N,), (M, C), (M,) in long double.

    `g` and `gl` are the cotangents of out and lse; `unit` and `tiny` the unit roundoff and the smallest normal number
    of the arithmetic; `share` BEYOND of it where linear time may compute, or 0; `halves` the unit roundoff of weights
    that are rounded for products, or 0; `plain` whether sums are products of matrices, which may add term by term.
    """
    (m, d), (n, c) = q.shape, v.shape
    out, lse = Bounded.zeros(m, c), Bounded.zeros(m)
    grads = {
        "query": Bounded.zeros(m, d),
        "key": Bounded.zeros(n, d),
        "value": Bounded.zeros(n, c),
        "w": Bounded.zeros(d),
        "key_weight": Bounded.zeros(n),
    }
    left_out = a == 0
    seen = ~np.eye(m, n, dtype=bool) if exclude_self else np.ones((m, n), bool)
    broken_key = (np.isnan(k).any(1) | np.isnan(a) | (a < 0)) & ~left_out
    broken_value = np.isnan(v) & ~left_out[:, None]
    infinite_key = np.isinf(k).any(1)
    infinite_query = np.isinf(q).any(1)
    kept = seen & ~(left_out | infinite_key | broken_key) & ~infinite_query[:, None]
    broken = np.isnan(q).any(1) | (seen & broken_key).any(1) | np.isnan(w).any()
    empty = ~kept.any(1) & ~broken
    channel_broken = (seen[:, :, None] & broken_value[None]).any(1)
    moved = (g != 0).any(1) | (gl != 0)
    unpromised = (
        broken | channel_broken.any(1)
    ) & moved  # what such rows give to gradients is NaN or nothing

    place_finite = np.isfinite(k).all(1)
    own_finite = place_finite & np.isfinite(v).all(1)
    k0, v0 = np.where(place_finite[:, None], k, 0), np.where(np.isfinite(v), v, 0)
    counting = np.flatnonzero(~broken & ~empty)
    if counting.size and not np.isnan(w).any():
        rows = _rows(
            q[counting], k0, v0, w, a, g[counting], gl[counting], kept[counting],
            seen[counting] & place_finite & ~broken_key, unit, tiny, far, boxes, share, halves, plain,
        )  # fmt: skip
        out.value[counting], out.bound[counting] = rows["out"]
        lse.value[counting], lse.bound[counting] = rows["lse"]
        # Gradients: rows without a cotangent add nothing, whatever they hold.
        grads["query"].value[counting], grads["query"].bound[counting] = rows["query"]
        for name in ("key", "value", "w", "key_weight"):
            grads[name].value, grads[name].bound = rows[name]
    out.value[broken | empty], lse.value[broken], lse.value[empty] = np.nan, np.nan, -np.inf
    out.bound[channel_broken.any(1)] = np.inf
    out.value[channel_broken], out.bound[channel_broken] = np.nan, 0
    grads["query"].bound[unpromised] = np.inf
    if unpromised.any():
        for name in ("key", "value", "w", "key_weight"):
            grads[name].bound[...] = np.inf
            grads[name].value[np.isinf(grads[name].value)] = 0  # nor that they are beyond all numbers
    for name in ("key", "value"):
        grads[name].value[left_out], grads[name].bound[left_out] = 0, 0
    lost = left_out & ~own_finite
    grads["key_weight"].value[lost], grads["key_weight"].bound[lost] = 0, 0
    return out, lse, grads


def _rows(q, k, v, w, a, g, gl, kept, seen, unit, tiny, far, boxes, share, halves, plain):
    m, n = kept.shape
    d, c = q.shape[1], v.shape[1]
    bound = _bound_type(q, k, v, w, a, g, gl)
    relative, condition, reference = _nearest(q, k, w, kept, bound)
    if np.where(seen, relative, 0).max() > 300:  # of a left-out key: its term may be beyond float64
        bound = Real
    # What bounds are made of; what results are made of stays as it is.
    unit, tiny, share, halves, small_halves, condition, x, y, values, cotangents, into_lse, widths = (
        np.asarray(part, bound)[()]
        for part in (
            unit,
            tiny,
            share,
            halves,
            SMALL_HALVES,
            condition,
            q,
            k,
            v,
            np.abs(g),
            np.abs(gl),
            np.abs(w),
        )
    )
    to_nearest = q - k[reference]
    depth = ((to_nearest * w) ** 2).sum(1) / 2
    # With many features all distances are large, and kernels leave more of them in.
    near = np.minimum(depth, max(far, FAR * d / 4)).astype(bound)
    e = exp(np.where(seen, relative, -np.inf))
    p = np.where(kept, a * e, 0)
    total = p.sum(1)
    p, e = p / total[:, None], e / total[:, None]
    part, e_part = p.astype(bound), e.astype(bound)
    # Relative error of a term: of its score, of exp2, of the weight; then what a term may lose for being small.
    grow = (8 + (n if plain else n**0.5)) * (1 + boxes)
    off = unit * (8 * (1 + boxes) + 4 * condition + 4 * near[:, None])
    small = 2 * unit / n + 2 * tiny
    least = bound(2.0) ** (-900 if unit < 1e-12 else -100)  # where exp2 ends: a weight may be that for 0
    of_sum = share * (BOX if d == 1 else 1)
    dropped, e_dropped = (
        _beyond(terms, of, reference, share, of_sum) for terms, of in ((part, kept), (e_part, seen))
    )
    normaliser = (part * off).sum(1) + unit * grow + dropped.sum(1)
    off = off + normaliser[:, None]

    out = np.zeros((m, c), Real)
    pulled = np.zeros((m, n), Real)
    pulled_size, values_size, out_bound = (np.zeros(shape, bound) for shape in ((m, n), (m, n), (m, c)))
    # Scores at such distances that double precision ends before their differences begin: which key is nearest is open.
    unsettled = bound(2.0) ** -50 * condition
    score, sums = relative.astype(bound), total.astype(bound)[:, None]
    # Kernels may take any such key for the nearest, and all scores relative to it: they are as good as its own.
    rivals = kept & (score + unsettled >= 0)
    unsettled = unsettled + bound(2.0) ** -50 * np.where(rivals, condition, 0).max(1, keepdims=True)
    # Such a key may be the nearest by any measure: it takes its part from all others, here from the reference.
    most = np.minimum(score + unsettled, 10000 if bound is Real else 700)
    largest = np.exp(most)
    weights = a.astype(bound)
    gained = np.where(kept, weights * np.maximum(largest - np.exp(np.minimum(score, most)), 0), 0) / sums
    gained = gained / (1 + gained)
    taken = np.minimum(gained.sum(1, keepdims=True), 1)
    lost = np.minimum(part, small) + gained + part * taken
    open_e = np.where(seen, largest, 0) / sums - e_part
    e_lost = np.minimum(e_part, small) + np.maximum(open_e, 0) + e_part * taken
    if boxes:  # sums are as good as their largest terms, and expansions err as exp(-z^2 / 4) falls
        within = (unit + bound(2.0) ** -45) * np.where(score > -32, 1, np.exp(np.minimum(score, 0) / 2))
        lost += within * kept * part.max(1, keepdims=True)
        e_lost += within * seen * np.where(kept, e_part, 0).max(1, keepdims=True)
        lost += dropped
        e_lost += e_dropped
    for channel in range(c):
        out[:, channel] = p @ v[:, channel]
        mean, column = out[:, channel, None].astype(bound), values[None, :, channel]
        deviation = np.abs(column - mean)
        size = (part * np.abs(column)).sum(1)
        out_bound[:, channel] = (
            (part * deviation * (off + halves)).sum(1)
            + unit * grow * size
            + ((lost + least + halves * small_halves) * deviation).sum(1)
        )
        weight = cotangents[:, channel, None]
        pulled += g[:, channel, None] * (v[None, :, channel] - out[:, channel, None])
        pulled_size += weight * deviation
        values_size += weight * (np.abs(column) + np.abs(mean))
    pulled += gl[:, None]
    pulled_size += into_lse[:, None]
    pulled_bound = 4 * unit * (values_size + pulled_size) + (cotangents * out_bound).sum(1)[:, None]

    rest = np.log(total)
    lse = -depth + rest
    lse_bound = normaliser + unit * (4 + 8 * depth + 2 * np.abs(rest)).astype(bound)

    moved = (g != 0).any(1) | (gl != 0)
    p, e, part, e_part, off, e_lost, lost, pulled, pulled_size, pulled_bound = (
        array[moved] for array in (p, e, part, e_part, off, e_lost, lost, pulled, pulled_size, pulled_bound)
    )
    grow_m = (8 + (m if plain else m**0.5)) * (1 + boxes)
    term = p * pulled
    size = part * pulled_size
    # Linear time sums what comes from values and from outputs apart.
    lost_size = pulled_size + values_size[moved] if boxes else pulled_size
    error = size * off + (part + lost) * pulled_bound + lost * lost_size
    ended = least * pulled_size
    results = {"out": (out, out_bound), "lse": (lse, lse_bound)}

    with np.errstate(invalid="ignore", over="ignore"):
        e_error = e_part * pulled_size * (off + unit * grow_m)
        e_error += (e_part + e_lost) * pulled_bound + e_lost * lost_size
        slope = (e * pulled).sum(0)
        beyond = ~np.isfinite(slope)  # of a left-out key much nearer than all kept ones
        results["key_weight"] = (np.where(beyond, np.inf, slope), np.where(beyond, np.inf, e_error.sum(0)))
    gm, glm = cotangents[moved], into_lse[moved]
    results["value"] = (
        p.T @ g[moved],
        (part * (off + unit * grow_m + halves) + lost + least + halves * small_halves).T @ gm,
    )
    query, key, dw = np.zeros((m, d), Real), np.zeros((n, d), Real), np.zeros(d, Real)
    query_bound, key_bound, dw_bound = (np.zeros(shape, bound) for shape in ((m, d), (n, d), d))
    # A slope of out among the least numbers is rounded to one before it meets its cotangent, and a length in bandwidths
    # or its product with a term before it meets the other w.
    last = 2 * unit * tiny
    slopes = last * gm.sum(1)
    row_error, key_side_error = error + unit * grow * size, error + unit * grow_m * size
    both_errors = error + unit * (grow + grow_m) * size
    for f in range(d):
        step = k[None, :, f] - k[reference[moved], f][:, None]
        nearest = to_nearest[moved, f]
        to_key = q[moved, f][:, None] - k[None, :, f]
        query[moved, f] = abs(w[f]) * ((term * step).sum(1) - gl[moved] * nearest) * abs(w[f])
        key[:, f] = abs(w[f]) * ((term * to_key).sum(0) * abs(w[f]))
        dw[f] = w[f] * ((term * step * (to_key + nearest[:, None])).sum() - (gl[moved] * nearest**2).sum())
        wf = widths[f]
        # Lengths, of the step, to the key and to the nearest one.
        step = np.abs(y[None, :, f] - y[reference[moved], f][:, None])
        nearest = np.abs(nearest.astype(bound))
        to_key = np.abs(x[moved, f][:, None] - y[None, :, f])
        both = to_key + nearest[:, None]
        # Lengths that rounding may cost where they are longer than the difference: a near row may be summed without a
        # reference (its terms then cancel to rounding only), and interpolation knows places to rounding of a box.
        near = np.minimum(nearest, np.sqrt(2 * bound(FAR)) / wf if wf else 0)[:, None]
        box = boxes / wf if wf else 0
        query_error = (row_error * (step + near + box)).sum(1)
        query_error += 8 * unit * glm * nearest
        query_bound[moved, f] = wf * (query_error * wf + _ends(ended, step * wf).sum(1)) + slopes
        query_bound[moved, f] += wf * last * (n + size.sum(1) + glm)
        # The reference has this distance as that to the nearest key and the step from there.
        key_error = (key_side_error * ((both if plain else to_key) + box)).sum(0)
        key_bound[:, f] = wf * (key_error * wf + _ends(ended, to_key * wf).sum(0) + last * (m + size.sum(0)))
        dw_error = (both_errors * (step * both + near**2 + box**2)).sum()
        dw_error += 8 * unit * (glm * nearest**2).sum()
        dw_bound[f] = (
            wf * dw_error + (_ends(ended, step * both * wf**2).sum() / wf if wf else 0) + slopes.sum()
        )
    results |= {"query": (query, query_bound), "key": (key, key_bound), "w": (dw, dw_bound)}
    return results


def _beyond(terms, of, reference, share, of_sum):
    """Those terms that linear time leaves out: of so small a share of the nearest key, or of the sum (which is 1)."""
    nearest = np.take_along_axis(terms, reference[:, None], 1)
    most = np.maximum(nearest * (share / min(terms.shape[1], SHRUNK)), of_sum)
    return np.where(of & (terms <= most), terms, 0)


def _ends(ended, lengths):
    """What weights that are not quite zero add, at lengths in bandwidths that are not too long for them."""
    return ended * np.minimum(np.abs(lengths), 1e6)


def _wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy().astype(Real)


def allowed(found: torch.Tensor, right: Bounded, terms: int) -> np.ndarray:
    """The largest error of each entry: the bound, the rounding to the dtype of `found`, and what underflow takes."""
    limits = torch.finfo(found.dtype)
    floor = limits.smallest_normal * limits.eps * 16 * (4 + terms)
    return right.bound + 2 * Real(UNIT[found.dtype]) * np.abs(right.value) + floor


def assert_accurate(found: torch.Tensor, right: Bounded, what: str = "") -> None:
    """Every entry within what its own rounding allows."""
    assert tuple(found.shape) == right.value.shape, (
        f"{what}: shape {tuple(found.shape)} for {right.value.shape}"
    )
    bound = allowed(found, right, found.numel())
    with np.errstate(invalid="ignore"):
        error = np.abs(_wide(found) - right.value)
    # Beyond all numbers (of left-out keys much nearer than all kept ones) any will do.
    beyond = np.isinf(right.bound) | (np.abs(right.value) + bound > 0.9 * torch.finfo(found.dtype).max)
    error = np.where(beyond & ~np.isnan(_wide(found)), 0, error)
    if (error <= bound).all():  # also of no entries
        return
    place = np.unravel_index(np.nanargmax(np.where(error <= bound, -1, error / bound)), error.shape)
    raise AssertionError(
        f"{what}: {_wide(found)[place]:.9g} at {tuple(map(int, place))} for {right.value[place]:.9g}, error "
        f"{error[place]:.3g}, allowed {bound[place]:.3g}"
    )


def _summed_to(result: Bounded, shape: tuple[int, ...], dtype: torch.dtype) -> Bounded:
    """Sums over the dimensions that were broadcast; nothing is promised of terms that overflow on the way."""

    def summed(array):
        array = array.sum(tuple(range(array.ndim - len(shape))))
        axes = tuple(i for i, size in enumerate(shape) if size == 1 and array.shape[i] != 1)
        return array.sum(axes, keepdims=True).reshape(shape)

    size = summed(np.abs(result.value))
    beyond = (size > 0.9 * torch.finfo(dtype).max) & np.isfinite(size)
    return Bounded(summed(result.value), np.where(beyond, np.inf, summed(result.bound)))


def solve(
    query,
    key,
    value,
    w,
    key_weight,
    grad_out,
    grad_lse=None,
    exclude_self=False,
    plain=False,
    boxes=0.0,
    half_products=False,
) -> dict[str, Bounded]:
    """Every result by name: out, lse, and the gradients of query, key, value, w and (if given) key_weight.

    For all accepted shapes; `grad_out` and `grad_lse` (None for zeros) are the cotangents. With `plain` the bounds
    are those of plain PyTorch in float64, whatever the dtype. `boxes` is BOXES where linear time may compute: distances
    are known to rounding of such a length there, and sums to that many more units. With `half_products` products of
    matrices may take their weights in the dtype of the inputs.
    """
    dtype = query.dtype
    w = torch.as_tensor(w)
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape, "w": w.shape}
    has_channels = True
    per_query = query.ndim == 1 and key.ndim == 2
    if query.ndim == 1:
        has_channels = value.ndim == 2 and not per_query
        query = query[:, None, None] if per_query else query[:, None]
        key = key[..., None]
        value = value if has_channels else value[..., None]
    elif value.ndim == key.ndim - 1:
        has_channels, value = False, value[..., None]
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    (m, d), (n, c) = query.shape[-2:], value.shape[-2:]
    arrays = [
        np.broadcast_to(_wide(tensor), (*batch, *tensor.shape[-2:])).reshape(-1, *tensor.shape[-2:])
        for tensor in (query, key, value)
    ]
    ws = np.broadcast_to(_wide(w if w.ndim else w[None]), (*batch, d)).reshape(-1, d)
    ones = torch.ones(n) if key_weight is None else key_weight
    a = np.broadcast_to(_wide(ones), (*batch, n)).reshape(-1, n)
    elements = len(ws)
    g = _wide(grad_out).reshape(elements, m, c)
    gl = np.zeros((elements, m), Real) if grad_lse is None else _wide(grad_lse).reshape(elements, m)
    arithmetic = torch.float64 if dtype == torch.float64 or plain else torch.float32
    unit, tiny = Real(UNIT[arithmetic]), Real(torch.finfo(arithmetic).tiny)
    far = FAR if plain or d == c == 1 else max(FAR, float(-np.log(tiny)))
    halves = Real(UNIT[dtype]) if half_products and dtype in (torch.float16, torch.bfloat16) else Real(0)
    numbers = unit, tiny, far, boxes, BEYOND[arithmetic] if boxes else 0.0, halves, plain
    parts = [
        element(*(x[b] for x in arrays), ws[b], a[b], g[b], gl[b], exclude_self, *numbers)
        for b in range(elements)
    ]

    def stacked(results):
        value = np.stack([r.value for r in results])
        bound = np.stack([r.bound for r in results])
        return Bounded(value.reshape(*batch, *value.shape[1:]), bound.reshape(*batch, *bound.shape[1:]))

    found = {"out": stacked([part[0] for part in parts]), "lse": stacked([part[1] for part in parts])}
    for name in ("out", "lse"):
        shape = grad_out.shape
        if name == "lse" and has_channels:
            shape = shape[:-1]
        found[name].value, found[name].bound = (
            x.reshape(shape) for x in (found[name].value, found[name].bound)
        )
    canonical = {"query": query.shape, "key": key.shape, "value": value.shape}
    for name in ("query", "key", "value"):
        found[name] = _summed_to(stacked([part[2][name] for part in parts]), canonical[name], dtype)
        found[name].value = found[name].value.reshape(shapes[name])
        found[name].bound = found[name].bound.reshape(shapes[name])
    found["w"] = _summed_to(stacked([part[2]["w"] for part in parts]), w.shape if w.ndim else (1,), dtype)
    found["w"].value, found["w"].bound = (x.reshape(w.shape) for x in (found["w"].value, found["w"].bound))
    if key_weight is not None:
        found["key_weight"] = _summed_to(
            stacked([part[2]["key_weight"] for part in parts]), key_weight.shape, dtype
        )
    return found
