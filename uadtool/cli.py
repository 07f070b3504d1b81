"""The command group: commands are imported when they are run, and every way to end has its exit code."""

import importlib
import logging
import os
import signal
import sys
from contextlib import contextmanager
from typing import Any, Iterator, List, NoReturn, Optional

import click

from uadtool import __version__
from uadtool.errors import UadtoolError

COMMANDS = ["train", "calibrate", "quantize", "export", "score", "bench", "compare"]

log = logging.getLogger("uadtool")


class ReaderGone(Exception):
    """The reader of stdout went away."""


class LazyGroup(click.Group):
    """Imports ``uadtool.commands.NAME`` only when NAME is asked for; lists commands in the order of the chain."""

    def list_commands(self, ctx: click.Context) -> List[str]:
        return COMMANDS

    def get_command(self, ctx: click.Context, cmd_name: str) -> Optional[click.Command]:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"uadtool.commands.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _reader_wanted():  # --help and --version print here
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _reader_wanted():
            return super().invoke(ctx)


@contextmanager
def _reader_wanted() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:  # click itself would exit with 1
        raise ReaderGone from error


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Shell completion: eval \"$(_UADTOOL_COMPLETE=bash_source uadtool)\" (or zsh_source, fish_source).",
)
@click.version_option(__version__, message="uadtool %(version)s")
def cli() -> None:
    """One anomaly-detection model for all product classes, from a folder of good images to an edge device.

    train -> calibrate -> quantize -> export -> score / bench -> compare

    Every command reads files and writes files; its result goes to stdout as JSON, messages go to stderr.
    """


def main() -> NoReturn:
    """Run the command line and exit: 0, 1 (failed), 2 (usage), 3 (missing package), 4 (gate), 130, 141."""
    logging.basicConfig(format="uadtool: %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)  # of libraries, only warnings
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _run()
        sys.stdout.flush()
    except (BrokenPipeError, ReaderGone):
        # Python would complain while flushing at exit: give it somewhere to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def _run() -> int:
    try:
        code = cli.main(prog_name="uadtool", standalone_mode=False)
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
    except (BrokenPipeError, ReaderGone):
        raise
    except Exception as error:
        log.error("error: %s: %s (-v shows where)", type(error).__name__, " ".join(str(error).split()))
        log.debug("traceback", exc_info=True)
        return 1
