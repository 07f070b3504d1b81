import contextlib
import csv
import io
import json
import logging
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, TextIO, Tuple

import click

from uadtool.cli import options
from uadtool.errors import GateFailed, UadtoolError
from uadtool.host import ending_signals
from uadtool.terminal import printable

COLUMNS = ("path", "class", "label", "score", "raw_score", "anomalous", "nearest_class", "milliseconds", "heatmap",
           "mask", "copy", "link", "error")
"""Of CSV."""

LONGEST_PATH = 1 << 20
"""Bytes on stdin after which what has no end is no path."""


def _shard(ctx: click.Context, param: click.Parameter, value: Optional[str]) -> Optional[Tuple[int, int]]:
    if value is None:
        return None
    index, slash, count = value.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise click.BadParameter(f"{value!r} is not I/N with I from 1 to N, 2/8 say")
    return int(index), int(count)


def _finite(ctx: click.Context, param: click.Parameter, value: Optional[float]) -> Optional[float]:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("not a finite number")
    return value


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("paths", metavar="[PATH...|-]", nargs=-1)
@click.option("--threshold", metavar="SCORE", type=float, callback=_finite,
              help="An image that scores above it is anomalous  [default: the model's]")
@click.option("--false-positive-rate", metavar="SHARE", type=click.FloatRange(0, 0.5),
              help="Instead: the threshold that this share of the good images held out at training exceeds.")
@click.option("--fail-above", type=float, callback=_finite, metavar="SCORE",
              help="Exit with 4 in the end if an image scores above it.")
@click.option("--fail-anomalous", is_flag=True, help="Exit with 4 in the end if an image is anomalous.")
@click.option("--batch-size", type=click.IntRange(1), metavar="N", default=1, show_default=True,
              help="Images per inference.")
@options.runtime
@options.threads
@click.option("--format", "layout", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True,
              help="csv: a line per image, and no others.")
@click.option("--heatmaps", type=click.Path(file_okay=False), metavar="DIR",
              help="Draw each image and its anomaly map into this folder.")
@click.option("--masks", type=click.Path(file_okay=False), metavar="DIR",
              help="Write where each image is anomalous, white on black and as large as the image.")
@click.option("--contact-sheet", type=click.Path(dir_okay=False), metavar="FILE",
              help="Draw the most suspicious images of the run into one picture (.png).")
@click.option("--top", type=click.IntRange(1, 500), metavar="N", default=24, show_default=True,
              help="How many images --contact-sheet shows.")
@click.option("--copy-anomalous", type=click.Path(file_okay=False), metavar="DIR",
              help="Copy anomalous images into this folder.")
@click.option("--link-anomalous", type=click.Path(file_okay=False), metavar="DIR",
              help="Put symbolic links to anomalous images into this folder.")
@click.option("--follow", is_flag=True,
              help="PATH is a folder: score each image that appears in it from now on, until Ctrl-C.")
@click.option("--shard", metavar="I/N", callback=_shard,
              help="Score each N-th image alone, from the I-th on; compare merges the N runs.")
@click.option("--ray", metavar="ADDRESS",
              help="Score on the Ray cluster there (HOST:PORT; auto: that of this machine; local: a new one).")
