import logging
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import click

from uadtool.cli import options
from uadtool.errors import UadtoolError, require_lab
from uadtool.terminal import log

OF_THE_BASE = ("method", "method_options", "sizes", "teacher", "teacher_weights", "image_size", "grey_bits", "epochs",
               "steps", "false_positive_rate", "teacher_ranges", "target", "device", "resume", "check")
"""Options that have no meaning where classes are added to a model."""


class Auto(NamedTuple):
    """An ``--image-size`` of the shape of the images, with ``side`` x ``side`` pixels."""

    side: int


def _size(ctx: click.Context, param: click.Parameter, value: str) -> Union[Auto, Tuple[int, int]]:
    """``256``, ``HEIGHTxWIDTH``, ``auto`` or ``auto:N``."""
    auto, _, text = value.lower().partition(":") if value.lower().startswith("auto") else ("", "", value.lower())
    try:
        numbers = [int(part) for part in (text or "256").split("x")]
    except ValueError:
        numbers = []
    most = 1 if auto else 2
    if auto not in ("", "auto") or not 1 <= len(numbers) <= most or not all(
            32 <= n <= 4096 and n % 16 == 0 for n in numbers):
        raise click.BadParameter(f"{value!r} is not a size such as 256, 256x320, auto or auto:384 (multiples of 16, 32 "
                                 "to 4096)")
    return Auto(numbers[0]) if auto else (numbers[0], numbers[-1])


def _sizes(ctx: click.Context, param: click.Parameter, value: Optional[str]) -> List[int]:
    """``250,1000``."""
    try:
        sizes = [int(part) for part in value.split(",")] if value is not None else []
    except ValueError:
        sizes = [0]
    if not all(1 <= size <= 1_000_000 for size in sizes) or len(sizes) > 20:
        raise click.BadParameter(f"{value!r} is not a list of up to 20 numbers of entries such as 250,1000")
    return sizes


def _pairs(ctx: click.Context, param: click.Parameter, value: Tuple[str, ...]) -> Dict[str, str]:
    for text in value:
        if "=" not in text.strip("="):
            raise click.BadParameter(f"{text!r} is not NAME=VALUE")
    return dict(text.split("=", 1) for text in value)


@click.command()
@click.argument("data", metavar="DATA")
@options.output("The model to write (.safetensors).", required=False)
@click.option("--method", default="memory", show_default=True, metavar="NAME",
              help="Detection method: memory, duet, stfpm, rd, us, dinomaly, or one that an installed package adds.")
@click.option("--option", "method_options", metavar="NAME=VALUE", multiple=True, callback=_pairs,
              help="Option of the method: memory has entries, components and strides; duet has entries, components "
                   "and width; stfpm has fusion, dcam and shared_stages; rd and us have width; dinomaly has width, "
                   "depth, bottleneck and dropout.")
@click.option("--sizes", metavar="N,N", callback=_sizes,
              help="Entries of the banks of memory or duet in several sizes, of which export --size takes one.")
@click.option("--teacher", default="tf_efficientnet_lite0", show_default=True, metavar="NAME",
              help="Name of a timm CNN; dinomaly and memory also take a vision transformer.")
@click.option("--teacher-weights", metavar="FILE", type=click.Path(exists=True, dir_okay=False),
              help="ImageNet weights of the teacher (.pth, .safetensors)  [default: from an installed package or timm]")
@click.option("--image-size", default="256", show_default=True, metavar="SIZE", callback=_size,
              help="Pixels to resize images to: SIZE, HEIGHTxWIDTH, or auto:N for the shape of the images with N x N "
                   "pixels (auto: 256).")
@click.option("--grey-bits", type=click.Choice(["auto", "10", "12", "14", "16"]), default="auto", show_default=True,
              help="Bits of the values in 16-bit grey files; auto takes for each class the fewest that fit.")
@click.option("--roi", metavar="FILE|FOLDER", type=click.Path(exists=True),
              help="Region of interest, white on black: an image for all classes, or a folder of CLASS.png  [default: "
                   "CLASS/roi.png of DATA]")
