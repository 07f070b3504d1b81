"""Options that several commands share: one definition each, one spelling everywhere.

``--classes``     the classes of DATA to use
``--max-pixels``  the size beyond which an image is taken for a decompression bomb
``--output/-o``   the file to write; it appears whole or not at all
``--runtime``     the software that runs an exported model, or auto
``--seed``        the source of all randomness
``--target``      the runtime whose integer kernels round
``--threads``     the number of cores to use
``--threshold-from``  score file of good images
``-q`` / ``-v``   warnings only / debug messages and tracebacks, on stderr
"""

import contextlib
import logging
import re
from typing import Any, Callable, Iterable, List, Optional, Tuple, TypeVar

import click
from click.core import ParameterSource

from uadtool.terminal import log

F = TypeVar("F", bound=Callable[..., Any])
Callback = Callable[[click.Context, click.Parameter, Optional[str]], Any]

_NAME = r'\s*("(?:[^"]|"")+"|[^",\s](?:[^,]*[^,\s])?)\s*'
"""A name in a list, as in CSV."""


def _set_level(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            log.setLevel(level)

    return callback


def verbosity(command: F) -> F:
    """``-q/--quiet`` and ``-v/--verbose``."""
    quiet = click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_set_level(logging.WARNING),
                         help="Show only warnings and errors.")
    verbose = click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_set_level(logging.DEBUG),
                           help="Show debug messages, and a traceback on errors.")
    return quiet(verbose(command))


def output(help: str, required: bool = True) -> Callable[[F], F]:
    """``-o/--output FILE``."""
    return click.option("-o", "--output", required=required, metavar="FILE", type=click.Path(dir_okay=False), help=help)


def _limit_pixels(ctx: click.Context, param: click.Parameter, value: Optional[int]) -> None:
    if value is not None:
        from uadtool.data.images import limit_pixels  # lazy: it imports NumPy

        limit_pixels(value)


class Share(click.FloatRange):
    """A share, as a number (0.01) or in percent (1%)."""

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> Any:
        if isinstance(value, str) and value.endswith("%"):
            with contextlib.suppress(ValueError):  # click refuses it
                value = float(value[:-1]) / 100
        return super().convert(value, param, ctx)


def refuse(*cases: Tuple[object, str]) -> None:
    """Raise a usage error with the message of the first case whose condition holds."""
    for condition, message in cases:
        if condition:
            raise click.UsageError(message)


def claim(path: str, inputs: Iterable[Optional[str]] = ()) -> None:
    """``files.claimed`` until the command ends."""
    from uadtool.files import claimed

    click.get_current_context().with_resource(claimed(path, inputs))


def refuse_exported_name(ctx: click.Context, output: str) -> None:
    """Raise a usage error if an ``output`` for weights is named like an exported file."""
    if output.endswith((".onnx", ".engine")):
        raise click.UsageError(f"{ctx.command.name} writes a .safetensors file; export makes {output} from it.")


def given(ctx: click.Context, name: str) -> bool:
    """Whether the user gave an option that has a default."""
    return ctx.get_parameter_source(name) is not ParameterSource.DEFAULT


def _split(ctx: click.Context, param: click.Parameter, value: Optional[str]) -> Optional[List[str]]:
    if value is None:
        return None
    if not re.fullmatch(f"{_NAME}(?:,{_NAME})*", value):
        raise click.BadParameter(f"{value!r} is not a list such as A,B; put a name with a comma in double quotes")
    names = re.findall(rf"{_NAME}(?:,|\Z)", value)
    return [name[1:-1].replace('""', '"') if name.startswith('"') else name for name in names]


def height_and_width(longest: int) -> Callback:
    """The callback of an option that takes HEIGHTxWIDTH, each at most ``longest`` pixels."""
    def callback(ctx: click.Context, param: click.Parameter, value: Optional[str]) -> Optional[Tuple[int, int]]:
        if value is None:
            return None
        height, x, width = value.lower().partition("x")
        if not (x and all(side.isdecimal() and 1 <= int(side) <= longest for side in (height, width))):
            raise click.BadParameter(f"{value!r} is not HEIGHTxWIDTH in pixels, such as 1080x1920 (at most {longest})")
        return int(height), int(width)

    return callback


def names(flag: str, help: str) -> Callable[[F], F]:
    """An option that takes a list of classes."""
    return click.option(flag, metavar="A,B,...", callback=_split, help=help)


classes = names("--classes", "Use only these classes of DATA.")
target = click.option("--target", type=click.Choice(["onnxruntime", "openvino", "tensorrt"]), default="onnxruntime",
                      show_default=True, help="Runtime that the int8 model is made for.")
seed = click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
                    help="Source of all randomness.")
max_pixels = click.option("--max-pixels", type=click.IntRange(1), metavar="N", expose_value=False,
                          callback=_limit_pixels, help="Refuse images of more pixels  [default: 178956970]")
threshold_from = click.option("--threshold-from", metavar="FILE", type=click.Path(exists=True, dir_okay=False),
                              multiple=True,
                              help="Take thresholds from the good images in this output of score; may be repeated.")
runtime = click.option("--runtime", type=click.Choice(["auto", "onnxruntime", "openvino", "tensorrt", "torch"]),
                       default="auto", show_default=True,
                       help="Runtime of the model; auto takes the fastest installed runtime for this kind of file, and "
                            "names it on stderr if there was a choice.")
threads = click.option("--threads", type=click.IntRange(1), metavar="N", help="Cores to use  [default: all]")
