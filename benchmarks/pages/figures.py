"""The figures of docs/benchmarks.md, as SVG: time and memory against N, error against distance, speed-up bars."""

from pathlib import Path

OWN = ("native", "numba", "native fgt", "numba fgt")
# Okabe and Ito's colours, told apart by the colour-blind; ours are thick, and each peer has a marker of its own.
STYLES = {
    "native": ("#0072B2", "o"),
    "native fgt": ("#D55E00", "o"),
    "numba": ("#56B4E9", "s"),
    "numba fgt": ("#E69F00", "s"),
    "textbook": ("#000000", "^"),
    "chunked textbook": ("#777777", "v"),
    "torch.compile": ("#009E73", "D"),
    "sdpa": ("#CC79A7", "P"),
    "FlexAttention": ("#8A5A83", "X"),
    "KeOps": ("#A08A00", "h"),
    "JAX": ("#3B6E22", "<"),
    "kerneljax": ("#6FA85B", ">"),
    "FINUFFT ratio": ("#9C3A1F", "*"),
    "KDEpy binned": ("#B0A48F", "p"),
    "KernelDensity": ("#D18B47", "1"),
    "RadiusNeighbors": ("#7A4FBF", "2"),
    "kernelsmooth": ("#5B5B9E", "d"),
    "statsmodels": ("#9E9E5B", "8"),
    "hessband": ("#5B9E9E", "H"),
    "np.sort": ("#AAAAAA", "|"),
}
_PARAMETERS = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "nwfast",  # the same file from the same numbers
}


def draw(content: dict, folder: Path) -> list[Path]:
    """Draw what there are numbers for; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    with matplotlib.rc_context(_PARAMETERS):
        for name, draw_one in _FIGURES.items():
            figure = draw_one(content)
            if figure is None:
                continue
            path = folder / f"{name}.svg"
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
            path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
            paths.append(path)
    return paths


def _figure(width: float = 8.5, height: float = 5.2):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _line(axes, name: str, x: list[float], y: list[float], label: str = "") -> None:
    colour, marker = STYLES.get(name, ("#444444", "."))
    own = name in OWN
    axes.plot(
        x,
        y,
        marker=marker,
        color=colour,
        label=label or name,
        linewidth=2.6 if own else 1.2,
        markersize=7 if own else 6,
        linestyle="-" if own else "--" if name == "np.sort" else "-",
        zorder=3 if own else 2,
    )


def _legend_outside(axes, title: str | None = None) -> None:
    """In the order in which the lines end, from above."""
    handles, labels = axes.get_legend_handles_labels()
    ends = [handle.get_ydata()[-1] for handle in handles]
    order = sorted(range(len(handles)), key=lambda i: -ends[i] if ends[i] == ends[i] else 0)
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        title=title,
    )


def _place(content: dict) -> str:
    place = content["machine"]
    return f"{place['processor']}, {place['cores']} cores, {place['instruction_set']}"


def time_against_n(content: dict):
    """Log-log, a panel for each number of features: all peers at one bandwidth."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for group in content["groups"]:
        for title, (question, ending) in _AGAINST_N.items():
            if group["question"] == question and group["name"].endswith(ending):
                for entry in group["entries"]:
                    lines = panels.setdefault(title, {}).setdefault(entry["label"], [])
                    lines.append((group["n"], entry["seconds"]["median"]))
    if not panels:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 4.2 * len(panels), 5.2), layout="constrained")
    names: dict[str, object] = {}
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for name, points in lines.items():
            _line(axes, name, *map(list, zip(*sorted(points), strict=True)))
        axes.set(xscale="log", yscale="log", xlabel="N = M")
        axes.set_title(title, fontsize=10, loc="left")
        handles, labels = axes.get_legend_handles_labels()
        names.update(
            {label: handle for label, handle in zip(labels, handles, strict=True) if label not in names}
        )
    figure.axes[0].set_ylabel("seconds, forward pass")
    figure.suptitle(f"Time against N; {_place(content)}", fontsize=10)
    order = [name for name in STYLES if name in names] + [name for name in names if name not in STYLES]
    figure.legend([names[name] for name in order], order, loc="outside right center", frameon=False)
    return figure


# Title: the question, and how the names of its groups end.
_AGAINST_N = {
    "one feature, sorted, w = 3": ("scaling in N", "one channel, w = 3"),
    "D = 2, unordered, w = 50": ("two and three features", "unit square, w = 50"),
    "D = 3, unordered, w = 30": ("two and three features", "unit cube, w = 30"),
}


