"""`nwfast fit`: a model from columns of a file."""

import argparse
import json
import math
import sys
import warnings
from typing import Any

import numpy as np

from ..estimators import CRITERIA, RULES
from . import plot, tables
from .errors import CommandError

_WAYS = (*CRITERIA, *RULES)


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "fit",
        help="fit a curve or surface to columns of a CSV or Parquet file",
        description="Fits y as a function of x by kernel regression, finds the bandwidth, and saves the model.",
        epilog="Example: nwfast fit flights.csv --x hour --y delay --degree 1 -o flights.model --plot flights.png",
    )
    command.add_argument("data", help="file: .csv (also packed, as .csv.gz), .parquet, .pq")
    command.add_argument("--x", action="append", required=True, metavar="COL[,COL]", help="inputs")
    command.add_argument("--y", action="append", required=True, metavar="COL[,COL]", help="outputs")
    command.add_argument(
        "--weights", metavar="COL", help="weights: whole numbers are counts, others precisions"
    )
    command.add_argument(
        "--degree", type=int, choices=(0, 1), default=0, help="0: local means (default); 1: local lines"
    )
    command.add_argument(
        "--bandwidth",
        default="loo",
        metavar="HOW",
        help=f"{', '.join(_WAYS)}, or numbers in the unit of x, one or one for each (default: loo)",
    )
    command.add_argument(
        "--missing",
        choices=("drop", "raise"),
        default="drop",
        help="rows with missing values (default: drop)",
    )
    command.add_argument(
        "--variance",
        choices=("constant", "local"),
        default="constant",
        help="of the noise: the same everywhere (default), or by each row's residual",
    )
    command.add_argument("-o", "--out", required=True, metavar="MODEL", help="file to save the model to")
    command.add_argument("--plot", metavar="FIGURE", help="also draw the fit: .png, .pdf, .svg")
    command.add_argument("--json", action="store_true", help="print what was found as one JSON document")
    command.add_argument("--quiet", action="store_true", help="print nothing, show no progress")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fit, save, and print what was found."""
    for path in filter(None, (options.out, options.plot)):
        tables.check_output(path)
    if options.plot:
        plot.check_format(options.plot)
    bandwidth = _bandwidth(options.bandwidth)
    known = tables.columns_of(options.data)
    x, y = (tables.pick(given, known, options.data) for given in (options.x, options.y))
    weights = [] if options.weights is None else tables.pick([options.weights], known, options.data)
    names = x + y + weights
    for name in names:
        if names.count(name) > 1:
            raise CommandError(f"column {name!r} is given as two of --x, --y and --weights")
    if len(weights) > 1:
        raise CommandError(f"--weights takes one column, got {', '.join(weights)}")
    table = tables.read_numbers(options.data, names)
    _check_missing(table, options)

    model, messages = _fit(table, x, y, weights, bandwidth, options)
    try:
        model.save(options.out)
    except OSError as error:
        raise CommandError(f"cannot write {options.out!r}: {error.strerror}") from error
    if options.plot:
        plot.draw(model, options.plot)
    if options.quiet:
        return 0
    if options.json:
        print(json.dumps({"data": options.data, "model": options.out, **_finite(model.report_)}))
    else:
        print(model.summary())
        messages = [message for message in messages if message != model.report_["note"]]
    for message in messages:
        print(f"nwfast fit: warning: {message}", file=sys.stderr)
    return 0


def _bandwidth(text: str) -> Any:
    """A way to find it, a number or several."""
    if text in _WAYS:
        return text
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(value > 0 and math.isfinite(value) for value in found):
        raise CommandError(f"--bandwidth must be one of {', '.join(_WAYS)}, or numbers above 0, got {text!r}")
    return found[0] if len(found) == 1 else found


def _check_missing(table: Any, options: argparse.Namespace) -> None:
    for name, column in table.items():
        missing = np.isnan(column)
        count = int(missing.sum())
        if count == len(column):
            raise CommandError(f"{options.data}: column {name!r} has no values")
        if count and options.missing == "raise":
            raise CommandError(
                f"{options.data}: column {name!r} has {count:,} missing values, the first in row "
                f"{int(missing.argmax()) + 1:,}; --missing drop leaves such rows out"
            )


def _fit(
    table: Any, x: list[str], y: list[str], weights: list[str], bandwidth: Any, options: argparse.Namespace
) -> tuple[Any, list[str]]:
    """The fitted model, and what it warned of."""
    from ..estimators.model import LocalLines, LocalMeans

    model = (LocalMeans, LocalLines)[options.degree](
        bandwidth,
        missing=options.missing,
        variance=options.variance,
        progress=False if options.quiet else None,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            inputs, outputs = ({name: table[name] for name in names} for names in (x, y))
            model.fit(inputs, outputs, table[weights[0]] if weights else None)
        except ValueError as error:
            raise CommandError(" ".join(str(error).split())) from error
    return model, [str(warning.message) for warning in caught]


def _finite(found: Any) -> Any:
    """What JSON can hold: None for NaN and infinities."""
    if isinstance(found, dict):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
