"""`nwfast info`: what is installed here and what can run."""

import argparse
import importlib.metadata
import os
import platform
import warnings
from typing import Any

import torch

from .. import __version__, backends
from ..backends import extension


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser("info", help="versions, what can run here and what cannot, and why")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print it."""
    print(info())
    return 0


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