@options.max_pixels
@options.classes
@click.option("--add-to", "base", metavar="MODEL", type=click.Path(exists=True, dir_okay=False),
              help="Add the classes of DATA to this model of memory or duet, which may be quantized. Its other classes "
                   "stay as they are.")
@options.names("--replace", "Classes of the model to learn anew from DATA (with --add-to).")
@options.names("--extend", "Classes of the model that DATA has more good images of (with --add-to).")
@click.option("--turns", type=click.Choice(["auto", "yes", "no"]), default="auto", show_default=True,
              help="Learn classes of fewer than 10 images also turned and mirrored (with --add-to); auto: where they "
                   "look the same then.")
@click.option("--epochs", type=click.IntRange(1),
              help="Passes over the images, for methods that take steps  [default: 40]")
@click.option("--steps", type=click.IntRange(1), help="Batches of 16 images to train on, instead of --epochs.")
@click.option("--held-out", type=options.Share(0.01, 0.9), default=0.2, show_default=True, metavar="SHARE",
              help="Share of the good images to hold out; they choose the checkpoint and set the threshold.")
@click.option("--false-positive-rate", type=options.Share(0, 0.5), default=0.01, show_default=True, metavar="SHARE",
              help="Share of held-out good images above the threshold.")
@click.option("--teacher-int8", "teacher_ranges", metavar="RANGES",
              help="Quantize the teacher before training, with ranges of a model that has this teacher; the student "
                   "learns its int8 features for --target.")
@options.target
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Device that torch computes on.")
@options.seed
@click.option("--resume", is_flag=True, help="Continue from OUTPUT.checkpoint, if an interrupted run left it.")
@click.option("--check", is_flag=True,
              help="Train nothing: read every image, and report what is in DATA and what is odd.")
@options.verbosity
@click.pass_context
def train(ctx: click.Context, data: str, output: Optional[str], method: str, method_options: Dict[str, str],
          sizes: List[int], teacher: str, teacher_weights: Optional[str],
          image_size: Union[Auto, Tuple[int, int]], grey_bits: str, roi: Optional[str],
          classes: Optional[List[str]], base: Optional[str], replace: Optional[List[str]],
          extend: Optional[List[str]], turns: str, epochs: Optional[int], steps: Optional[int], held_out: float,
          false_positive_rate: float, teacher_ranges: Optional[str], target: str, device: str, seed: int,
          resume: bool, check: bool) -> None:
    """Train one detector for all classes of DATA, only from good images.

    DATA is a folder in MVTec layout (CLASS/train/good), one such class folder, or a manifest (CSV, JSONL). An
    interrupted run leaves OUTPUT.checkpoint, and --resume continues from it to the same result. Processes that torchrun
    starts share the work, also on several machines.

    \b
    Examples:
      uadtool train mvtec/ --check
      uadtool train mvtec/ -o unified.safetensors
      uadtool train mvtec/ -o duet.safetensors --method duet --resume
      uadtool train cells/ -o cells.safetensors --image-size auto:384
      uadtool train new/ -o grown.safetensors --add-to unified.safetensors
      uadtool train parts.csv -o r18.safetensors --teacher resnet18 --teacher-weights resnet18.pth
      uadtool train mvtec/ -o first.safetensors --method stfpm --teacher-int8 ranges.json
      torchrun --nproc-per-node 4 -m uadtool train mvtec/ -o duet.safetensors --method duet
    """
    options.refuse(
        (steps and epochs, "--epochs and --steps are mutually exclusive."),
        (check and output, "--check writes no model; leave out -o."),
        (not check and not output, "Missing option '-o' / '--output'."),
        (not teacher_ranges and options.given(ctx, "target"),
         "--target requires --teacher-int8; a float model runs on every runtime."),
        (sizes and "entries" in method_options, "--sizes and --option entries are mutually exclusive."),
        ((replace or extend or options.given(ctx, "turns")) and not base,
         "--replace, --extend and --turns require --add-to."),
        *((base and param.name in OF_THE_BASE and options.given(ctx, param.name),
           f"{param.opts[0]} does not go with --add-to: the model decides, and no step is taken.")
          for param in ctx.command.params),
    )
    if check:
        _check(data, classes, roi, held_out, false_positive_rate)
        return
    assert output
    options.refuse_exported_name(ctx, output)
    require_lab()
    if base:
        _grow(data, classes, roi, base, output, replace or [], extend or [], turns, held_out, seed)
        return
    from uadtool.data.sizing import suitable_size
    from uadtool.host import keep_freed_memory
    from uadtool.lab.models import save_model
    from uadtool.lab.quantization.ranges import RangesFile
    from uadtool.lab.train import TrainingOptions
    from uadtool.lab.train import train as run
    from uadtool.lab.training.distributed import on_first, process_group
    from uadtool.lab.training.precision import use_available_cores

    keep_freed_memory()
    use_available_cores()
    with process_group(device):
        on_first(lambda: options.claim(output, [data, roi, teacher_weights, teacher_ranges]))
        ranges = RangesFile.read(teacher_ranges).ranges if teacher_ranges else None
        samples = _samples(data, classes, roi)
        if isinstance(image_size, Auto):
            image_size = suitable_size(samples, image_size.side)
        checkpoint = Path(f"{output}.checkpoint")
        result = run(samples, TrainingOptions(
            method=method, method_options=method_options, sizes=sizes, teacher=teacher, teacher_weights=teacher_weights,
            image_size=image_size, grey_bits=None if grey_bits == "auto" else int(grey_bits), held_out=held_out,
            false_positive_rate=false_positive_rate, device=device, seed=seed,
            teacher_ranges=ranges, target=target, epochs=epochs, steps=steps,
        ), checkpoint, resume)
        if result is None:
            return
        save_model(result.detector, result.metadata, output)
        checkpoint.unlink(missing_ok=True)
        _report(output, result.metadata, {**result.report, **({"sizes": sorted(set(sizes))} if sizes else {})})


