"""The command line: `python -m nwfast demo` and `python -m nwfast info`, also as the console script `nwfast`."""

import argparse
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__, backends
from .backends import extension


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 where a package is missing, 2 for bad arguments.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without: those of the process.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    return _demo(options)


def info() -> str:
    """Versions, which backends can run here and why the others cannot, threads and instruction set."""
    lines = [("nwfast", __version__), ("Python", f"{platform.python_version()} ({platform.platform()})")]
    lines += [(name, _version(name)) for name in ("torch", "numba", "triton", "numpy")]
    lines.append(("package", str(extension.PACKAGE)))
    for name, answer in backends.available().items():
        lines.append((f"backend {name}", "available" if answer is True else f"not available: {answer}"))
    if extension.origin() not in (None, extension.PACKAGE):
        lines.append(("C++ extension", f"of {extension.origin()}, built from the sources beside the package"))
    with warnings.catch_warnings():  # what it would say stands above
        warnings.simplefilter("ignore")
        lines.append(("used on the CPU", backends.resolve("auto", torch.device("cpu"))))
    if torch.cuda.is_available():
        lines.append(("used on the GPU", backends.resolve("auto", torch.device("cuda"))))
        lines.append(("GPU", torch.cuda.get_device_name()))
    else:
        lines.append(("GPU", "none that torch can use"))
    lines.append(("threads", f"{torch.get_num_threads()} (of {os.cpu_count()} processors)"))
    lines.append(("instruction set", _instruction_set()))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines)


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _instruction_set() -> str:
    if backends.available()["native"] is True:
        return extension.instruction_set()
    return f"{torch.backends.cpu.get_cpu_capability()} (what torch uses; the C++ extension is not available)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nwfast",
        description="Nadaraya-Watson kernel regression: attention pooling with a Gaussian kernel.",
    )
    parser.add_argument("--version", action="version", version=f"nwfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, what can run here and what cannot, and why")
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
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from .demo.chapter import DemoError, Options, run

    given = vars(arguments).copy()
    quiet = given.pop("quiet")
    del given["command"]
    given["dtype"] = getattr(torch, given["dtype"])
    try:
        print(run(Options(**given), quiet=quiet))
    except DemoError as error:
        print(f"nwfast demo: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"nwfast demo: error: {error}", file=sys.stderr)
        return 1
    return 0
