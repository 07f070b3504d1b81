import contextlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import click

from uadtool.cli import options, sources
from uadtool.errors import GateFailed, UadtoolError
from uadtool.host import available_cores
from uadtool.terminal import log

COMMON = "common"
"""The ``--threshold`` that is one for all classes."""


def _threshold(ctx: click.Context, param: click.Parameter, value: Optional[str]) -> Union[float, str, None]:
    if value in (None, COMMON):
        return value
    try:
        return _finite(ctx, param, float(str(value)))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a score nor '{COMMON}'") from error


def _finite(ctx: click.Context, param: click.Parameter, value: Optional[float]) -> Optional[float]:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("not a finite number")
    return value


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("paths", metavar="[PATH...|-]", nargs=-1)
@click.option("--threshold", metavar="SCORE|common", callback=_threshold,
              help="Score above which an image of any class is anomalous; common: the model's one for all classes  "
                   "[default: the model's, by class]")
@options.threshold_from
@click.option("--false-positive-rate", metavar="SHARE", type=options.Share(0, 0.5),
              help="Choose the thresholds that this share of good images exceeds: of those held out in training, or of "
                   "those of --threshold-from.")
@click.option("--fail-above", type=float, callback=_finite, metavar="SCORE",
              help="Exit with 4 in the end if an image scores above SCORE.")
@click.option("--fail-anomalous", is_flag=True, help="Exit with 4 in the end if an image is anomalous.")
@click.option("--batch-size", type=click.IntRange(1), metavar="N", default=1, show_default=True,
              help="Images per inference.")
@options.runtime
@options.threads
@click.option("--format", "layout", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True,
              help="Output format; csv only has a line per image.")
@click.option("--heatmaps", type=click.Path(file_okay=False), metavar="DIR",
              help="Draw each image and its anomaly map into this folder.")
@click.option("--masks", type=click.Path(file_okay=False), metavar="DIR",
              help="Write the anomalous pixels of each image into this folder, white on black, in the image's size.")
@click.option("--regions", is_flag=True,
              help="Add the anomalous regions of anomalous images to their lines, as boxes in pixels of the image.")
@click.option("--contact-sheet", type=click.Path(dir_okay=False), metavar="FILE",
              help="Draw the images with the highest scores into one picture (.png, .jpg, .webp).")
@click.option("--top", type=click.IntRange(1, 500), metavar="N", default=24, show_default=True,
              help="Number of images on the contact sheet.")
@click.option("--pictures", type=click.Choice(["all", "anomalous"]), default="all", show_default=True,
              help="Images that --heatmaps and --masks are about.")
@click.option("--copy-anomalous", type=click.Path(file_okay=False), metavar="DIR",
              help="Copy anomalous images into this folder.")