def _samples(data: str, classes: Optional[List[str]], roi: Optional[str]) -> List[Any]:
    from uadtool.data.dataset import training_samples
    from uadtool.data.roi import with_roi

    return with_roi(training_samples(data, classes), roi)


def _grow(data: str, classes: Optional[List[str]], roi: Optional[str], base: str, output: str, replace: List[str],
          extend: List[str], turns: str, held_out: float, seed: int) -> None:
    from uadtool.files import unchanged
    from uadtool.host import keep_freed_memory
    from uadtool.lab.grow import GrowthOptions, grow
    from uadtool.lab.models import load_model, save_model
    from uadtool.lab.rows import Model
    from uadtool.lab.training.precision import use_available_cores

    keep_freed_memory()
    use_available_cores()
    options.claim(output, [data, roi, base])
    samples = _samples(data, classes, roi)
    with unchanged(base) as digest:
        model = Model(*load_model(base), base)
    (module, metadata, _), report = grow(model, digest, samples, GrowthOptions(replace, extend, held_out, seed, turns))
    save_model(module, metadata, output)
    _report(output, metadata, {"base": digest, **report})


def _report(output: str, metadata: Any, report: Dict[str, Any]) -> None:
    from uadtool.files import file_digest
    from uadtool.schemas.json_files import write_json

    write_json({"schema": "uadtool.train/1", "output": output, "digest": file_digest(output), **report,
                "threshold": metadata.threshold, "thresholds": metadata.thresholds,
                "false_positive_rate": metadata.false_positive_rate, "parameters": metadata.parameters,
                "macs": metadata.macs})


def _check(data: str, classes: Optional[List[str]], roi: Optional[str], held_out: float,
           false_positive_rate: float) -> None:
    from time import perf_counter

    from uadtool.data.check import check, table
    from uadtool.host import available_cores
    from uadtool.schemas.json_files import write_json
    from uadtool.scoring.metrics import rounded

    began = perf_counter()
    report = check(data, classes, held_out, false_positive_rate, available_cores(), roi)
    seconds = perf_counter() - began
    write_json({"schema": "uadtool.check/1", "data": data, "seconds": rounded(seconds),
                "images_per_second": rounded(report["images"] / seconds), **report})
    if log.isEnabledFor(logging.INFO):
        click.echo(table(report), err=True)
    if report["refusal"]:
        raise UadtoolError(report["refusal"])
