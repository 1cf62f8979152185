"""A result file as Markdown: the README's section and docs/benchmarks.md."""

import textwrap
from collections.abc import Iterable, Iterator

SEVERAL = "two and three features"
OWN = ("native", "numba", "native fgt", "numba fgt")
QUESTIONS = {
    "dense forward": "How fast is the forward pass over all pairs?",
    "training step": "What does the op's part of a training step cost: forward, and backward to w?",
    "key-side gradients": "What do all gradients cost, with the second pass that keys and values need?",
    "small n": "What does the op cost beside its arithmetic, at the chapter's n = 50?",
    "scaling in N": "How does the time grow with N? Sorted data, w = 3 unless said.",
    SEVERAL: "How fast are two and three features in linear time? Unordered points, uniform and in narrow clusters.",
    "bandwidth selection": "How long does one full bandwidth selection by leave-one-out take?",
}
# Two OpenMP threads on two cores wait a whole time slice at each barrier once a third thread runs: the textbook at
# n = 50 then takes 16 ms in place of 30 us. So a little is too much.
MOST_USED_ELSEWHERE = 0.15


def busy(cores: dict[str, float | None]) -> list[str]:
    """The groups during which other processes used more of the machine than a comparison bears.

    >>> busy({"forward": 0.02, "gradients": 0.9, "memory": None})
    ['gradients']
    """
    return [name for name, used in cores.items() if used is not None and used > MOST_USED_ELSEWHERE]


