"""The command group, which imports a command when it is needed; and the exit code of each way to end."""

import contextlib
import importlib
import io
import logging
import os
import signal
import sys
from typing import Any, List, NoReturn, Optional

import click

from uadtool import __version__
from uadtool.errors import UadtoolError
from uadtool.host import ending_signals
from uadtool.terminal import OneLine, log

COMMANDS = {
    "train": "Train one detector for all classes from good images.",
    "calibrate": "Record the activation ranges of a float model.",
    "quantize": "Quantize a float model to int8 or fp16.",
    "export": "Write a model as ONNX or as a TensorRT engine.",
    "score": "Score images: one JSON line each, and pictures.",
    "bench": "Measure latency, throughput, memory and energy.",
    "compare": "Compare and join results, and check limits.",
}
"""The commands in the order of the chain, and what they do. They stand here so that --help need not import them."""


class ReaderGone(Exception):
    """The reader of stdout closed the pipe."""


class Stdout(io.FileIO):
    """Raises errors of stdout as errors of their own. After the first error it discards all output."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # Python flushes at exit
            if isinstance(error, BrokenPipeError):
                raise ReaderGone from error
            raise UadtoolError(f"cannot write to stdout: {error.strerror}") from error


class LazyGroup(click.Group):
    """Imports ``uadtool.cli.NAME`` only when NAME is needed."""

    def list_commands(self, ctx: click.Context) -> List[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def get_command(self, ctx: click.Context, cmd_name: str) -> Optional[click.Command]:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"uadtool.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        command.short_help = COMMANDS[cmd_name]  # for shell completion
        return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Shell completion: eval \"$(_UADTOOL_COMPLETE=bash_source uadtool)\" (or zsh_source, fish_source).",
)
@click.version_option(__version__, message="uadtool %(version)s")
def cli() -> None:
    """One anomaly-detection model for all product classes, from a folder of good images to an edge device.

    train -> calibrate -> quantize -> export -> score / bench -> compare

    Commands read and write files. Results go to stdout, as JSON unless a command says otherwise; messages go to stderr.
    """


def main() -> NoReturn:
    """Run the command line and exit: 0, 1 (failed), 2 (usage), 3 (missing package), 4 (gate), 130, 141."""
    _prepare_streams()
    messages = logging.StreamHandler(sys.stderr)
    messages.setFormatter(OneLine("uadtool: %(message)s"))
    logging.basicConfig(handlers=[messages])
    log.setLevel(logging.INFO)  # libraries log only warnings
    for number in ending_signals():
        signal.signal(number, _terminate)
    code: Any
    try:
        code = _run()
    except SystemExit as end:  # from _terminate
        code = end.code
    with contextlib.suppress(ReaderGone, UadtoolError):
        sys.stdout.flush()  # a line that a signal interrupted
    sys.exit(code)


def _prepare_streams() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their file descriptors
        if getattr(sys, name) is None:  # closed: the next file opened would get its descriptor
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))
    if not sys.stdout.isatty():
        stdout = io.BufferedWriter(Stdout(sys.stdout.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(stdout, sys.stdout.encoding, sys.stdout.errors)


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def _run() -> int:
    try:
        code = cli.main(prog_name="uadtool", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0  # click returns the code of ctx.exit()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        log.error("interrupted")
        return 130
    except UadtoolError as error:
        log.error("error: %s", error)
        log.debug("traceback", exc_info=True)
        return error.exit_code
    except ReaderGone:
        return 141
    except Exception as error:
        log.error("error: %s: %s (-v shows where)", type(error).__name__, " ".join(str(error).split()))
        log.debug("traceback", exc_info=True)
        return 1