@sources.source_options
@options.max_pixels
@options.verbosity
@click.pass_context
def score(ctx: click.Context, /, **values: Any) -> None:
    """Score images with an exported MODEL: one JSON line per image, as soon as it is known.

    PATH is an image, a folder, a data set in MVTec layout or a manifest (CSV, JSONL), local or at a URL (s3://, gs://;
    extra `remote`). With `-` or no PATH, paths come from stdin, one per line. The first line of the output describes
    the run. The last line summarizes it, with metrics if the layout gives labels. A score is in standard deviations
    above good images, for every class. An image that cannot be read becomes a line with `error`; the run goes on and
    exits with 1.

    \b
    Examples:
      uadtool score model.onnx photos/ | jq -r 'select(.anomalous == true) | .path'
      uadtool score model.onnx mvtec/ --heatmaps pictures > scores.jsonl
      find photos -print0 | uadtool score model.onnx - -0 --fail-above 6
      uadtool score model.onnx --follow incoming/ --copy-anomalous suspicious/
      ffmpeg -i rtsp://camera -f image2pipe -c:v mjpeg - | uadtool score model.onnx --frames --latest
      uadtool score model.onnx s3://line-3/photos --shard 2/8 > 2.jsonl
    """
    arguments = SimpleNamespace(**values)
    sources.check_source(ctx, arguments)
    _check_usage(ctx, arguments)
    # Imported here and below, as needed: NumPy would slow down --help, and drawing would slow down scoring.
    from uadtool.cli.lines import csv_writer, end_line, json_writer
    from uadtool.progress import Progress
    from uadtool.runtimes.opening import open_model
    from uadtool.scoring.records import score as score_images

    # All cores together answer one image soonest; one core for each image scores many images soonest.
    streams = 1 if arguments.follow or arguments.latest else arguments.threads or available_cores()
    detector = open_model(arguments.model, arguments.threads, arguments.runtime, streams)
    thresholds = _thresholds(arguments, detector.metadata)
    source = sources.open_source(arguments)
    outputs, sheet = _outputs(arguments)
    stdout = sys.stdout  # while a cluster is connected, sys.stdout is another file
    if arguments.done:
        end_line(arguments.done, stdout)
    write = json_writer(stdout) if arguments.layout == "jsonl" else csv_writer(stdout)
    result = Result(arguments.fail_anomalous, arguments.fail_above)
    with contextlib.ExitStack() as stack:
        cluster = None
        if arguments.ray:
            from uadtool.scoring.cluster import connected

            cluster = stack.enter_context(connected(arguments.ray, detector))
        records = stack.enter_context(contextlib.closing(score_images(
            detector, source.samples, thresholds, arguments.batch_size, outputs, arguments.shard, cluster,
            workers=1 if arguments.latest else None,  # a frame that waits for another one grows old
            drift=stack.enter_context(sources.drift_watch(arguments, detector)))))
        progress = stack.enter_context(Progress("score", source.total))
        for record in records:
            if source.dropped and record["type"] == "summary":
                record["dropped"] = source.dropped()
            write(record)
            if record["type"] == "image":
                result.add(record)
                if not stdout.isatty():  # on a terminal the lines show the progress
                    progress.update()
    if sheet:
        sheet.save()
    result.check(arguments.follow or (arguments.frames and result.scored > 0),
                 may_be_empty=arguments.follow or arguments.shard is not None)


def _check_usage(ctx: click.Context, arguments: SimpleNamespace) -> None:
    directories = arguments.heatmaps, arguments.masks, arguments.copy_anomalous
    folders = [Path(directory).resolve() for directory in directories if directory]
    followed = {Path(path).resolve() for path in arguments.paths if arguments.follow}
    options.refuse(
        (isinstance(arguments.threshold, float) and (arguments.false_positive_rate is not None
                                                     or arguments.threshold_from),
         "--threshold SCORE leaves nothing to --false-positive-rate and --threshold-from; leave one out."),
        (arguments.fail_anomalous and arguments.fail_above is not None,
         "--fail-above and --fail-anomalous are mutually exclusive."),
        (len(set(folders)) < len(folders), "Give each of --heatmaps, --masks and --copy-anomalous its own folder."),
        (not arguments.contact_sheet and options.given(ctx, "top"), "--top requires --contact-sheet."),
        (not (arguments.heatmaps or arguments.masks) and options.given(ctx, "pictures"),
         "--pictures requires --heatmaps or --masks."),
        (arguments.contact_sheet and not _is_picture(arguments.contact_sheet),
         f"{arguments.contact_sheet} must end with .png, .jpg or .webp."),
        (any(followed & {folder, *folder.parents} for folder in folders),
         "Pictures in the followed folder would be scored again; write them elsewhere."),
    )


def _is_picture(name: str) -> bool:
    from uadtool.scoring.contact_sheet import FORMATS

    return Path(name).suffix.lower() in FORMATS


