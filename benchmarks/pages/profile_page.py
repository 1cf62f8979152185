"""The generated parts of docs/performance.md: the machine's ceiling, and the fraction of it that each kernel reaches.

Operations are the vector instructions of the innermost loop, for one vector of pairs, without moves: counted in the
disassembly for the kernels of one feature and one channel, and in the source for the others, whose loops are several.
"""

from dataclasses import dataclass

from benchmarks.pages.tables import format_time, table


@dataclass(frozen=True)
class Kernel:
    """A kernel, the group and label that time it, and its operations by instruction set."""

    name: str
    group: str  # with {n} for N = M
    label: str
    operations: dict[str, float]
    parts: str  # what they are, for AVX2
    minus: str = ""  # the label whose time is taken off: passes that come before

    @property
    def counted(self) -> bool:
        return bool(self.operations)


_FORWARD = "forward, N = M = {n}, one feature, one channel"
_TO_W = "forward + backward to w, N = M = {n}"
_TO_ALL = "forward + backward to q, k, v, w, N = M = {n}"
KERNELS = (
    Kernel(
        "native, one feature, forward",
        _FORWARD,
        "native",
        {"AVX-512": 11, "AVX2": 17},
        "difference 1, score 1, exp2 13 (clamp 2, floor 1, fraction 1, exponent 3, polynomial 5, product 1), sums 2",
    ),
    Kernel(
        "native, one feature, forward with the tangent of w",
        _TO_W,
        "native",
        {"AVX-512": 14, "AVX2": 20},
        "as before, and the offset sums 3",
    ),
    Kernel(
        "native, one feature, key side",
        _TO_ALL,
        "native",
        {"AVX-512": 15, "AVX2": 21},
        "difference 1, score 1, exp2 13, value sum 1, pull 3, sums 2",
        minus="native forward",
    ),
    Kernel(
        "native, tiled, D = 3, C = 1, forward",
        "forward, N = M = {n}, D = 3, C = 1",
        "native",
        {"AVX-512": 18, "AVX2": 24},
        "differences 3, squares 3, scale 1, maximum 1, shift 1, exp2 13, sums 2",
    ),
    Kernel(
        "native, tiled, D = 3, C = 64, forward",
        "forward, N = M = {n}, D = 3, C = 64",
        "native",
        {"AVX-512": 81, "AVX2": 87},
        "as before, and 64 multiply-adds for the channels in place of 1",
    ),
    Kernel(
        "numba, one feature, forward",
        _FORWARD,
        "numba",
        {"AVX-512": 17, "AVX2": 17},
        "as the native one: the same polynomial, compiled by LLVM",
    ),
    Kernel(
        "numba, one feature, forward with the tangent of w",
        _TO_W,
        "numba",
        {"AVX-512": 20, "AVX2": 20},
        "as before, and the offset sums 3",
    ),
    Kernel(
        "numba, D = 3, C = 1, forward",
        "forward, N = M = {n}, D = 3, C = 1",
        "numba",
        {"AVX-512": 24, "AVX2": 24},
        "differences 3, squares 3, scale 1, maximum 1, shift 1, exp2 13, sums 2",
    ),
)


def parts(content: dict) -> dict[str, str]:
    """Marker -> Markdown."""
    peak = content["ceiling"][0] if content["ceiling"] else {"absent": "not measured in this run"}
    if "absent" in peak:
        text = f"The ceiling is absent: {peak['absent']}."
        return {"ceiling": text, "kernels": text}
    return {"ceiling": _ceiling(content, peak), "kernels": "\n".join(_kernels(content, peak))}


def _ceiling(content: dict, peak: dict) -> str:
    place = content["machine"]
    rates = peak["instructions_per_second"]
    clock = peak["clock_GHz_all_cores"] * 1e9 * peak["cores"]
    rows = [
        [name, f"{rates[key] / 1e9:.3g}", f"{rates[key] / clock:.2f}"]
        for name, key in (
            ("multiply-add", "fma"),
            ("addition", "add"),
            ("integer shift", "shift"),
            ("mixed: 6 multiply-adds, 3 additions, 1 shift", "mixed"),
        )
    ]
    return "\n".join(
        [
            f"{place['processor']}, {place['cores']} cores, {peak['instruction_set']}: vectors of "
            f"{peak['lanes_float32']} float32; {peak['clock_GHz']:.2f} GHz on one core, "
            f"{peak['clock_GHz_all_cores']:.2f} GHz on all at once. {content['date']}.",
            "",
            *table(["vector instructions", "10^9 a second, all cores", "a cycle and core"], rows),
        ]
    )


def _kernels(content: dict, peak: dict) -> list[str]:
    groups = {
        group["name"]: {entry["label"]: entry for entry in group["entries"]} for group in content["groups"]
    }
    kind, lanes = peak["instruction_set"], peak["lanes_float32"]
    rate = peak["instructions_per_second"]["mixed"]
    rows = []
    for kernel in KERNELS:
        entries = groups.get(kernel.group.format(n=content["points"]), {})
        if kernel.label not in entries or kind not in kernel.operations:
            continue
        seconds = entries[kernel.label]["seconds"]["median"]
        pairs = seconds * entries[kernel.label]["pairs_per_second"]
        if kernel.minus:
            if kernel.minus not in entries:
                continue
            seconds -= entries[kernel.minus]["seconds"]["median"]
        best = rate * lanes / kernel.operations[kind]
        if seconds > 0:
            rows.append(
                [
                    kernel.name,
                    f"{kernel.operations[kind]:g}",
                    f"{best / 1e9:.3g}",
                    format_time(seconds),
                    f"{pairs / seconds / 1e9:.3g}",
                    f"{pairs / seconds / best:.0%}",
                ]
            )
    head = [
        "kernel",
        "operations a vector of pairs",
        "ceiling, Gpair/s",
        "time",
        "reached, Gpair/s",
        "fraction",
    ]
    return table(head, rows)
