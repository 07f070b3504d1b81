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
              help="Activation ranges that `uadtool calibrate` recorded from MODEL (- is stdin).")
@options.output("The quantized model to write (.safetensors).")
@click.option("--precision", type=click.Choice(["int8", "fp16"]), default="int8", show_default=True,
              help="Precision of the networks; fp16 needs no ranges.")
@options.target
@click.option("--scope", type=click.Choice(["all", "student"]), default="all", show_default=True,
              help="Networks to quantize.")
@click.option("--keep-float", "kept", metavar="PATTERN", multiple=True,
              help="Layers to keep in float, by name (teacher.conv_stem, *.conv_dw), or auto:N, the N most sensitive; "
                   "may be repeated.")
@click.option("--sensitivity", is_flag=True,
              help="Also report how far each layer moves the anomaly maps if only this layer is quantized.")
@click.option("--bias-correction/--no-bias-correction", default=True, show_default=True,
              help="Shift biases so that each channel keeps its mean (with DATA).")
@click.option("--qat", is_flag=True, help="Fine-tune the student with its quantizers (quantization-aware training).")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True,
              help="Batches of 16 images to fine-tune on (with --qat).")
@click.option("--resume", is_flag=True,
              help="Continue from OUTPUT.checkpoint, if an interrupted run left it (with --qat).")
@options.max_pixels
@options.seed
@options.verbosity
@click.pass_context
def quantize(ctx: click.Context, model: str, data: Optional[str], ranges_file: Optional[str], output: str,
             precision: str, target: str, scope: str, kept: Tuple[str, ...], sensitivity: bool, bias_correction: bool,
             qat: bool, steps: int, resume: bool, seed: int) -> None:
    """Quantize a float MODEL to int8: weights per channel, activations per tensor, the score head in float.

    DATA is the data set that MODEL was trained on. If it is given, its good images correct the biases, and renew the
    score statistics and the threshold, since rounding shifts the scores of the classes apart. Labels are not used.
    Layers that stay float are fp16 for tensorrt.

    \b
    Examples:
      uadtool quantize fp32.safetensors mvtec/ --ranges r.json -o int8.safetensors
      uadtool quantize fp32.safetensors mvtec/ --ranges r.json -o q.safetensors --scope student
      uadtool quantize fp32.safetensors mvtec/ --ranges r.json -o q.safetensors --qat
      uadtool quantize fp32.safetensors -o half.safetensors --precision fp16 --target tensorrt
    """
    numbers = [int(match[1]) for match in (re.fullmatch("auto:([1-9][0-9]*)", keep) for keep in kept) if match]
    patterns = [keep for keep in kept if not keep.startswith("auto:")]
    options.refuse(
        (len(numbers) + len(patterns) < len(kept) or len(numbers) > 1,
         "--keep-float auto:N takes one positive integer and may be given once."),
        (precision == "int8" and not ranges_file,
         "Missing option '--ranges': int8 requires activation ranges from `uadtool calibrate`."),
        (precision == "fp16" and (ranges_file or kept or sensitivity or qat or scope != "all"),
         "--ranges, --scope, --keep-float, --sensitivity and --qat require int8."),
        (not data and (numbers or sensitivity or qat),
         "Missing argument 'DATA': --keep-float auto:N, --sensitivity and --qat require it."),
        (not qat and (options.given(ctx, "steps") or resume), "--steps and --resume require --qat."),
        (not bias_correction and (not data or precision == "fp16"), "--no-bias-correction requires int8 and DATA."),
    )
    options.refuse_exported_name(ctx, output)
    require_lab()
    from uadtool.files import file_digest, unchanged
    from uadtool.host import keep_freed_memory
    from uadtool.lab.models import load_float_model, save_model
    from uadtool.lab.quantization.ranges import RangesFile
    from uadtool.lab.quantize import Recipe, apply_recipe
    from uadtool.lab.training.precision import use_available_cores
    from uadtool.schemas.json_files import write_json

    keep_freed_memory()
    use_available_cores()
    options.claim(output, [model, data, ranges_file])
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
