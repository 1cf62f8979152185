"""Colours, empty figures and what else all figures share. matplotlib is imported where first used.

Figures are drawn to memory without a display, outside of pyplot's registry.
"""

import io
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUTH, PREDICTION, DATA = "#1f6fb4", "#c2255c", "#e8890c"
LAND = ("#2e7d4f", "#a5cd8b", "#f6efbf", "#dcab6a", "#a3653c", "#54301f")
SCALE = ("#fdebc8", "#f5b95c", "#e8890c", "#c2255c", "#5d1a52")  # from low to high, white left for no value
MOST_POINTS = 2000


def thin(n: int, most: int) -> Tensor:
    """Indices of at most `most` of n points, evenly spread over their order, both ends included.

    Examples
    --------
    >>> thin(9, 3)
    tensor([0, 4, 8])
    """
    return (
        torch.arange(n) if n <= most else torch.linspace(0, n - 1, most, dtype=torch.float64).round().long()
    )


def png(figure: "Figure") -> bytes:
    """The figure as the bytes of a PNG file, without a date in it: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def new_figure(width: float, height: float, title: str, columns: int = 1) -> "tuple[Figure, Axes]":
    """An empty figure with axes side by side, and the first of them, which gets the title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    for column in range(columns):
        axes = figure.add_subplot(1, columns, column + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.axes[0].set_title(title, fontsize=11)
    return figure, figure.axes[0]


def legend(axes: Any, where: str, **options: Any) -> None:
    """The legend, without a frame, in colours that can be seen."""
    drawn = axes.legend(loc=where, framealpha=0.85, edgecolor="none", **options)
    for handle in drawn.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_alpha(0.9)  # a faint point among thousands would not be seen alone


def sample(n: int) -> Tensor:
    """As `thin`, but at random: even steps through sorted data hide how dense they are."""
    if n <= MOST_POINTS:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:MOST_POINTS]


def array(tensor: Tensor) -> Any:
    """As NumPy's float64."""
    return tensor.detach().cpu().double().numpy()


def points(x: Tensor, y: Tensor) -> tuple[Any, Any]:
    """Both as arrays."""
    return array(x), array(y)