def memory_against_n(content: dict):
    """Log-log, forward passes."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for own in content["memory"]:
        if not own["wanted"]:
            lines.setdefault(own["peer"], []).append((own["n"], max(own["added_MB"], FLOOR_MB)))
    if not lines:
        return None
    figure, axes = _figure()
    for name, points in lines.items():
        _line(axes, name, *map(list, zip(*sorted(points), strict=True)))
    axes.axhline(FLOOR_MB, color="#888888", linewidth=0.8)
    axes.annotate(
        "not measurable", (0.01, FLOOR_MB), xycoords=("axes fraction", "data"), va="bottom", color="#666666"
    )
    axes.set(xscale="log", yscale="log", xlabel="N = M", ylabel="MB beyond the inputs, forward pass")
    axes.set_title(f"Memory against N: one feature; {_place(content)}", fontsize=10, loc="left")
    _legend_outside(axes)
    return figure


FLOOR_MB = 0.1


def error_against_distance(content: dict):
    """Log-log; a line ends where a peer no longer returns a number."""
    if not content["distance"]:
        return None
    figure, axes = _figure()
    for own in content["distance"]:
        points = [
            (x, max(y, 1e-17)) for x, y in zip(own["bandwidths"], own["error"], strict=True) if y is not None
        ]
        name = own["peer"]
        precision = ", float64" if own["precision"] == "float64" else ""
        stopped = f", none beyond {points[-1][0]:g}" if len(points) < len(own["error"]) else ""
        colour, marker = STYLES.get(name, ("#444444", "."))
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            markevery=4,
            linewidth=2.6 if name in OWN else 1.2,
            label=name + precision + stopped,
            zorder=3 if name in OWN else 2,
        )
    axes.set(xscale="log", yscale="log", ylim=(1e-17, 10))
    axes.set(
        xlabel="distance of the query beyond the last key, in bandwidths", ylabel="error / largest value"
    )
    axes.set_title("Error against distance from the data: 1000 keys, w = 10", fontsize=10, loc="left")
    _legend_outside(axes)
    return figure


SHOWN = ("dense forward", "training step", "key-side gradients", "small n", "bandwidth selection")


def speed_up(content: dict):
    """How many times faster the native kernels are, a panel a question."""
    panels = []
    groups = [group for group in content["groups"] if group["question"] in SHOWN]
    for group in sorted(groups, key=lambda group: SHOWN.index(group["question"])):
        best = "native fgt" if not any(own["own"] == "native" for own in group["ratios"]) else "native"
        ratios = [own for own in group["ratios"] if own["own"] == best]
        if ratios:
            panels.append((group, best, sorted(ratios, key=lambda own: own["measured"])))
    if not panels:
        return None
    from matplotlib.figure import Figure

    heights = [len(ratios) + 1.6 for _, _, ratios in panels]
    left, right = _columns(heights)
    figure = Figure(
        figsize=(12, 0.27 * max(sum(heights[i] for i in side) for side in (left, right))),
        layout="constrained",
    )
    limits = (
        min(0.5, 0.6 * min(ratios[0]["measured"] for _, _, ratios in panels)),
        6 * max(ratios[-1]["measured"] for _, _, ratios in panels),
    )
    for subfigure, side in zip(figure.subfigures(1, 2), (left, right), strict=True):
        if not side:
            continue
        stack = subfigure.subplots(len(side), 1, squeeze=False, height_ratios=[heights[i] for i in side])[
            :, 0
        ]
        for axes, i in zip(stack, side, strict=True):
            _bars(axes, *panels[i], limits)
        stack[-1].set_xlabel("times faster")
    return figure


def _columns(heights: list[float]) -> tuple[list[int], list[int]]:
    """The panels, in order, split where both columns are about as long."""
    total, cut = sum(heights), 0
    while cut < len(heights) and sum(heights[: cut + 1]) <= total / 2 + heights[cut] / 2:
        cut += 1
    return list(range(cut)), list(range(cut, len(heights)))


def _bars(axes, group: dict, own: str, ratios: list[dict], limits: tuple[float, float]) -> None:
    names, measured = [own["peer"] for own in ratios], [own["measured"] for own in ratios]
    spread = [
        [max(0.0, own["measured"] - own["first_quartile"]) for own in ratios],
        [max(0.0, own["third_quartile"] - own["measured"]) for own in ratios],
    ]
    colours = [STYLES.get(name, ("#444444", "."))[0] for name in names]
    axes.barh(names, measured, xerr=spread, color=colours, ecolor="#333333", height=0.72)
    for position, value in enumerate(measured):
        axes.annotate(
            f"{value:.3g}" if value < 1000 else f"{float(f'{value:.3g}'):.0f}",
            (max(value, ratios[position]["third_quartile"]), position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlim=limits)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"{group['name']}: {own} against", fontsize=10, loc="left")


_FIGURES = {
    "time-against-n": time_against_n,
    "speed-up": speed_up,
    "memory-against-n": memory_against_n,
    "error-against-distance": error_against_distance,
}
