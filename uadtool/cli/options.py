"""Options that several commands share: one definition each, one spelling everywhere.

``--target``      the runtime whose integer kernels round
``--seed``        all randomness of the command comes from it
``--runtime``     what runs an exported model, or auto
``--threads``     how many cores to use
``--output/-o``   the file to write; it appears whole or not at all
``-q`` / ``-v``   warnings only / debug messages and tracebacks, on stderr
"""

import logging
from typing import Any, Callable, TypeVar

import click
from click.core import ParameterSource

F = TypeVar("F", bound=Callable[..., Any])


def _set_level(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            logging.getLogger("uadtool").setLevel(level)

    return callback


def verbosity(command: F) -> F:
    """``-q/--quiet`` and ``-v/--verbose``."""
    quiet = click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_set_level(logging.WARNING),
                         help="No progress, only warnings and errors.")
    verbose = click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_set_level(logging.DEBUG),
                           help="Debug messages, and a traceback when something fails.")
    return quiet(verbose(command))


def output(help: str, required: bool = True) -> Callable[[F], F]:
    """``-o/--output FILE``."""
    return click.option("-o", "--output", required=required, metavar="FILE", type=click.Path(dir_okay=False), help=help)


def no_exported(ctx: click.Context, output: str) -> None:
    """Refuse an ``output`` for weights that is named as an exported file, which other commands would take it for."""
    if output.endswith((".onnx", ".engine")):
        raise click.UsageError(f"{ctx.command.name} writes a .safetensors file, which export makes an {output} of.")


def given(ctx: click.Context, name: str) -> bool:
    """Was this option given? For one with a default that is of use together with others alone."""
    return ctx.get_parameter_source(name) is not ParameterSource.DEFAULT


target = click.option("--target", type=click.Choice(["onnxruntime", "openvino", "tensorrt"]), default="onnxruntime",
                      show_default=True, help="Runtime whose integer kernels the model is made for.")
seed = click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
                    help="Source of all randomness.")
runtime = click.option("--runtime", type=click.Choice(["auto", "onnxruntime", "openvino", "tensorrt", "torch"]),
                       default="auto", show_default=True,
                       help="What runs the model; auto goes by the kind of file, for speed, and what is installed, and "
                            "says on stderr which it took where there was a choice.")
threads = click.option("--threads", type=click.IntRange(1), metavar="N",
                       help="Cores to use  [default: all]")
