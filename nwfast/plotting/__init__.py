"""Figures: of a fitted estimator, which take and return Axes, and of the chapter and the demo, which return Figures.

matplotlib is imported where first used, and pyplot never.
"""

from .chapter import airports, bandwidth, flights, heatmap, heatmap_inputs, loss, regression
from .estimator import bandwidth_curve, fit, residuals, slope, surface, weights
from .style import png, thin

__all__ = [
    "airports",
    "bandwidth",
    "bandwidth_curve",
    "fit",
    "flights",
    "heatmap",
    "heatmap_inputs",
    "loss",
    "png",
    "regression",
    "residuals",
    "slope",
    "surface",
    "thin",
    "weights",
]
