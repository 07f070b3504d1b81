"""What ``score`` reads: images and folders, paths on stdin, a folder that is followed, or frames on stdin."""

import os
import signal
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Callable, ContextManager, Iterable, NamedTuple, Optional, Tuple, TypeVar

import click

from uadtool.cli import options
from uadtool.errors import reading
from uadtool.host import ending_signals

F = TypeVar("F", bound=Callable[..., Any])

PIECE = 1 << 18
"""Bytes of frames that are read from stdin at once."""

LONGEST_SIDE = 1 << 16
"""Height and width of raw frames at most."""


class Source(NamedTuple):
    """The ``samples``, the number that this run scores (``total``), if it is known, and how many were ``dropped``."""

    samples: Iterable[Any]
    total: Optional[int] = None
    dropped: Optional[Callable[[], int]] = None


def _shard(ctx: click.Context, param: click.Parameter, value: Optional[str]) -> Optional[Tuple[int, int]]:
    if value is None:
        return None
    index, slash, count = value.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise click.BadParameter(f"{value!r} is not I/N with I from 1 to N, such as 2/8")
    return int(index), int(count)


def source_options(command: F) -> F:
    """The options that say where images come from, in this order."""
    for option in reversed((
            click.option("--follow", is_flag=True,
                         help="Score each image that appears in the folder PATH from now on, until Ctrl-C."),
            click.option("--done", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
                         help="With --follow, first score the images that are not in FILE, the output of earlier "
                              "runs, or changed since."),
            click.option("--frames", is_flag=True,
                         help="Score the frames on stdin: JPEG or PNG files one after another."),
            click.option("--raw", metavar="HxW", callback=options.height_and_width(LONGEST_SIDE),
                         help="With --frames, the frames are raw pixels (RGB24) of this height and width."),
            click.option("--latest", is_flag=True,
                         help="With --frames, always score the newest frame, and drop those that came before it."),
            click.option("--drift-state", type=click.Path(dir_okay=False), metavar="FILE",
                         help="Go on to watch for drift from FILE, and keep the watch in it."),
            click.option("--shard", metavar="I/N", callback=_shard,
                         help="Score only every N-th image, starting with the I-th; compare merges the N runs."),
            click.option("--ray", metavar="ADDRESS",
                         help="Score on the Ray cluster at HOST:PORT, of this machine (auto), or on a new cluster "
                              "(local)."),
            click.option("-0", "--null", is_flag=True, help="Paths on stdin end with NUL (find -print0)."))):
        command = option(command)
    return command


def check_source(ctx: click.Context, arguments: SimpleNamespace) -> None:
    """Raise a usage error if the paths and ``source_options`` contradict each other."""
    paths, follow, frames = arguments.paths, arguments.follow, arguments.frames
    options.refuse(
        (frames and paths not in ((), ("-",)), "--frames reads stdin; leave out the PATHs."),
        (frames and follow, "--frames and --follow are mutually exclusive."),
        (frames and (arguments.shard or arguments.ray or arguments.null),
         "--frames uses one process; leave out --shard, --ray and --null."),
        (frames and sys.stdin.isatty(), "Give frames on stdin, such as: ffmpeg ... -f image2pipe -c:v mjpeg - |"),
        (arguments.raw and not frames, "--raw requires --frames."),
        (arguments.latest and not frames, "--latest requires --frames."),
        (follow and len(paths) != 1, "--follow takes one folder."),
        (arguments.drift_state and (arguments.shard or arguments.ray),
         "--drift-state takes images in the order of their time; leave out --shard and --ray."),
        (not paths and sys.stdin.isatty(), "Give a PATH, or paths on stdin."),
        ("-" in paths and len(paths) > 1, "Give either PATHs or -."),
        (arguments.null and paths not in ((), ("-",)), "-0 requires paths on stdin."),
        (arguments.done and not follow, "--done requires --follow."),
        (follow and (arguments.shard or arguments.ray), "--follow uses one process; leave out --shard and --ray."),
        (arguments.ray and arguments.threads, "--ray uses one core per image; leave out --threads."),
        (arguments.ray and options.given(ctx, "max_pixels"), "--max-pixels does not reach a cluster; leave out --ray."),
        ((follow or arguments.latest) and arguments.batch_size > 1,
         f"--{'follow' if follow else 'latest'} scores images one by one; leave out --batch-size."),
    )


def open_source(arguments: SimpleNamespace) -> Source:
    """The samples that the arguments name. A signal ends those that come without end, as the end of stdin does."""
    from uadtool.cli.lines import scored_images, stdin_paths
    from uadtool.data.dataset import scoring_samples

    if arguments.follow:
        from uadtool.data.watch import Watch

        watch = Watch(arguments.paths[0], scored_images(arguments.done) if arguments.done else None)
        _on_signals(watch.stop)
        return Source(scoring_samples(watch, strict=False))
    if arguments.frames:
        from uadtool.data.frames import Frames

        frames = Frames(_read_stdin, arguments.raw, arguments.latest)
        _on_signals(frames.stop)
        return Source(frames, dropped=(lambda: frames.dropped) if arguments.latest else None)
    if arguments.paths in ((), ("-",)):
        return Source(scoring_samples(stdin_paths(b"\0" if arguments.null else b"\n"), strict=False))
    samples = list(scoring_samples(arguments.paths))
    index, count = arguments.shard or (1, 1)
    return Source(samples, len(samples[index - 1::count]))


def drift_watch(arguments: SimpleNamespace, detector: Any) -> ContextManager[Any]:
    """A watch for drift over images that come in the order of their time; None over others."""
    if not (arguments.follow or arguments.frames or arguments.drift_state):
        return nullcontext()
    from uadtool.scoring.drift import watch

    if arguments.drift_state:
        options.claim(arguments.drift_state, [arguments.model])
    return watch(detector.metadata, detector.path, arguments.drift_state)


def _on_signals(stop: Callable[[], None]) -> None:
    for number in (signal.SIGINT, *ending_signals()):
        signal.signal(number, lambda *_: stop())


def _read_stdin() -> bytes:
    with reading("stdin"):
        return os.read(sys.stdin.fileno(), PIECE)
