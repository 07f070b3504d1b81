import re
from typing import TYPE_CHECKING, Iterator, Optional, Tuple

import click

from uadtool import options
from uadtool.errors import require_lab

if TYPE_CHECKING:
    from torch import Tensor

FROM_DATA = ("good", "synthetic-anomalies")


def _sources(ctx: click.Context, param: click.Parameter, value: Tuple[str, ...]) -> Tuple[str, ...]:
    for source in value:
        if not (source in FROM_DATA or re.fullmatch("random-normal|images:.+", source)):
            raise click.BadParameter(f"{source!r} is none of {', '.join(FROM_DATA)}, random-normal and images:PATH")
    if len(set(value)) < len(value):
        raise click.BadParameter("the same source is given twice")
    return value


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.argument("data", metavar="[DATA]", required=False)
@options.output("The ranges to write (.json; - is stdout, in place of the result).")
@click.option("--method", type=click.Choice(["minmax", "moving-average", "percentile", "entropy", "mse"]),
              default="mse", show_default=True, help="How a range comes from the activations.")
@click.option("--percentile", type=click.FloatRange(0, 100, min_open=True), metavar="P",
              default=99.99, show_default=True, help="Of --method percentile: share of the activations to keep.")
@click.option("--source", "sources", metavar="KIND", multiple=True, default=["good"], show_default=True,
              callback=_sources, help="good, synthetic-anomalies, random-normal or images:PATH. Several --source "
                                      "share the count evenly.")
@click.option("--count", type=click.IntRange(1), default=64, show_default=True,
              help="Images to calibrate on, the same number of each class.")
@click.option("--classes", metavar="A,B,...", help="Of DATA, use these classes only.")
@options.seed
@options.verbosity
@click.pass_context
def calibrate(ctx: click.Context, model: str, data: Optional[str], output: str, method: str, percentile: float,
              sources: Tuple[str, ...], count: int, classes: Optional[str], seed: int) -> None:
    """Record the activation ranges of a float MODEL.

    It sees good training images of DATA, the same with synthetic anomalies, standard normal values in place of
    normalised pixels, the images of any folder or data set (test split), or a mixture. Only the first two need DATA.

    \b
    Examples:
      uadtool calibrate fp32.safetensors mvtec/ -o ranges.json --count 128
      uadtool calibrate fp32.safetensors mvtec/ -o r.json --source good --source synthetic-anomalies
      uadtool calibrate fp32.safetensors -o r.json --source random-normal --method percentile
    """
    from_data = bool(set(FROM_DATA) & set(sources))
    if from_data and not data:
        raise click.UsageError(f"Missing argument 'DATA': --source {' or '.join(FROM_DATA)} takes its images there.")
    if classes is not None and not from_data:
        raise click.UsageError(f"--classes is for --source {' and '.join(FROM_DATA)}.")
    if method != "percentile" and options.given(ctx, "percentile"):
        raise click.UsageError("--percentile is for --method percentile.")
    if count < len(sources):
        raise click.UsageError(f"--count {count} is too few for {len(sources)} sources.")
    require_lab()
    from uadtool import __version__
    from uadtool.artifacts import check_writable, file_digest, unchanged, write_json
    from uadtool.dataset import training_samples
    from uadtool.host import keep_freed_memory
    from uadtool.models import load_float_model
    from uadtool.progress import Progress
    from uadtool.quantization import RangesFile
    from uadtool.quantization import calibrate as run
    from uadtool.quantization.sources import calibration_batches

    keep_freed_memory()
    if output != "-":
        check_writable(output, [model, data, *(one[len("images:"):] for one in sources if one.startswith("images:"))])
    with unchanged(model) as digest:
        detector, metadata = load_float_model(model)
    good = []
    if data and from_data:
        good = training_samples(data, metadata.classes if classes is None else classes.split(","))
    chosen, source = calibration_batches(sources, good, count, seed, detector, metadata.image_size)
    with Progress("calibrate", source["count"]) as progress:
        def batches() -> "Iterator[Tensor]":
            for images in chosen:
                yield images
                progress.update(len(images))

        ranges = run(detector, batches(), method, percentile)
    file = RangesFile(
        model_digest=digest, ranges=ranges, source=source, tool=f"uadtool {__version__}",
        method=f"{method}-{percentile:.10g}" if method == "percentile" else method,
    )
    file.write(output)
    if output != "-":
        write_json({"schema": "uadtool.calibrate/1", "output": output, "digest": file_digest(output),
                    "model_digest": file.model_digest, "method": file.method, "source": source["kind"],
                    "images": source["count"], "points": len(ranges)})
