"""Draws the figures of docs/estimator.md anew, by running the page and its command line: python docs/figures.py."""

import doctest
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nwfast.cli import main as nwfast

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the page in docs/figures; 1 where an example fails."""
    os.chdir(ROOT / "docs" / "figures")
    failed, _ = doctest.testfile(str(ROOT / "docs" / "estimator.md"), module_relative=False)
    with tempfile.TemporaryDirectory() as folder:
        data, model = f"{folder}/flights.csv", f"{folder}/flights.model"
        nwfast(["data", "flights", "-o", data])
        given = ["--x", "hour", "--y", "delay", "--degree", "1", "--bandwidth", "0.25"]
        given += ["-o", model, "--plot", "estimator-flights.png", "--quiet"]
        nwfast(["fit", data, *given])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
