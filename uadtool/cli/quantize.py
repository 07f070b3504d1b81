import re
from pathlib import Path
from typing import Optional, Tuple

import click

from uadtool.cli import options
from uadtool.errors import require_lab


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.argument("data", metavar="[DATA]", required=False)
@click.option("--ranges", "ranges_file", metavar="FILE",
              help="Activation ranges that `uadtool calibrate` recorded with this model (- is stdin).")
@options.output("The quantized model to write (.safetensors).")
@click.option("--precision", type=click.Choice(["int8", "fp16"]), default="int8", show_default=True,
              help="Of the networks; fp16 needs no ranges.")
@options.target
@click.option("--scope", type=click.Choice(["all", "student"]), default="all", show_default=True,
              help="Networks to quantize.")
@click.option("--keep-float", "kept", metavar="PATTERN", multiple=True,
              help="Layers that stay float, by name (teacher.conv_stem, *.conv_dw), or auto:N, the N most sensitive.")
@click.option("--sensitivity", is_flag=True, help="Also tell how far each layer alone, quantized, moves the maps.")
@click.option("--bias-correction/--no-bias-correction", default=True, show_default=True,
              help="With DATA: shift biases so that each channel keeps its mean.")
@click.option("--qat", is_flag=True, help="Fine-tune the student with its quantizers (quantization-aware training).")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="Of --qat: batches of 16 images.")
@click.option("--resume", is_flag=True, help="Of --qat: go on from OUTPUT.checkpoint, if an interrupted run left one.")
@options.seed
@options.verbosity
@click.pass_context
def quantize(ctx: click.Context, model: str, data: Optional[str], ranges_file: Optional[str], output: str,
             precision: str, target: str, scope: str, kept: Tuple[str, ...], sensitivity: bool, bias_correction: bool,
             qat: bool, steps: int, resume: bool, seed: int) -> None:
    """Quantize a float MODEL to int8: weights per channel, activations per tensor, the score head in float.

    With DATA, the data set that MODEL was trained on, its good images serve to correct the biases and, held-out ones
    too, to take score statistics and threshold anew, since rounding shifts the scores of the classes apart. No label is
    used. Layers that stay float are fp16 for tensorrt.

    \b
    Examples:
      uadtool quantize fp32.safetensors mvtec/ --ranges r.json -o int8.safetensors
      uadtool quantize fp32.safetensors mvtec/ --ranges r.json -o q.safetensors --scope student
      uadtool quantize fp32.safetensors mvtec/ --ranges r.json -o q.safetensors --qat
      uadtool quantize fp32.safetensors -o half.safetensors --precision fp16 --target tensorrt
    """
    numbers = [int(match[1]) for match in (re.fullmatch("auto:([1-9][0-9]*)", one) for one in kept) if match]
    patterns = [one for one in kept if not one.startswith("auto:")]
    if len(numbers) + len(patterns) < len(kept) or len(numbers) > 1:
        raise click.UsageError("--keep-float auto:N wants a number of layers, once.")
    if precision == "int8" and not ranges_file:
        raise click.UsageError("Missing option '--ranges': int8 needs activation ranges from `uadtool calibrate`.")
    if precision == "fp16" and (ranges_file or kept or sensitivity or qat or scope != "all"):
        raise click.UsageError("--ranges, --scope, --keep-float, --sensitivity and --qat are for int8.")
    if not data and (numbers or sensitivity or qat):
        raise click.UsageError("Missing argument 'DATA': auto:N, --sensitivity and --qat take good images from there.")
    if not qat and (options.given(ctx, "steps") or resume):
        raise click.UsageError("--steps and --resume are for --qat.")
    if not bias_correction and (not data or precision == "fp16"):
        raise click.UsageError("--no-bias-correction is for int8 with DATA: else there is none.")
    options.no_exported(ctx, output)
    require_lab()
    from uadtool.files import check_writable, file_digest, unchanged, write_json
    from uadtool.host import keep_freed_memory
    from uadtool.lab.models import load_float_model, save_model
    from uadtool.lab.quantization.ranges import RangesFile
    from uadtool.lab.quantize import Recipe, apply_recipe

    keep_freed_memory()
    check_writable(output, [model, data, ranges_file])
    ranges = RangesFile.read(ranges_file) if ranges_file else None
    with unchanged(model) as digest:
        if ranges:
            ranges.check_model(digest, model)
        detector, metadata = load_float_model(model)
    recipe = Recipe(precision=precision, target=target, scope=scope, keep_float=patterns,
                    keep_sensitive=numbers[0] if numbers else 0, bias_correction=bias_correction,
                    sensitivity=sensitivity, qat_steps=steps if qat else 0, seed=seed)
    checkpoint = Path(f"{output}.checkpoint")
    result = apply_recipe(detector, metadata, digest, ranges, data, recipe, checkpoint, resume)
    save_model(result.model, result.metadata, output)
    if qat:
        checkpoint.unlink(missing_ok=True)
    write_json({"schema": "uadtool.quantize/1", "output": output, "digest": file_digest(output),
                "model_digest": digest, "target": target, "precision": result.metadata.precision, **result.report})
