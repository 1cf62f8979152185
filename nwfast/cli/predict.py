"""`nwfast predict`: a model's fit at the rows of a file, chunk by chunk."""

import argparse
import sys
from typing import Any

import numpy as np

from . import models, tables
from .errors import CommandError, unknown

_CHUNK = 200_000


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "predict",
        help="append a model's predictions to a file",
        description="Copies a file with the fit of each row in a new column, <y>_fit, and others as asked for. "
        "Rows with a missing input get none.",
        epilog="Example: nwfast predict flights.model new.csv -o out.csv --std --level 0.95",
    )
    command.add_argument("model", help="file that nwfast fit wrote")
    command.add_argument("data", help="file with the model's inputs: .csv (also packed), .parquet, .pq")
    command.add_argument(
        "-o", "--out", required=True, help="file to write, of the same kinds; - is CSV to stdout"
    )
    command.add_argument("--std", action="store_true", help="standard errors of the fit: <y>_std")
    command.add_argument(
        "--slope", action="store_true", help="slopes: <y>_slope, of several inputs <y>_slope_<x>"
    )
    command.add_argument(
        "--level", type=float, help="pointwise confidence intervals of this level: <y>_lower, <y>_upper"
    )
    command.add_argument(
        "--chunk", type=int, default=_CHUNK, metavar="ROWS", help=f"rows at a time (default: {_CHUNK:,})"
    )
    command.add_argument("--quiet", action="store_true", help="show no progress, count no missing rows")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Predict and write."""
    if options.chunk < 1:
        raise CommandError(f"--chunk must be at least 1, got {options.chunk}")
    if options.level is not None and not 0 < options.level < 1:
        raise CommandError(f"--level must be between 0 and 1, got {options.level:g}")
    model = models.load(options.model)
    features = models.features_of(model)
    known = tables.columns_of(options.data)
    for name in features:
        if name not in known:
            raise unknown("column", name, known, options.data)
    for name in new_columns(model, options):
        if name in known:
            raise CommandError(f"{options.data} has a column {name!r} already")
    missing = start = 0
    with tables.Writer(options.out) as writer, _bar(options.quiet) as bar:
        for chunk in tables.chunks(options.data, options.chunk):
            # An index of its own: that of a chunk goes on from the last, that of a batch is the writer's.
            part = chunk if hasattr(chunk, "iloc") else chunk.select(features).to_pandas(ignore_metadata=True)
            columns = tables.numbers(part, features, options.data, start)
            inputs = np.stack(list(columns.values()), 1)
            missing += int(np.isnan(inputs).any(1).sum())
            if part is chunk and writer.kind == "parquet":
                chunk = chunk.assign(**columns)
            writer.write(chunk, added_columns(model, inputs, options))
            start += len(inputs)
            bar.update(len(inputs))
    if missing and not options.quiet:
        print(f"nwfast predict: {missing:,} rows with missing inputs have no prediction", file=sys.stderr)
    return 0


def new_columns(model: Any, options: argparse.Namespace) -> list[str]:
    """The names of the columns that are added, output by output."""
    features = models.features_of(model)
    slopes = [""] if len(features) == 1 else [f"_{name}" for name in features]
    ends = ["fit"] + ["std"] * options.std + ["lower", "upper"] * (options.level is not None)
    ends += [f"slope{name}" for name in slopes] * options.slope
    return [f"{output}_{end}" for output in model.output_names_ for end in ends]


def added_columns(model: Any, inputs: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The columns that are added, for these inputs."""
    rows, outputs = len(inputs), len(model.output_names_)
    names = new_columns(model, options)
    if not rows:
        return {name: np.zeros(0) for name in names}
    found = model.predict(inputs, return_std=options.std, return_slope=options.slope)
    parts = list(found) if options.std or options.slope else [found]
    if options.level is not None:
        parts[1 + options.std : 1 + options.std] = model.confidence_band(inputs, options.level)
    columns = np.concatenate([part.reshape(rows, outputs, -1) for part in parts], axis=2)
    return dict(zip(names, columns.reshape(rows, -1).T, strict=True))


def _bar(quiet: bool) -> Any:
    """A count of rows on a terminal."""
    from tqdm import tqdm

    return tqdm(desc="predict", unit=" rows", unit_scale=True, delay=1.0, leave=False, disable=quiet or None)