@click.option("-0", "--null", is_flag=True, help="Paths on stdin end with NUL (find -print0).")
@options.verbosity
@click.pass_context
def score(ctx: click.Context, model: str, paths: Tuple[str, ...], threshold: Optional[float],
          false_positive_rate: Optional[float], fail_above: Optional[float], fail_anomalous: bool, batch_size: int,
          runtime: str, threads: Optional[int], layout: str, heatmaps: Optional[str], masks: Optional[str],
          contact_sheet: Optional[str], top: int, copy_anomalous: Optional[str], link_anomalous: Optional[str],
          follow: bool, shard: Optional[Tuple[int, int]], ray: Optional[str], null: bool) -> None:
    """Score images with an exported MODEL: one JSON line per image, as soon as it is known.

    PATH is an image, a folder, a dataset in MVTec layout or a manifest (CSV, JSONL), here or at a URL (s3://, gs://;
    extra `remote`). With `-`, or no PATH, paths come from stdin, one a line. The first line describes the run, the last
    one sums it up, with metrics when the layout tells labels. Scores count standard deviations above good images,
    whatever the class. An image that cannot be read becomes a line with `error`; the run goes on and exits with 1.

    \b
    Examples:
      uadtool score model.onnx photos/ | jq -r 'select(.anomalous) | .path'
      uadtool score model.onnx mvtec/ --heatmaps pictures > scores.jsonl
      find photos -print0 | uadtool score model.onnx - -0 --fail-above 6
      uadtool score model.onnx --follow incoming/ --copy-anomalous suspicious/
      uadtool score model.onnx s3://line-3/photos --shard 2/8 > 2.jsonl
    """
    if follow and len(paths) != 1:
        raise click.UsageError("--follow takes one folder.")
    if not paths:
        if sys.stdin.isatty():
            raise click.UsageError("Give a PATH, or paths on stdin.")
        paths = ("-",)
    if "-" in paths and len(paths) > 1:
        raise click.UsageError("Give either PATHs or -.")
    if null and paths != ("-",):
        raise click.UsageError("-0 is for paths on stdin.")
    if threshold is not None and false_positive_rate is not None:
        raise click.UsageError("--threshold and --false-positive-rate exclude each other.")
    if fail_anomalous and fail_above is not None:
        raise click.UsageError("--fail-above and --fail-anomalous exclude each other.")
    folders = [Path(one).resolve() for one in (heatmaps, masks, copy_anomalous, link_anomalous) if one]
    if len(set(folders)) < len(folders):
        raise click.UsageError("Give each of --heatmaps, --masks, --copy-anomalous, --link-anomalous its own folder.")
    if not contact_sheet and options.given(ctx, "top"):
        raise click.UsageError("--top is of --contact-sheet.")
    if follow and (shard or ray):
        raise click.UsageError("--follow is for one process: leave out --shard and --ray.")
    if ray and threads:
        raise click.UsageError("--ray takes a core for each image: leave out --threads.")
    if follow and batch_size > 1:
        raise click.UsageError("--follow answers images one by one: leave out --batch-size.")
    if follow and any(Path(paths[0]).resolve() in (one, *one.parents) for one in folders):
        raise click.UsageError("What is written into a folder that is followed would be scored again: write elsewhere.")

    from uadtool.data.dataset import scoring_samples
    from uadtool.files import check_writable
    from uadtool.host import available_cores
    from uadtool.progress import Progress
    from uadtool.runtimes.opening import open_model
    from uadtool.scoring import records as scoring

    # One image after the other is answered soonest by all cores together, many images by each core alone.
    detector = open_model(model, threads, runtime, streams=1 if follow else threads or available_cores())
    if false_positive_rate is not None:
        threshold = _threshold_at(detector.metadata, false_positive_rate, model)
    if fail_anomalous:
        fail_above = detector.metadata.threshold if threshold is None else threshold
    total = None
    if follow:
        samples = scoring_samples(_watched(paths[0]), strict=False)
    elif paths == ("-",):
        samples = scoring_samples(_stdin_paths(b"\0" if null else b"\n"), strict=False)
    else:
        listed = list(scoring_samples(paths))
        samples, total = iter(listed), len(listed[shard[0] - 1::shard[1]]) if shard else len(listed)
    outputs: List[Any] = []
    if heatmaps:
        from uadtool.scoring.heatmaps import Heatmaps

        outputs.append(Heatmaps(heatmaps))
    if masks:
        from uadtool.scoring.image_files import Masks

        outputs.append(Masks(masks))
    for directory, link in ((copy_anomalous, False), (link_anomalous, True)):
        if directory:
            from uadtool.scoring.image_files import AnomalousImages

            outputs.append(AnomalousImages(directory, link))
    sheet = None
    if contact_sheet:
        from uadtool.scoring.contact_sheet import ContactSheet

        check_writable(contact_sheet, [model])
        sheet = ContactSheet(contact_sheet, top)
        outputs.append(sheet)
    stdout = sys.stdout  # a cluster's client prints to what has this name
    write = _json_writer(stdout) if layout == "jsonl" else _csv_writer(stdout)
    images = errors = above = 0
    first_error, worst = "", (-math.inf, "")
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(_cluster(ray, detector)) if ray else None
        records = stack.enter_context(contextlib.closing(scoring.score(
            detector, samples, threshold, batch_size, [one.add for one in outputs], shard, cluster)))
        progress = stack.enter_context(Progress("score", total))
        for record in records:
            write(record)
            if record["type"] != "image":
                continue
            images += 1
            if "error" in record:
                errors += 1
                first_error = first_error or record["error"]
            elif fail_above is not None and record["score"] > fail_above:
                above += 1
                worst = max(worst, (record["score"], record["path"]))
            if not stdout.isatty():  # on a terminal the lines show the progress
                progress.update()
    if sheet:
        sheet.save()
    unscored = f"{errors} of {images} images could not be scored; first: {first_error}" if errors else ""
    if above:
        if unscored:
            logging.getLogger("uadtool").error("error: %s", unscored)
        raise GateFailed(f"{above} of {images} images score above {fail_above:g}; worst: {worst[1]} with {worst[0]:g}")
    if unscored:
        raise UadtoolError(unscored)
    if not images and not follow and not shard:
        raise UadtoolError("there was no image to score")


