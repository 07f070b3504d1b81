import re
from typing import List, Optional, Tuple

import click

from uadtool.cli import options
from uadtool.errors import require_lab

FROM_DATA = ("good", "synthetic-anomalies")


def _sources(ctx: click.Context, param: click.Parameter, value: Tuple[str, ...]) -> Tuple[str, ...]:
    for source in value:
        if not (source in FROM_DATA or re.fullmatch("random-normal|images:.+", source)):
            raise click.BadParameter(f"{source!r} is not {', '.join(FROM_DATA)}, random-normal or images:PATH")
    if len(set(value)) < len(value):
        raise click.BadParameter("each source may be given once")
    return value


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.argument("data", metavar="[DATA]", required=False)
@options.output("File for the ranges (.json); - prints them in place of the result.")
@click.option("--method", type=click.Choice(["minmax", "moving-average", "percentile", "entropy", "mse"]),
              default="mse", show_default=True, help="How to derive a range from activations.")
@click.option("--percentile", type=click.FloatRange(0, 100, min_open=True), metavar="P",
              default=99.99, show_default=True, help="Percentage of activations to keep (with --method percentile).")
@click.option("--source", "sources", metavar="KIND", multiple=True, default=["good"], show_default=True,
              callback=_sources, help="good, synthetic-anomalies, random-normal or images:PATH; may be repeated, and "
                                      "the sources share the count evenly.")
@click.option("--count", type=click.IntRange(1), default=64, show_default=True,
              help="Images to calibrate on, the same number of each class.")
@options.max_pixels
@options.classes
@options.seed
@options.verbosity
@click.pass_context
def calibrate(ctx: click.Context, model: str, data: Optional[str], output: str, method: str, percentile: float,
              sources: Tuple[str, ...], count: int, classes: Optional[List[str]], seed: int) -> None:
    """Record the activation ranges of a float MODEL.

    The sources are good training images of DATA, these images with synthetic anomalies, standard normal values in
    place of normalised pixels, and the images of any folder or data set (test split). Only the first two need DATA.

    \b
    Examples:
      uadtool calibrate fp32.safetensors mvtec/ -o ranges.json --count 128
      uadtool calibrate fp32.safetensors mvtec/ -o r.json --source good --source synthetic-anomalies
      uadtool calibrate fp32.safetensors -o r.json --source random-normal --method percentile
    """
    from_data = bool(set(FROM_DATA) & set(sources))
    options.refuse(
        (from_data and not data, f"Missing argument 'DATA': --source {' and '.join(FROM_DATA)} require it."),
        (classes is not None and not from_data, f"--classes requires --source {' or '.join(FROM_DATA)}."),
        (method != "percentile" and options.given(ctx, "percentile"), "--percentile requires --method percentile."),
        (count < len(sources), f"--count {count} is too few for {len(sources)} sources."),
    )
    require_lab()
    from uadtool.files import file_digest, unchanged
    from uadtool.host import keep_freed_memory
    from uadtool.lab.calibrate import CalibrationOptions
    from uadtool.lab.calibrate import calibrate as run
    from uadtool.lab.models import load_float_model
    from uadtool.lab.training.precision import use_available_cores
    from uadtool.schemas.json_files import write_json

    keep_freed_memory()
    use_available_cores()
    if output != "-":
        images = [source[len("images:"):] for source in sources if source.startswith("images:")]
        options.claim(output, [model, data, *images])
    with unchanged(model) as digest:
        detector, metadata = load_float_model(model)
    ranges = run(detector, metadata, digest, data if from_data else None, CalibrationOptions(
        method, percentile, sources, count, classes, seed))
    ranges.write(output)
    if output != "-":
        write_json({"schema": "uadtool.calibrate/1", "output": output, "digest": file_digest(output),
                    "model_digest": digest, "method": ranges.method, "source": ranges.source["kind"],
                    "images": ranges.source["count"], "points": len(ranges.ranges)})
