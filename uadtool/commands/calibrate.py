from typing import TYPE_CHECKING, Iterator, Optional

import click

from uadtool import options
from uadtool.errors import require_lab

if TYPE_CHECKING:
    from torch import Tensor


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.argument("data", metavar="DATA")
@options.output("The ranges to write (.json; - is stdout, in place of the result).")
@click.option("--method", type=click.Choice(["minmax"]), default="minmax", show_default=True,
              help="How a range comes from the activations.")
@click.option("--count", type=click.IntRange(1), default=64, show_default=True,
              help="Images to calibrate on, the same number of each class.")
@click.option("--classes", metavar="A,B,...", help="Calibrate on these classes only.")
@options.seed
@options.verbosity
def calibrate(model: str, data: str, output: str, method: str, count: int, classes: Optional[str], seed: int) -> None:
    """Record the activation ranges of a float MODEL on good training images of DATA.

    \b
    Example:
      uadtool calibrate unified.safetensors mvtec/ -o ranges.json --count 128
    """
    require_lab()
    from uadtool import __version__
    from uadtool.artifacts import check_writable, file_digest, list_digest, write_json
    from uadtool.dataset import balanced, training_samples
    from uadtool.host import available_cores
    from uadtool.models import load_float_model
    from uadtool.progress import Progress
    from uadtool.quantization import RangesFile
    from uadtool.quantization import calibrate as run
    from uadtool.training.data import image_batches

    if output != "-":
        check_writable(output)
    detector, metadata = load_float_model(model)
    samples = balanced(training_samples(data, classes.split(",") if classes else None), count, seed)
    with Progress("calibrate", len(samples)) as progress:
        def batches() -> "Iterator[Tensor]":
            for part, images in image_batches(samples, metadata.image_size, available_cores()):
                yield images
                progress.update(len(part))

        ranges = run(detector, batches(), method)
    file = RangesFile(
        model_digest=file_digest(model), method=method, ranges=ranges, tool=f"uadtool {__version__}",
        source={"kind": "good-training-images", "count": len(samples), "seed": seed,
                "images": list_digest(sample.path for sample in samples)},
    )
    file.write(output)
    if output != "-":
        write_json({"schema": "uadtool.calibrate/1", "output": output, "digest": file_digest(output),
                    "model_digest": file.model_digest, "method": method, "images": len(samples),
                    "points": len(ranges)})