def _cluster(address: str, detector: Any) -> Any:
    from uadtool.scoring.cluster import connected

    return connected(address, detector)


def _threshold_at(metadata: Any, false_positive_rate: float, model: str) -> float:
    from uadtool.scoring.thresholds import threshold_at

    if not metadata.good_scores:
        raise UadtoolError(f"{model} does not hold the scores of good images; train or quantize it again, or give a "
                           "--threshold")
    return threshold_at(metadata.good_scores, false_positive_rate)


def _watched(folder: str) -> Iterator[str]:
    """The images that appear in the folder, until an interrupt."""
    from uadtool.data.watch import Watch

    watch = Watch(folder)
    for number in (signal.SIGINT, *ending_signals()):
        signal.signal(number, lambda *_: watch.stop())
    return iter(watch)


def _json_writer(stdout: TextIO) -> Callable[[Dict[str, Any]], None]:
    def write(record: Dict[str, Any]) -> None:
        if stdout.isatty():
            record.pop("pixels", None)  # kilobytes that no eye reads
        print(json.dumps(record, allow_nan=False), file=stdout, flush=True)

    return write


def _csv_writer(stdout: TextIO) -> Callable[[Dict[str, Any]], None]:
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="surrogateescape")  # names are bytes
    line = io.StringIO(newline="")
    writer = csv.DictWriter(line, COLUMNS, extrasaction="ignore")  # ends lines with CR LF, and so quotes both in names

    def flush() -> None:
        stdout.write(line.getvalue()[:-2] + "\n")
        stdout.flush()
        line.seek(0)
        line.truncate()

    writer.writeheader()
    flush()

    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and stdout.isatty() else value

    def write(record: Dict[str, Any]) -> None:
        if record["type"] == "image":
            writer.writerow({name: shown(value) for name, value in record.items()})
            flush()

    return write


def _stdin_paths(separator: bytes) -> Iterator[str]:
    """Each path as soon as it is there."""
    # Not through sys.stdin: Python aborts at exit when a thread still waits for it.
    rest = b""
    while chunk := os.read(sys.stdin.fileno(), 1 << 16):
        if len(rest) > LONGEST_PATH:
            raise UadtoolError("stdin is no list of paths: a line does not end; after find -print0 give -0")
        *lines, rest = (rest + chunk).split(separator)
        yield from (os.fsdecode(line) for line in lines if line)
    if rest:
        yield os.fsdecode(rest)
