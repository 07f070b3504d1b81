"""A process that has imported torch and runs commands in copies of itself: the import takes seconds.

    python preloaded.py SOCKET            # the server; it ends with its stdin
    python preloaded.py SOCKET COMMAND... # the client: a command line of uadtool with this process's folder,
                                          # environment and streams; it ends as the command does
"""

import contextlib
import io
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Dict, List


def run_client(address: str, words: List[str]) -> int:
    """Run a command in the server at ``address``; returns its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"x"], [0, 1, 2])
        connection.sendall(json.dumps([words, str(Path.cwd()), dict(os.environ)]).encode())
        connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(16) or 1)


def serve(address: str) -> None:
    """Run the commands of clients until stdin ends."""
    import torch

    from tests.fast_exports import keep_registry
    from uadtool.lab import calibrate, export, quantize, train  # noqa: F401

    keep_registry()
    example = torch.zeros(1, 1, 4, 4)  # an export imports more
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(torch.nn.Conv2d(1, 1, 1), (example,), dynamo=True, verbose=False)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    _answer(connection)
                    os._exit(0)


def _answer(connection: socket.socket) -> None:
    """Run the command of a client in a process of its own, and tell the client how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    text = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    command = os.fork()
    if command == 0:
        connection.close()
        _become(*json.loads(text), streams)
    _, status = os.waitpid(command, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _become(words: List[str], folder: str, environment: Dict[str, str], streams: List[int]) -> None:
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["uadtool", *words]
    code = 0
    try:
        from uadtool.cli.main import main

        main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # as the interpreter would do
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(run_client(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])