def format_time(seconds: float) -> str:
    """Three digits and a unit.

    >>> format_time(0.00623)
    '6.23 ms'
    """
    for factor, unit in (1, "s"), (1e3, "ms"):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def format_times(ratio: float) -> str:
    """How many times faster: three digits, without an exponent.

    >>> format_times(1234.5), format_times(2.345)
    ('1230', '2.35')
    """
    return f"{ratio:.3g}" if ratio < 1000 else f"{float(f'{ratio:.3g}'):.0f}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table."""
    head = list(head)
    return [
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def setting(content: dict) -> str:
    """Where and on what it was measured."""
    place, commit = content["machine"], content["commit"]
    versions = place["versions"]
    device = "" if place["device"] == "cpu" else f"{place['device']}, "
    return (
        f"{device}{place['processor']}, {place['cores']} cores, {place['instruction_set']}, torch {versions['torch']}, "
        f"numba {versions['numba']}, Python {versions['python']}; commit {commit['commit'][:10]}"
        f"{' with changes' if commit['dirty'] else ''}, {content['date']}"
    )


def readme(content: dict) -> str:
    """The README's section, with all numbers taken from `content`."""
    note = (
        f"Medians, float32, {setting(content)}; each result is checked against float64 before it is timed. "
        "[docs/benchmarks.md](docs/benchmarks.md) has all peers, sizes, memory, errors and the bars that are missed, "
        "[docs/performance.md](docs/performance.md) what the machine allows."
    )
    return "\n".join(
        [
            *table(
                ["", "nwfast", "the two lines", "the same, compiled", "fastest other"], _chosen_rows(content)
            ),
            "",
            "![Time against N](docs/figures/time-against-n.svg)",
            "",
            *textwrap.wrap(note, 120, break_on_hyphens=False),
        ]
    )


def _chosen_rows(content: dict) -> Iterator[list[str]]:
    """One row for each of a training step's two passes, a small call, and a million points."""
    chosen = {
        "dense forward": lambda group: True,
        "training step": lambda group: True,
        "small n": lambda group: "backward" in group["name"],
        "scaling in N": lambda group: group["n"] == 1_000_000,
    }
    for question, wanted in chosen.items():
        groups = (group for group in content["groups"] if group["question"] == question and wanted(group))
        group = next(groups, None)
        if group is None:
            continue
        found = _entries(group)
        own = [label for label in ("native", "native fgt") if label in found]
        best = min(own, key=lambda label: found[label]["seconds"]["median"], default="")
        times = (_time(found, label) for label in (best, "textbook", "torch.compile"))
        yield [group["name"], *times, _best_other(found)]


def _summary(content: dict) -> list[str]:
    """The first section of docs/benchmarks.md: a row for each group, and the bars."""
    missed = [bar["what"] for bar in content["bars"] if not bar["passed"]]
    introduction = (
        f"N = M = {content['points']} unless said; data is unsorted and w = 1 unless said, so that no pair can be "
        "skipped. Textbook: the two lines; torch.compile: the same two lines, compiled; best other: the fastest of the "
        "other peers at this."
    )
    return [
        "## Summary",
        "",
        *textwrap.wrap(introduction, 120),
        "",
        *table(
            ["time", "native", "numba", "torch.compile", "textbook", "best other", "native, Gpair/s"],
            _summary_rows(content),
        ),
        "",
        *table(["", "measured", "quartiles", "bar"], map(_bar, content["bars"])),
        "",
        *textwrap.wrap(f"Missed: {'; '.join(missed)}." if missed else "All bars are met.", 120),
        "",
    ]


_NAMED = ("native", "numba", "torch.compile", "textbook")


def _summary_rows(content: dict) -> Iterator[list[str]]:
    order = list(QUESTIONS)
    for group in sorted(content["groups"], key=lambda group: order.index(group["question"])):
        found = _entries(group)
        linear = "native fgt" in found
        several = group["question"] == SEVERAL
        if group["question"] == "scaling in N" and not (linear and group["n"] >= 100_000):
            continue
        clustered = "clusters" in group["name"]
        if not found or (several and group["n"] < (100_000 if clustered else 50_000)):
            continue
        own = "native fgt" if linear and (several or "native" not in found) else "native"
        cells = [_time(found, own), _time(found, "numba fgt" if own != "native" else "numba")]
        cells += [_time(found, name) for name in _NAMED[2:]]
        cells.append(_best_other(found))
        rate = found[own]["pairs_per_second"] if own in found else 0
        yield [
            group["name"] + (", linear time" if own != "native" else ""),
            *cells,
            f"{rate / 1e9:.3g}" if rate else "",
        ]
    for call in content.get("first call", []):
        rate = call["n"] ** 2 / call["seconds"] / 1e9
        yield [
            f"forward, N = M = {call['n']}, first call",
            format_time(call["seconds"]),
            *[""] * 4,
            f"{rate:.3g}",
        ]


def _entries(group: dict) -> dict[str, dict]:
    """By label, what a group compares."""
    return {entry["label"]: entry for entry in group["entries"] if entry["work"] == group["name"]}


def _best_other(found: dict[str, dict]) -> str:
    others = [entry for label, entry in found.items() if label not in (*OWN, *_NAMED)]
    best = min(others, key=lambda entry: entry["seconds"]["median"], default=None)
    return f"{format_time(best['seconds']['median'])}, {best['label']}" if best else ""


def _time(found: dict[str, dict], label: str) -> str:
    return format_time(found[label]["seconds"]["median"]) if label in found else ""


def _bar(bar: dict) -> list[str]:
    quartiles = ""
    if bar["first_quartile"] != bar["third_quartile"]:
        quartiles = f"{bar['first_quartile']:.3g} to {bar['third_quartile']:.3g}"
    sense = "at least" if bar["at_least"] else "at most"
    missed = "" if bar["passed"] else ", **missed**"
    return [
        bar["what"],
        f"{bar['measured']:.3g} {bar['unit']}",
        quartiles,
        f"{sense} {bar['limit']:g}{missed}",
    ]


def page(content: dict, about: dict[str, dict]) -> str:
    """docs/benchmarks.md. about: what each peer is, from the adapters."""
    introduction = (
        "Each peer is used as its own documentation advises, and its result is checked against the two textbook lines "
        "in float64 before it is timed: `error` is the largest difference to them, relative to the largest entry. The "
        "peers of a table take turns in one process, with as many threads as there are cores; what is shown are "
        "medians, with the quartiles of the rounds. Gpair/s counts all pairs of a query and a key, visited or not. "
        f"Queries and keys are uniform on (0, 5) unless said. {setting(content)}."
    )
    lines = [
        "# Benchmarks",
        "",
        "<!-- Written by `make report` from benchmarks/results/: edits are lost. -->",
        "",
        *textwrap.wrap(introduction, 120),
        "",
        "![How many times faster](figures/speed-up.svg)",
        "",
        *_summary(content),
    ]
    for question, title in QUESTIONS.items():
        groups = [group for group in content["groups"] if group["question"] == question]
        if not groups:
            continue
        lines += [f"## {question[0].upper()}{question[1:]}", "", title, ""]
        if question == "scaling in N":
            lines += ["![Time against N](figures/time-against-n.svg)", ""]
        for group in groups:
            lines += _group(group)
        if question == SEVERAL:
            lines += [*_bandwidths(content), *_once(content)]
    lines += _memory(content) + _distance(content) + _budget(content) + _peers(content, about)
    return "\n".join(lines) + "\n"


def _group(group: dict) -> list[str]:
    own = [label for label in OWN if any(ratio["own"] == label for ratio in group["ratios"])]
    times = {(ratio["own"], ratio["peer"]): ratio for ratio in group["ratios"]}
    rows = []
    for entry in sorted(group["entries"], key=lambda entry: entry["seconds"]["median"]):
        seconds = entry["seconds"]
        quartiles = f"{format_time(seconds['first_quartile'])} to {format_time(seconds['third_quartile'])}"
        rate = f"{entry['pairs_per_second'] / 1e9:.3g}" if entry["pairs_per_second"] else ""
        factors = [
            format_times(times[label, entry["label"]]["measured"]) if (label, entry["label"]) in times else ""
            for label in own
        ]
        row = [entry["label"], format_time(seconds["median"]), quartiles, f"{entry['rounds']}", rate]
        rows.append([*row, f"{entry['error']:.1e}", *factors])
    head = [
        "",
        "median",
        "quartiles",
        "rounds",
        "Gpair/s",
        "error",
        *(f"{label} is faster, times" for label in own),
    ]
    lines = [f"### {group['name']}", "", *table(head, rows), ""]
    reasons: dict[str, list[str]] = {}
    for label, reason in group["missing"].items():
        reasons.setdefault(reason, []).append(label)
    for reason, labels in reasons.items():
        lines += [*textwrap.wrap(f"Without {', '.join(labels)}: {reason}.", 120), ""]
    return lines


def _bandwidths(content: dict) -> list[str]:
    """The time at each bandwidth, a column each kind of data, the slowest in bold."""
    kinds: dict[str, dict[float, float]] = {}
    for own in content.get("bandwidths", []):
        kind = f"D = {own['features']}, N = M = {own['n']}, {own['where']}"
        kinds.setdefault(kind, {})[own["w"]] = own["seconds"]["median"]
    if not kinds:
        return []

    def cell(times: dict[float, float], w: float) -> str:
        if w not in times:
            return ""
        return f"**{format_time(times[w])}**" if times[w] == max(times.values()) else format_time(times[w])

    every_w = sorted({w for times in kinds.values() for w in times})
    error = max(own["error"] for own in content["bandwidths"])
    return [
        "### All bandwidths, native fgt, forward",
        "",
        f"The slowest of each column is bold: steps in w were halved on both sides of it. Largest error: {error:.1e}.",
        "",
        *table(["w", *kinds], [[f"{w:g}", *(cell(times, w) for times in kinds.values())] for w in every_w]),
        "",
    ]


def _once(content: dict) -> Iterator[str]:
    """Sentences on what is measured once."""
    said = [
        f"Dense kernel, D = {own['features']}, no pair skipped: {own['pairs_per_second'] / 1e9:.3g} Gpair/s."
        for own in content.get("dense rate", [])
    ]
    said += [
        f"Forward, D = {own['features']}, N = M = {own['n']}: takes {own['added_MB']:.3g} MB beyond its inputs."
        for own in content.get("memory of several", [])
    ]
    said += [
        f'`method="auto"` takes at most {own["ratio"]:.3g} times the faster method, D = {own["features"]}, in '
        f"{own['cases']} cases; that is at N = M = {own['keys']}, w = {own['w']:g}."
        for own in content.get("choice", [])
    ]
    said += [
        f"Dense, D = {own['features']}, {own['clusters']} clusters, N = M = {own['n']}, w = {own['w']:.3g}, on one "
        f"thread: {format_time(own['never'])} without skipping what cannot matter, {format_time(own['auto'])} with it."
        for own in content.get("skipping", [])
    ]
    for sentence in said:
        yield from (*textwrap.wrap(sentence, 120), "")


def _memory(content: dict) -> list[str]:
    records = content["memory"]
    if not records:
        return []
    columns = sorted({(own["wanted"], own["n"]) for own in records})
    found = {(own["peer"], own["wanted"], own["n"]): own["added_MB"] for own in records}
    names = list(dict.fromkeys(own["peer"] for own in records))
    rows = [
        [
            name,
            *(f"{found[(name, *key)]:.3g}" if (name, *key) in found else "" for key in columns),
        ]
        for name in names
    ]
    head = ["MB", *(f"{'to w, ' if wanted else ''}N = M = {n}" for wanted, n in columns)]
    return [
        "## Memory",
        "",
        "The most that a call adds to the memory of its process, beyond its inputs: the second call of a fresh one.",
        '"to w": forward and backward to w. Empty: not run there, as it would take too long or too much.',
        "",
        "![Memory against N](figures/memory-against-n.svg)",
        "",
        *table(head, rows),
        "",
    ]


def _distance(content: dict) -> list[str]:
    records = content["distance"]
    if not records:
        return []
    bandwidths = records[0]["bandwidths"]
    shown = [
        min(range(len(bandwidths)), key=lambda i: abs(bandwidths[i] - wanted))
        for wanted in (0.1, 3, 10, 100, 1000)
    ]
    rows = [
        [
            own["peer"],
            own["precision"],
            *("no number" if own["error"][i] is None else f"{own['error'][i]:.1e}" for i in shown),
        ]
        for own in records
    ]
    head = ["", "precision", *(f"{bandwidths[i]:g} h" for i in shown)]
    return [
        "## Accuracy away from the data",
        "",
        "Error relative to the largest value, at queries so many bandwidths h beyond the last of 1000 keys; w = 10.",
        "",
        "![Error against distance](figures/error-against-distance.svg)",
        "",
        *table(head, rows),
        "",
    ]


def _budget(content: dict) -> list[str]:
    worst: dict[tuple[str, str, str], dict] = {}
    for own in content["accuracy"]:
        key = own["peer"], own["dtype"], own["quantity"]
        if key not in worst or own["share"] > worst[key]["share"]:
            worst[key] = own
    if not worst:
        return []
    rows = [
        [*key, own["case"], f"{own['error']:.1e}", f"{own['textbook_error']:.1e}", f"{own['limit']:.1e}"]
        for key, own in worst.items()
    ]
    return [
        "## Accuracy on hard data",
        "",
        "Of nine data sets (uniform, wide and narrow bandwidths, clusters and gaps, far queries, a large offset,",
        "duplicates, D = 2, D = 3 with C = 4) the one that comes nearest to what is allowed, against the formulas in",
        "long double.",
        "",
        *table(["", "dtype", "quantity", "data", "largest error", "textbook's", "allowed"], rows),
        "",
    ]


def _peers(content: dict, about: dict[str, dict]) -> list[str]:
    versions = content["machine"]["versions"]
    rows = []
    for name, own in about.items():
        version = (
            f"{own['package']} {versions.get(own['package'], '')}".strip() if own["package"] else "nwfast"
        )
        state = (
            f"absent: {content['absent'][name]}" if name in content["absent"] else f"to {own['tolerance']:g}"
        )
        rows.append([name, own["about"], own["precision"], version, state])
    return ["## The peers", "", *table(["", "how it is used", "precision", "version", "agrees"], rows)]
