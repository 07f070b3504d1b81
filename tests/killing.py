"""Runs commands of uadtool that are killed, stopped or starved at a chosen moment, many of them quickly.

Importing torch takes longer than a small training, so one process imports everything and forks for each command.
"""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional, Tuple

CHANGES = {"open", "os.rename", "os.remove", "os.chmod", "os.mkdir"}
"""Audit events (https://docs.python.org/3/library/audit_events.html) of all changes that a command makes to files."""


class Ended(NamedTuple):
    """``code`` is the exit code, or after a signal its number, negative."""

    code: int
    stdout: str
    stderr: str


class Commands:
    """A context manager: ``run`` forks each command from a process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self._output = folder / "stdout", folder / "stderr"

    def __enter__(self) -> "Commands":
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, *arguments: object, at: Optional[Tuple[Path, int]] = None, after: Optional[float] = None,
            number: int = signal.SIGKILL, limit: Optional[int] = None, stdout: Optional[str] = None) -> Ended:
        """Run a command to its end, or until it gets the signal ``number``.

        Args:
            at: a folder and n: send the signal before the n-th change there.
            after: send the signal after so many seconds.
            limit: the largest size of a file in bytes.
        """
        out, err = self._output
        request = {"arguments": list(map(str, arguments)), "at": at and (str(at[0]), at[1]), "after": after,
                   "number": number, "limit": limit, "stdout": stdout or str(out), "stderr": str(err)}
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Ended(code, "" if stdout else out.read_text(), err.read_text())


def serve() -> None:
    """Answer each request on stdin with the exit code of its command."""
    import onnx  # noqa: F401
    import timm  # noqa: F401

    import uadtool.lab.export
    import uadtool.lab.quantize
    import uadtool.lab.train  # noqa: F401

    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        messages, stderr = os.pipe()  # messages are short, and a pipe is exempt from the limit of files
        process = os.fork()
        if not process:
            become(request, stderr)
        os.close(stderr)
        if request["after"] is not None:
            time.sleep(request["after"])
            os.kill(process, request["number"])
        with open(messages, "rb") as pipe:  # noqa: PTH123
            Path(request["stderr"]).write_bytes(pipe.read())
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def become(request: Any, stderr: int) -> None:
    """Run the command, in the forked process."""
    sys.dont_write_bytecode = True  # without room, Python would leave half a .pyc file
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup ignore it
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(stderr, 2)
    if request["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    if request["at"]:
        signal_at(*request["at"], request["number"])
    from uadtool.cli.main import main

    sys.argv = ["uadtool", *request["arguments"]]
    main()


def signal_at(folder: str, count: int, number: int = signal.SIGKILL) -> None:
    """Send this process a signal before its change number ``count`` in the folder."""
    changes = itertools.count(1)

    def watch(event: str, arguments: Tuple[Any, ...]) -> None:
        concerned = event in CHANGES and any(str(path).startswith(folder) for path in arguments[:2])
        if concerned and next(changes) == count:
            os.kill(os.getpid(), number)

    sys.addaudithook(watch)


if __name__ == "__main__":
    serve()
