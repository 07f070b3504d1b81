"""The charts of a comparison, each with a title and a caption."""

from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from markupsafe import Markup

from uadtool.comparing.comparison import Model
from uadtool.comparing.page import charts
from uadtool.comparing.results import Result, ScoredImage
from uadtool.scoring.metrics import roc_curve

PANELS = 120
"""Panels or rows that a chart by class draws at most, for the first classes. The table has all classes."""

Record = Dict[str, Any]


class Figure(NamedTuple):
    title: str
    caption: str
    drawing: Markup


def accuracy_figures(models: Sequence[Model], record: Record) -> List[Figure]:
    """Accuracy over latency, ROC curves, and the image AUROC of each class with its change; those with data."""
    return [*_trade_off(models, record), *_roc(models), *_classes(models, record)]


def _trade_off(models: Sequence[Model], record: Record) -> Iterator[Figure]:
    rows = {row["metric"]: row["values"] for row in record["rows"]}
    unknown = [None] * len(models)
    points, left_out = [], []
    for index, (model, latency, auroc, size) in enumerate(zip(
            models, *(rows.get(metric, unknown) for metric in ("latency_p50", "image_auroc", "file_size")))):
        if latency is None or auroc is None:
            left_out.append(model.label)
        else:
            points.append(charts.Point(index, model.label, latency, auroc, size))
    if points:
        missing = f" Without latency or labels: {', '.join(left_out)}." if left_out else ""
        yield Figure("Accuracy over latency", "Up and to the left is better. The area of a circle is the file size."
                     + missing, charts.trade_off(points))


def _roc(models: Sequence[Model]) -> Iterator[Figure]:
    curves = [_curve(index, model.label, model.scores) for index, model in enumerate(models)
              if model.scores and "image_auroc.pooled" in model.scores.values]
    if curves:
        yield Figure("ROC", "All images in one list, for one threshold after another. The numbered point is the "
                     "verdicts; with thresholds for the classes it may lie beside the curve.", charts.roc(curves))


def _curve(index: int, label: str, result: Result) -> charts.Curve:
    good, defective = _split(result.images.values())
    labels = [False] * len(good) + [True] * len(defective)
    false, true = roc_curve(labels, [image.score for image in good + defective])
    return charts.Curve(index, label, false, true, result.values["image_auroc.pooled"],
                        (_above(good) / len(good), _above(defective) / len(defective)))


def _split(images: Iterable[ScoredImage]) -> Tuple[List[ScoredImage], List[ScoredImage]]:
    """The good and the defective images."""
    images = list(images)
    good, defective = ([image for image in images if image.label == label] for label in ("good", "anomalous"))
    return good, defective


def _above(images: Iterable[ScoredImage]) -> int:
    return sum(image.anomalous for image in images)


def _classes(models: Sequence[Model], record: Record) -> Iterator[Figure]:
    """Image AUROC and its change: the mean and each class."""
    rows = [row for row in record["rows"]
            if row["metric"] == "image_auroc" or (row["metric"].startswith("image_auroc.") and "class" in row)]
    columns = [index for index in range(len(models)) if any(row["values"][index] is not None for row in rows)]
    if not columns:
        return
    shown = rows[:max(2, PANELS // len(columns))]
    more = f" The first {len(shown) - 1} of {len(rows) - 1} classes." if len(shown) < len(rows) else ""
    names = [(index, models[index].label) for index in columns]
    classes = [row.get("class", "Mean") for row in shown]
    yield Figure("Image AUROC of each class", f"A bar for each model, by its number.{more}",
                 charts.class_bars(classes, names, [[row["values"][index] for index in columns] for row in shown]))
    if any("intervals" in row for row in shown):
        confidence = record["confidence"]
        changes = [[_change(row, index) for index in columns] for row in shown]
        yield Figure(f"Change against {models[0].label}",
                     f"With {confidence:.0%} bootstrap intervals. A change whose interval contains zero may be chance.",
                     charts.class_changes(classes, names, changes, confidence))


def _change(row: Record, index: int) -> charts.Change:
    interval = row["intervals"][index] if "intervals" in row else None
    return (interval[0], row["changes"][index], interval[1]) if interval else None


def _scores(index: int, result: Result, name: Optional[str]) -> charts.Scores:
    """The scores of the images of a class."""
    good, defective = _split(image for image in result.images.values() if image.class_name == name)
    scores = (np.array([image.score for image in images]) for images in (good, defective))
    return charts.Scores(index, next(scores), next(scores), result.thresholds.of(name or ""), _above(good),
                         _above(defective))


def score_figures(models: Sequence[Model]) -> Tuple[List[Figure], int]:
    """Score histograms of the first classes, and the number of all classes. Images without a class are a class."""
    results = [(index, model.scores) for index, model in enumerate(models) if model.scores]
    classes = sorted({name for _, result in results for _, name in result.truth.values()}, key=lambda name: name or "")
    figures = []
    for place, name in enumerate(classes[:max(1, PANELS // max(1, len(results)))]):
        scores = [_scores(index, result, name) for index, result in results]
        scores = [model for model in scores if len(model.good) or len(model.defective)]
        good, defective = max(len(model.good) for model in scores), max(len(model.defective) for model in scores)
        title = name or "without a class"
        figures.append(Figure(title, f"{good} good, {defective} defective",
                              charts.histograms(f"scores-{place}", title, scores)))
    return figures, len(classes)
