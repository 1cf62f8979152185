"""`nwfast plot`: figures of a model."""

import argparse
from pathlib import Path
from typing import Any

from . import models, tables
from .errors import CommandError, unknown

_FORMATS = (".png", ".pdf", ".svg")
_KINDS = ("fit", "bandwidth", "slope", "surface", "residuals")


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "plot",
        help="draw a model",
        description="Draws a model: its fit with band and data, the criterion over the bandwidth, the slope with "
        "band, the surface over two inputs, or the residuals.",
        epilog="Example: nwfast plot flights.model -o slope.png --kind slope",
    )
    command.add_argument("model", help="file that nwfast fit wrote")
    command.add_argument(
        "-o", "--out", required=True, metavar="FIGURE", help="file to write: .png, .pdf, .svg"
    )
    command.add_argument("--kind", choices=_KINDS, default="fit", help="what to draw (default: fit)")
    command.add_argument(
        "--feature",
        action="append",
        metavar="COL",
        help="the input of the axis (default: the first), two for a surface: --feature COL,COL",
    )
    command.add_argument("--output", metavar="COL", help="which output (default: the first)")
    command.add_argument(
        "--level", type=float, default=0.95, help="of bands, which are pointwise; 0 for none (default: 0.95)"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Draw."""
    if not 0 <= options.level < 1:
        raise CommandError(f"--level must be between 0 and 1, got {options.level:g}")
    check_format(options.out)
    tables.check_output(options.out)
    model = models.load(options.model)
    known = models.features_of(model)
    features = tables.pick(options.feature or [], known, options.model, "feature")
    if options.output is not None and options.output not in model.output_names_:
        raise unknown("output", options.output, model.output_names_, options.model)
    wanted = 2 if options.kind == "surface" else 1
    if len(known) < wanted:
        raise CommandError(f"a surface needs two inputs, and {options.model} has one, {known[0]}")
    if features and len(features) != wanted:
        raise CommandError(f"--kind {options.kind} takes {wanted} of --feature, got {len(features)}")
    draw(model, options.out, options.kind, features or known[:wanted], options.output, options.level)
    return 0


def draw(
    model: Any,
    path: str,
    kind: str = "fit",
    features: list[str] | None = None,
    output: str | None = None,
    level: float = 0.95,
) -> None:
    """Draw a model to a file."""
    from .. import plotting

    features = features or models.features_of(model)[:1]
    which: Any = 0 if output is None else output
    ax: Any
    if kind == "bandwidth":
        ax = plotting.bandwidth_curve(model)
    elif kind == "surface":
        ax = plotting.surface(model, features=(features[0], features[1]), output=which)
    elif kind == "residuals":
        ax = plotting.residuals(model, output=which)
    else:
        function = {"fit": plotting.fit, "slope": plotting.slope}[kind]
        ax = function(model, feature=features[0], output=which, level=level or None)
    try:
        ax.figure.savefig(path, dpi=150)
    except OSError as error:
        raise CommandError(f"cannot write {path!r}: {error.strerror}") from error


def check_format(path: str) -> None:
    """Refuse a figure of a kind that is not drawn."""
    if Path(path).suffix.lower() not in _FORMATS:
        raise CommandError(f"{path!r} ends in none of {', '.join(_FORMATS)}")