def _thresholds(arguments: SimpleNamespace, metadata: Any) -> Any:
    from uadtool.scoring.thresholds import Thresholds, warn_of_few

    rate, thresholds = arguments.false_positive_rate, Thresholds.of_model(metadata)
    if isinstance(arguments.threshold, float):
        return thresholds._replace(common=arguments.threshold, by_class={}, rate=None)
    if arguments.threshold_from:
        from uadtool.comparing.good_images import good_scores

        rate = metadata.false_positive_rate if rate is None else rate
        thresholds = Thresholds.at(rate, good_scores(arguments.threshold_from, metadata, rate))
    elif rate is not None:
        if not any(metadata.good_scores.values()):
            raise UadtoolError(f"{arguments.model} does not hold the scores of good images; train or quantize it "
                               "again, or give --threshold-from")
        warn_of_few(sum(map(len, metadata.good_scores.values())), rate)
        thresholds = Thresholds.at(rate, metadata.good_scores)
    return thresholds._replace(by_class={}) if arguments.threshold == COMMON else thresholds


def _outputs(arguments: SimpleNamespace) -> Tuple[List[Any], Any]:
    """The writers of pictures and copies; and of these the contact sheet or None, since it is saved at the end."""
    wanted = "heatmaps", "masks", "copy_anomalous", "contact_sheet", "regions"
    if not any(getattr(arguments, name) for name in wanted):
        return [], None
    from uadtool.scoring.contact_sheet import ContactSheet
    from uadtool.scoring.heatmaps import Heatmaps
    from uadtool.scoring.image_files import AnomalousImages, Masks
    from uadtool.scoring.regions import regions_of

    # Such runs go on with a folder, or share it.
    keep = arguments.follow or arguments.frames or arguments.shard is not None
    outputs = [kind(directory, keep).add for kind, directory in (
        (Heatmaps, arguments.heatmaps), (Masks, arguments.masks)) if directory]
    if arguments.pictures == "anomalous":
        outputs = [_if_anomalous(output) for output in outputs]
    if arguments.copy_anomalous:
        outputs.append(AnomalousImages(arguments.copy_anomalous, keep).add)
    if arguments.regions:
        outputs.append(regions_of)
    sheet = None
    if arguments.contact_sheet:
        options.claim(arguments.contact_sheet, [arguments.model])
        sheet = ContactSheet(arguments.contact_sheet, arguments.top)
        outputs.append(sheet.add)
    return outputs, sheet


def _if_anomalous(output: Callable[..., Dict[str, Any]]) -> Callable[..., Dict[str, Any]]:
    return lambda record, anomaly_map: output(record, anomaly_map) if record["anomalous"] else {}


class Result:
    """Counts the images of a run.

    Args:
        fail_anomalous: no image may be anomalous.
        limit: the score that no image may exceed, or None.
    """

    def __init__(self, fail_anomalous: bool, limit: Optional[float]) -> None:
        self._fail_anomalous, self._limit = fail_anomalous, limit
        self._images = self._errors = self._above = 0
        self._first_error, self._worst = "", (-math.inf, "")

    def add(self, record: Dict[str, Any]) -> None:
        self._images += 1
        if "error" in record:
            self._errors += 1
            self._first_error = self._first_error or record["error"]
        elif record["anomalous"] if self._fail_anomalous else self._limit is not None and record["score"] > self._limit:
            self._above += 1
            self._worst = max(self._worst, (record["score"], record["path"]))

    @property
    def scored(self) -> int:
        """Number of images with a score."""
        return self._images - self._errors

    def check(self, may_have_errors: bool, may_be_empty: bool) -> None:
        """Raise the error that the run ends with, if any."""
        unscored = f"{self._errors} of {self._images} images could not be scored; first: {self._first_error}"
        if self._above:
            if self._errors:
                log.error("error: %s", unscored)
            finding = "are anomalous" if self._limit is None else f"score above {self._limit:g}"
            raise GateFailed(f"{self._above} of {self._images} images {finding}; worst: {self._worst[1]} with "
                             f"{self._worst[0]:g}")
        if self._errors and may_have_errors:
            log.warning("%s", unscored)
        elif self._errors:
            raise UadtoolError(unscored)
        if not self._images and not may_be_empty:
            raise UadtoolError("no images to score")
