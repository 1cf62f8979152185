"""Runs docs/estimator.md and docs/tutorials/table.md, and so draws their figures anew: python docs/figures.py."""

import contextlib
import doctest
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nwfast.cli import main as nwfast

ROOT = Path(__file__).resolve().parents[1]


def run(page: Path) -> tuple[int, int]:
    """Run what stands behind `>>>` and `$ nwfast` on a page, in its order and in this folder: (failed, tried).

    Of what a command prints the words have to be those on the page, not the numbers.
    """
    names: dict = {}
    failed = tried = 0
    parts = re.split(r"^```console\n(.*?)^```\n", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for place, text in enumerate(parts):
        if place % 2 == 0:
            found = doctest.DocTestParser().get_doctest(text, names, page.name, str(page), 0)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            runner.run(found, clear_globs=False)
            names = found.globs
            failed, tried = failed + runner.failures, tried + runner.tries
            continue
        for command, shown in re.findall(r"^\$ nwfast (.*)\n((?:[^$].*\n)*)", text, re.MULTILINE):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                status = nwfast(shlex.split(command))
            words = [re.sub(r"\d+(\.\d+)?", "1", out) for out in (printed.getvalue(), shown)]
            failed, tried = failed + (status != 0 or words[0] != words[1]), tried + 1
    return failed, tried


def main() -> int:
    """Run the pages in docs/figures; 1 where an example fails."""
    os.chdir(ROOT / "docs" / "figures")
    failed, _ = doctest.testfile(str(ROOT / "docs" / "estimator.md"), module_relative=False)
    with tempfile.TemporaryDirectory() as folder:
        data, model = f"{folder}/flights.csv", f"{folder}/flights.model"
        nwfast(["data", "flights", "-o", data])
        given = ["--x", "hour", "--y", "delay", "--degree", "1", "--bandwidth", "0.25"]
        given += ["-o", model, "--plot", "estimator-flights.png", "--quiet"]
        nwfast(["fit", data, *given])
        os.chdir(folder)
        failed += run(ROOT / "docs" / "tutorials" / "table.md")[0]
        shutil.copy("tutorial-band.png", ROOT / "docs" / "figures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
