"""What an estimator reports of its fit: plain numbers and strings, and lines of text."""

import math
from typing import Any

import torch

from .criteria import value_of
from .search import data_bounds


def report_of(model: Any) -> dict[str, Any]:
    """All that was found."""
    sites, state = model._state.sites, model._state
    loo = model.loss_
    if isinstance(model.bandwidth, str) and model.bandwidth in ("gcv", "aicc"):
        loo = value_of("loo", sites, state.w, model._degree) if len(sites.x) > 1 else math.nan
    variance = state.variance() if model.n_observations_ > 1 else torch.full((1, 1), math.nan)
    selection = model.selection_
    lower, upper = data_bounds(sites) if selection is None else (selection.lower, selection.upper)
    return {
        "estimator": model._kind,
        "degree": model._degree,
        "n_observations": model.n_observations_,
        "n_dropped": model.n_dropped_,
        "features": model._feature_names(),
        "outputs": list(model.output_names_),
        "bandwidth": [float(value) for value in model.bandwidth_],
        "bandwidth_from": model.bandwidth if isinstance(model.bandwidth, str) else "given",
        "loss": model.loss_,
        "loo": loo,
        "effective_dof": model.effective_dof_,
        "r2": model.r2_,
        "residual_std": [float(value) for value in variance.mean(0).sqrt()],
        "search_lower": [float(value) for value in lower],
        "search_upper": [float(value) for value in upper],
        "at_bound": [None] * len(lower) if selection is None else list(selection.at_bound),
        "note": "" if selection is None else selection.note,
        "evaluations": 0 if selection is None else selection.evaluations,
    }


def summary_of(kind: str, report: dict[str, Any]) -> str:
    """What was found, in lines of text."""
    lines = [
        kind,
        f"observations          {report['n_observations']:,}"
        + (f" ({report['n_dropped']:,} rows with missing values dropped)" if report["n_dropped"] else ""),
        f"degree                {report['degree']}",
        f"bandwidth             {report['bandwidth_from']}",
    ]
    for name, value in zip(report["features"], report["bandwidth"], strict=True):
        lines.append(f"  {name:<20}{value:.6g}")
    lines += [
        f"leave-one-out error   {math.sqrt(max(report['loo'], 0.0)):.6g} (root of the mean square, unit of y)",
        f"effective parameters  {report['effective_dof']:.4g}",
        f"R squared             {report['r2']:.4f}",
        f"residual deviation    {', '.join(f'{value:.6g}' for value in report['residual_std'])}",
    ]
    if report["note"]:
        lines.append(f"note                  {report['note']}")
    return "\n".join(lines)
