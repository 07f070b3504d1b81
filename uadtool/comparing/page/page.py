"""A comparison as one HTML page: table, charts, images and provenance, in one file that needs nothing else.

Its size does not grow with the number of images: it holds histograms, thinned curves, and thumbnails of at most 18
images and their anomaly maps.
"""
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from uadtool.comparing.comparison import Model
from uadtool.comparing.gates import Verdict
from uadtool.comparing.page.figures import accuracy_figures, score_figures
from uadtool.comparing.page.svg import model_style, number
from uadtool.comparing.page.thumbnails import Group, disagreements, map_thumbnails, thumbnail
from uadtool.comparing.results import Result
from uadtool.comparing.table import DECIMALS
from uadtool.terminal import log

KEY_METRICS = {"image_auroc": "Image AUROC", "aupro": "AUPRO", "latency_p50": "Latency p50", "energy": "Energy",
               "file_size": "File size"}
"""Metrics on the card of each model."""

FOLDER = Path(__file__).parent


Record = Dict[str, Any]


class Cell(NamedTuple):
    """A figure as text, empty if not measured, and its change against the first model.

    ``arrow`` and ``verdict`` (better or worse) are empty unless the ``interval`` of the change excludes zero.
    """

    value: str
    change: str
    arrow: str
    verdict: str
    interval: str


class Row(NamedTuple):
    """A row of the table, with a cell for each model."""

    label: str
    unit: str
    cells: List[Cell]


def as_html(models: Sequence[Model], record: Record, verdicts: Sequence[Verdict]) -> str:
    """The page of a ``uadtool.compare/1`` record about ``models``, with the verdicts of gates, if any."""
    rows = {row["metric"]: _row(row) for row in record["rows"]}
    histograms, classes = score_figures(models)
    groups = [group for group in disagreements(models) if group.total]
    images = [image for group in groups for image in group.images]
    pictures = {image: thumbnail(image.path, image.boxes) for image in set(images)}
    maps = map_thumbnails(images)
    embedded = len({image.path for image, picture in pictures.items() if picture})
    if embedded:
        log.info("the page holds thumbnails of %d images", embedded)

    def most_pictures(group: Group) -> int:
        return 1 + max(len(maps[image]) for image in group.images)

    environment = Environment(loader=FileSystemLoader(str(FOLDER)), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.jinja").render(
        models=models, record=record, verdicts=verdicts, subject=_subject(models),
        cards=[(label, rows[metric]) for metric, label in KEY_METRICS.items() if metric in rows],
        table=[(title, [rows[name] for name in names]) for title, names in _sections(record["rows"]).items() if names],
        with_interval=[any(row.cells[index].interval for row in rows.values()) for index in range(len(models))],
        accuracy=accuracy_figures(models, record), histograms=histograms, classes=classes,
        groups=groups, pictures=pictures, maps=maps, most_pictures=most_pictures,
        maps_missing=any(len(maps[image]) < len(image.heatmaps) for image in images),
        numbers={model.label: index for index, model in enumerate(models)},
        css=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        breakable=_breakable, model_style=model_style, number=number, precision=_precision,
    )


def _row(row: Record) -> Row:
    label = row.get("class") or row["label"][:1].upper() + row["label"][1:]
    intervals = row.get("intervals") or [None] * len(row["values"])
    return Row(label, row["unit"], [_cell(row, *figures) for figures in zip(row["values"], row["changes"], intervals)])


def _cell(row: Record, value: Optional[float], change: Optional[float], interval: Optional[Sequence[float]]) -> Cell:
    digits = DECIMALS[row["unit"]]
    change_text = arrow = verdict = interval_text = ""
    if change is not None:
        change_text = f"{change:.2f}×" if row["change"] == "ratio" else number(change, digits, "+")
    if interval:
        interval_text = f"{number(interval[0], 4, '+')} to {number(interval[1], 4, '+')}"
    if change is not None and interval and (interval[0] > 0 or interval[1] < 0):
        arrow = "▲" if change > 0 else "▼"
        verdict = "better" if (interval[0] > 0) == (row["better"] == "higher") else "worse"
    return Cell("" if value is None else number(value, digits), change_text, arrow, verdict, interval_text)


def _sections(rows: Sequence[Record]) -> Dict[str, List[str]]:
    """The metrics of the table below their headings."""
    by_class = {title: [row["metric"] for row in rows if "class" in row and row["metric"].startswith(f"{name}.")]
                for name, title in (("image_auroc", "Image AUROC of each class"), ("recall", "Recall of each class"),
                                    ("false_positive_rate", "False-positive rate of each class"))}
    return {"Accuracy": [row["metric"] for row in rows if row["change"] == "difference" and "class" not in row],
            **by_class,
            "Speed and size": [row["metric"] for row in rows if row["change"] == "ratio"]}


def _subject(models: Sequence[Model]) -> str:
    truths = [model.scores.truth for model in models if model.scores]
    truth = max(truths, key=len, default={})
    reference = f"Each model is compared with the first, {models[0].label}." if len(models) > 1 else ""
    if not truth:
        return reference or "Speed and size, without labelled scores."
    classes = {name for _, name in truth.values() if name}
    defective = sum(anomalous for anomalous, _ in truth.values())
    images = f"{len(truth):,} images" + (f" of {len(classes)} classes" if len(classes) > 1 else "")
    return f"{images}, {len(truth) - defective:,} good and {defective:,} defective. {reference}"


def _precision(result: Result) -> str:
    quantization = result.quantization
    if not quantization:
        return str(result.model["precision"])
    in_float = f", {quantization['float_layers']} layers in float" if quantization.get("float_layers") else ""
    return (f"{result.model['precision']}: {quantization.get('method')}, {quantization.get('calibration')} on "
            f"{quantization.get('source')}{in_float}")


def _breakable(label: str) -> List[str]:
    """The label in parts, after each of which a line may end: each part but the last ends with punctuation."""
    return re.findall(r"[^-_/. ]*[-_/. ]|[^-_/. ]+", label)
