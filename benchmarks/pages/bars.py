"""What measured numbers are held against. A bar that is missed is printed and reported, and fails nothing."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from benchmarks.measure.alternate import spread
from benchmarks.measure.bar import Bar
from benchmarks.measure.scale import Scale
from benchmarks.measure.session import Session, ratio
from benchmarks.problems import several


@dataclass(frozen=True)
class Ratio:
    """A bar on the time of one entry over that of another of its group."""

    what: str
    group: str
    slow: str
    fast: str
    limit: float
    at_least: bool = True


def ratios(scale: Scale) -> list[Ratio]:
    """Of dense kernels, then of the linear-time method."""
    n, m = scale.points, scale.chapter
    one = f"forward, N = M = {n}, one feature, one channel"
    to_w = f"forward + backward to w, N = M = {n}"
    to_all = f"forward + backward to q, k, v, w, N = M = {n}"
    found = [
        Ratio("forward, against torch.compile", one, "torch.compile", "native", 5),
        Ratio("forward, against the textbook", one, "textbook", "native", 60),
        Ratio("Numba forward, against torch.compile", one, "torch.compile", "numba", 1.5),
        Ratio("forward + backward to w, against torch.compile", to_w, "torch.compile", "native", 30),
        Ratio("forward + backward to w, against the textbook", to_w, "textbook", "native", 150),
        Ratio("forward + backward to w, over the forward", to_w, "native", "native forward", 1.5, False),
        Ratio(
            "forward + backward to q, k, v, w, over the forward", to_all, "native", "native forward", 4, False
        ),
    ]
    for shape, limit in ("D = 3, C = 1", 5), ("D = 3, C = 64", 1):
        group = f"forward, N = M = {n}, {shape}"
        found.append(
            Ratio(f"forward, {shape}, against torch.compile", group, "torch.compile", "native", limit)
        )
    for kind, limit in ("forward", 1.2), ("forward + backward", 2), ("training step", 2):
        group = f"{kind}, n = {m}, keys ({m}, {m - 1})"
        found.append(Ratio(f"{group}, against the textbook", group, "textbook", "native", limit))
    return found + list(_linear_time(scale)) + list(_several(scale))


def _linear_time(scale: Scale) -> Iterator[Ratio]:
    n = max(size for size in scale.scaling if size <= 1_000_000)
    for size, w, limit in [(n, 3.0, 1), *((size, w, 1 if w < 1000 else 2) for size, w in scale.narrow)]:
        group = f"forward, N = M = {size}, one feature, one channel, w = {w:g}"
        what = f"linear time, N = M = {size}, w = {w:g}"
        yield Ratio(f"{what}, over np.sort", group, "native fgt", "np.sort", limit, at_least=False)
        if w < 1000:
            yield Ratio(f"{what}, against the FINUFFT ratio", group, "FINUFFT ratio", "native fgt", 3)
        if w == 3 or w >= 1000:
            yield Ratio(f"{what}, Numba over C++", group, "numba fgt", "native fgt", 3, at_least=False)


def _several(scale: Scale) -> Iterator[Ratio]:
    """Two and three features in linear time, against the dense kernel and against its own forward pass."""
    for n, limit in (several.CROSSOVER, 1), (scale.several[-2:][0], 40):
        group = f"forward, N = M = {n}, D = 2, C = 1, unit square, w = {several.W[2]:g}"
        yield Ratio(f"{group}: linear time, against dense", group, "native", "native fgt", limit)
    n = scale.several[-1]
    for features, w in several.W.items():
        group = f"gradients, N = M = {n}, D = {features}, w = {w:g}"
        limits = {
            "to w, q": 2,
            "to q, k, v, w": 5,
            "leave-one-out step in w": 3,
            several.LOSS: 3,
            several.LINE: 2,
        }
        for kind, limit in limits.items():
            what = f"D = {features}, N = M = {n}, {kind}, over the forward"
            yield Ratio(what, group, kind, "forward", limit, at_least=False)
    group = f"growth, N = M = {n} and {4 * n}, D = 2, w = {several.W[2]:g}"
    small, large = f"N = M = {n}", f"N = M = {4 * n}"
    yield Ratio(f"D = 2, {large} over {small}", group, large, small, 5, at_least=False)


MOST_SECONDS = {2: 0.3, 3: 1.5}  # of the forward pass at any bandwidth, by features
LEAST_RATE = 1000  # times the dense kernel's pairs a second, with two features


def _bandwidths(records: dict[str, list]) -> Iterator[Bar]:
    """The slowest bandwidth of each kind of data."""
    rates = {own["features"]: own["pairs_per_second"] for own in records.get("dense rate", [])}
    kinds: dict[tuple[int, str], list[dict]] = {}
    for own in records.get("bandwidths", []):
        kinds.setdefault((own["features"], own["where"]), []).append(own)
    for (features, where), all_w in kinds.items():
        slowest = max(all_w, key=lambda own: own["seconds"]["median"])
        what = f"D = {features}, N = M = {slowest['n']}, {where}, slowest w"
        seconds = slowest["seconds"].values()
        yield Bar(f"{what}: forward", MOST_SECONDS[features], *seconds, at_least=False, unit="s")
        if features == 2 and rates:
            rate = slowest["n"] ** 2 / slowest["seconds"]["median"] / rates[features]
            yield Bar(f"{what}: pair rate over the dense kernel's", LEAST_RATE, *[rate] * 3)


MOST_SEVERAL_MB = 1500
MOST_CHOICE = 1.3
LEAST_SKIPPING = 5


def _once(records: dict[str, list]) -> Iterator[Bar]:
    """What is measured once."""
    for own in records.get("memory of several", []):
        what = f"D = {own['features']}, N = M = {own['n']}, memory beyond the inputs"
        yield Bar(what, MOST_SEVERAL_MB, *[own["added_MB"]] * 3, at_least=False, unit="MB")
    for own in records.get("skipping", []):
        what = f"D = {own['features']}, {own['clusters']} clusters, N = M = {own['n']}, skipping, over none"
        yield Bar(what, LEAST_SKIPPING, *[own["ratio"]] * 3)
    for own in records.get("choice", []):
        what = f'D = {own["features"]}, "auto" over the faster method, worst of {own["cases"]} cases'
        yield Bar(what, MOST_CHOICE, *[own["ratio"]] * 3, at_least=False)


MOST_ADDED_MB = 100
MOST_IMPORT_MS = 50


def bars(session: Session) -> list[Bar]:
    """All bars whose numbers were measured."""
    found = []
    for own in ratios(session.scale):
        outcomes = session.outcomes.get(own.group, {})
        slow, fast = (outcomes[label].seconds if label in outcomes else [] for label in (own.slow, own.fast))
        if slow and fast:
            found.append(Bar(own.what, own.limit, **ratio(slow, fast), at_least=own.at_least))
    found += [*_bandwidths(session.records), *_once(session.records)]
    for call in session.records.get("first call", []):
        what = f"forward, N = M = {call['n']}, memory over import"
        found.append(Bar(what, MOST_ADDED_MB, *[call["added_MB"]] * 3, at_least=False, unit="MB"))
    if session.records["imports"]:
        times = spread([1000 * own["nwfast"] for own in session.records["imports"]])
        numbers = asdict(times).values()
        found.append(
            Bar("import nwfast, over import torch", MOST_IMPORT_MS, *numbers, at_least=False, unit="ms")
        )
    for dtype, allowed in ("float32", "2 x textbook's + 4 ulp"), ("float64", "1e-12"):
        shares = [
            own["share"]
            for own in session.records["accuracy"]
            if own["dtype"] == dtype and "fgt" not in own["peer"]
        ]
        if shares:
            what = f"{dtype} error, as a share of {allowed}"
            found.append(Bar(what, 1, *[max(shares)] * 3, at_least=False, unit="of it"))
    return found
