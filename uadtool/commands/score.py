import json
import logging
import math
import os
import sys
from contextlib import closing
from typing import Iterator, List, Optional, Tuple

import click

from uadtool import options
from uadtool.errors import GateFailed, UadtoolError


def _finite(ctx: click.Context, param: click.Parameter, value: Optional[float]) -> Optional[float]:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("not a finite number")
    return value


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("paths", metavar="[PATH...|-]", nargs=-1)
@click.option("--threshold", metavar="SCORE", type=float, callback=_finite,
              help="An image that scores above it is anomalous  [default: the model's]")
@click.option("--fail-above", type=float, callback=_finite, metavar="SCORE",
              help="Exit with 4 in the end if an image scores above it.")
@click.option("--batch-size", type=click.IntRange(1), metavar="N", default=1, show_default=True,
              help="Images per inference.")
@options.runtime
@options.threads
@click.option("--heatmaps", type=click.Path(file_okay=False), metavar="DIR",
              help="Draw each image and its anomaly map into this folder.")
@click.option("-0", "--null", is_flag=True, help="Paths on stdin end with NUL (find -print0).")
@options.verbosity
def score(model: str, paths: Tuple[str, ...], threshold: Optional[float], fail_above: Optional[float], batch_size: int,
          runtime: str, threads: Optional[int], heatmaps: Optional[str], null: bool) -> None:
    """Score images with an exported MODEL: one JSON line per image, as soon as it is known.

    PATH is an image, a folder, a dataset in MVTec layout or a manifest (CSV, JSONL). With `-`, or no PATH, paths come
    from stdin, one a line. The first line describes the run, the last one sums it up, with metrics when the layout
    tells labels. Scores count standard deviations above good images, whatever the class. An image that cannot be read
    becomes a line with `error`; the run goes on and exits with 1.

    \b
    Examples:
      uadtool score model.onnx photos/ | jq -r 'select(.anomalous) | .path'
      uadtool score model.onnx mvtec/ --heatmaps pictures > scores.jsonl
      find photos -print0 | uadtool score model.onnx - -0 --fail-above 6
    """
    if not paths:
        if sys.stdin.isatty():
            raise click.UsageError("Give a PATH, or paths on stdin.")
        paths = ("-",)
    if "-" in paths and len(paths) > 1:
        raise click.UsageError("Give either PATHs or -.")
    if null and paths != ("-",):
        raise click.UsageError("-0 is for paths on stdin.")

    from uadtool import scoring
    from uadtool.dataset import scoring_samples
    from uadtool.host import available_cores
    from uadtool.progress import Progress
    from uadtool.runtimes import open_model

    detector = open_model(model, threads, runtime, streams=threads or available_cores())
    total = None
    if paths == ("-",):
        samples = scoring_samples(_stdin_paths(b"\0" if null else b"\n"))
    else:
        listed = list(scoring_samples(paths))
        samples, total = iter(listed), len(listed)
    draw = None
    if heatmaps:
        from uadtool.reports.heatmap import Heatmaps

        draw = Heatmaps(heatmaps).draw
    images = 0
    errors: List[str] = []
    above: List[Tuple[float, str]] = []
    with Progress("score", total) as progress, \
            closing(scoring.score(detector, samples, threshold, batch_size, draw)) as records:
        for record in records:
            print(json.dumps(record, allow_nan=False), flush=True)
            if record["type"] != "image":
                continue
            images += 1
            if "error" in record:
                errors.append(record["error"])
            elif fail_above is not None and record["score"] > fail_above:
                above.append((record["score"], record["path"]))
            if not sys.stdout.isatty():  # on a terminal the lines show the progress
                progress.update()
    unscored = f"{len(errors)} of {images} images could not be scored; first: {errors[0]}" if errors else ""
    if above:
        if unscored:
            logging.getLogger("uadtool").error("error: %s", unscored)
        worst, path = max(above)
        raise GateFailed(f"{len(above)} of {images} images score above {fail_above:g}; worst: {path} with {worst:g}")
    if unscored:
        raise UadtoolError(unscored)
    if not images:
        raise UadtoolError("there was no image to score")


def _stdin_paths(separator: bytes) -> Iterator[str]:
    """Each path as soon as it is there."""
    # Not through sys.stdin: Python aborts at exit when a thread still waits for it.
    rest = b""
    while chunk := os.read(sys.stdin.fileno(), 1 << 16):
        *lines, rest = (rest + chunk).split(separator)
        yield from (os.fsdecode(line) for line in lines if line)
    if rest:
        yield os.fsdecode(rest)
