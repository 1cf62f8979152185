"""`nwfast demo`: the chapter, a year of flights and a map."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from .. import backends


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    demo = commands.add_parser(
        "demo",
        help="run the chapter, then a year of flights and a map; write figures and an HTML page",
        description="The chapter on kernel regression, a year of flights, and a map; writes figures and a page.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--n", type=int, default=50, help="training examples")
    demo.add_argument("--seed", type=int, default=0, help="of the data, and of the start of w")
    demo.add_argument("--noise", type=float, default=0.5, help="standard deviation of the noise")
    demo.add_argument("--epochs", type=int, default=5, help="steps of the training")
    demo.add_argument("--lr", type=float, default=0.5, help="learning rate")
    demo.add_argument(
        "--w",
        type=float,
        default=argparse.SUPPRESS,
        help="w at the start of the training (default: uniform on (0, 1))",
    )
    demo.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="to compute in")
    demo.add_argument("--backend", choices=("auto", *backends.NAMES), default="auto", help="where to compute")
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="directory to write to")
    demo.add_argument("--no-flights", dest="flights", action="store_false", help="leave flights and map out")
    demo.add_argument("--quiet", action="store_true", help="show no progress bar")
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run it, and print where its page is."""
    from ..demo.chapter import DemoError, Options
    from ..demo.chapter import run as run_demo

    given = vars(options).copy()
    quiet = given.pop("quiet")
    del given["command"], given["run"]
    given["dtype"] = getattr(torch, given["dtype"])
    try:
        print(run_demo(Options(**given), quiet=quiet))
    except DemoError as error:
        print(f"nwfast demo: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"nwfast demo: error: {error}", file=sys.stderr)
        return 1
    return 0
