"""Code in processes of its own in which torch alone has been imported: forked from one, since that takes seconds."""

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

SERVER = """
import json, os, sys, tempfile, traceback
import torch
for line in sys.stdin:
    request = json.loads(line)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for place, file in enumerate((open(os.devnull), out, error)):
                    os.dup2(file.fileno(), place)
                os.chdir(request["folder"])
                os.environ.clear()
                os.environ.update(request["environment"])
                sys.path[:] = ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path[1:]]
                exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(bool(end.code))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        error.seek(0)
        print(json.dumps([status, out.read(), error.read()]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=Path(sys.executable).parent,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)
    return server


def run(
    code: str, folder: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """As `python -c code` in a folder; what the interpreter reads of its environment is read already."""
    server = _server()
    request = {"code": code, "folder": str(folder or Path.cwd())}
    request["environment"] = dict(os.environ) if environment is None else environment
    print(json.dumps(request), file=server.stdin, flush=True)
    status, out, error = json.loads(server.stdout.readline())
    return subprocess.CompletedProcess([code], status, out, error)
