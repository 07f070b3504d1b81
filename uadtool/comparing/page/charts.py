"""The charts of the comparison page, each a self-contained SVG from plain numbers.

A model is known by its index. Its number in a ring, its colour and its dashes are the same on the whole page, so that
no information depends on colour only. Each chart also holds its content as text.
"""

import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from markupsafe import Markup

from uadtool.comparing.page import svg
from uadtool.comparing.page.svg import Scale, number

BINS = 32
"""Bins of a histogram."""

WIDTH = 480.0
"""Width of all charts but histograms, so that their text has one size."""

_BADGE_OFFSETS = ((-17, -13), (17, 13), (17, -13), (-17, 13), (17, 33), (37, 13))
"""Candidate places of a model's number beside its point: the points of similar models overlap."""


class Point(NamedTuple):
    """A model (its index) in the plane of cost and accuracy: ms, image AUROC and, if known, MB."""

    model: int
    name: str
    latency: float
    auroc: float
    size: Optional[float]

    def __str__(self) -> str:
        return f"{self.name}: {number(self.latency, 2)} ms, image AUROC {number(self.auroc, 4)}{self.size_text}"

    @property
    def size_text(self) -> str:
        """The file size after a comma, if known."""
        return f", {number(self.size, 1)} MB" if self.size else ""


def trade_off(points: Sequence[Point]) -> Markup:
    """Accuracy over latency; the area of a circle is the file size."""
    height = 420.0
    lowest, highest = (pick(point.auroc for point in points) for pick in (min, max))
    margin = max(0.02, 0.25 * (highest - lowest))
    x = Scale(0, 1.25 * max(point.latency for point in points), 48, WIDTH - 12)
    y = Scale(max(0.0, lowest - margin), min(1.0, highest + margin), height - 48, 34)
    largest = max(point.size or 0 for point in points) or 1
    discs = [(point, x(point.latency), y(point.auroc), max(5.0, 30 * ((point.size or 0) / largest) ** 0.5))
             for point in points]
    taken = [(cx - r, cy - r, cx + r, cy + r) for _, cx, cy, r in discs]
    marks: List[Markup] = []
    for point, cx, cy, r in sorted(discs, key=lambda disc: -disc[3]):  # small discs on top of large ones
        marks.append(svg.of_model(point.model, svg.circle(cx, cy, r, "disc"), title=str(point)))
        if r > 8:
            text = svg.shortened(point.name, 170) + point.size_text
            marks.append(svg.label(cx, cy + 4, str(point.model + 1), "middle", "strong"))
        else:
            text = f"{point.model + 1} {point.name}{point.size_text}"
        width = svg.LETTER * len(text)
        places = [(cx + r + 6, cy + 4), (cx - r - 6 - width, cy + 4), (cx - width / 2, cy - r - 6),
                  (cx - width / 2, cy + r + 16), (x.end - width, cy - r - 6), (x.end - width, cy + r + 16)]
        left, base = svg.free_place(places, width, taken, (x.start, WIDTH))
        taken.append((left, base - svg.SIZE, left + width, base + 4))
        marks.append(svg.label(left, base, text))
    return svg.drawing(
        WIDTH, height, "trade-off", "Accuracy over latency", "; ".join(map(str, points)),
        svg.y_axis(y, x.start, x.end, "mean image AUROC"), svg.x_axis(x, y.start, y.end, "latency p50, ms"), *marks,
    )


class _Blocks(NamedTuple):
    """The rows of a chart by class: for each class its name, and below it a row for each model."""

    models: int
    top: float = 26.0
    row: float = 14.0

    def start(self, index: int) -> float:
        """The upper edge of a class, by its index."""
        return self.top + index * (18 + self.row * self.models + 18)

    def middle(self, index: int, model: int) -> float:
        """The middle of a model's row in a class."""
        return self.start(index) + 18 + self.row * (model + 0.5)

    def name(self, index: int, x: float, text: str) -> Markup:
        """The name of a class."""
        return svg.label(x, self.start(index) + 12, svg.shortened(text, 380), style="strong halo")


IndexedNames = Sequence[Tuple[int, str]]
"""Models by index and name."""


def class_bars(classes: Sequence[str], models: IndexedNames, values: Sequence[Sequence[Optional[float]]]) -> Markup:
    """A bar for each class and model; ``values`` are [classes][models]. Bars start at 0.5, which is chance."""
    blocks = _Blocks(len(models))
    lowest = min([0.5, *(value for class_row in values for value in class_row if value is not None)])
    x = Scale(lowest if lowest == 0.5 else max(0.0, lowest - 0.05), 1, 26, WIDTH - 48)
    bottom = blocks.start(len(classes)) - 8
    marks: List[Markup] = []
    descriptions = [f"Values of {', '.join(name for _, name in models)}. "]
    for index, (class_name, class_row) in enumerate(zip(classes, values)):
        marks.append(blocks.name(index, x.start, class_name))
        texts = ["unknown" if value is None else number(value, 3) for value in class_row]
        descriptions.append(f"{class_name}: {', '.join(texts)}; ")
        for row, ((model, model_name), value, text) in enumerate(zip(models, class_row, texts)):
            y = blocks.middle(index, row)
            marks.append(svg.label(x.start - 20, y + 4, str(model + 1), style="soft"))
            if value is None:
                marks.append(svg.label(x(0.5) + 6, y + 4, text, style="soft"))
                continue
            left, right = sorted((x(0.5), x(value)))
            marks += [svg.of_model(model, svg.bar(left, y - 5.5, max(1.0, right - left), 11),
                                   title=f"{class_name}, {model_name}: {number(value, 4)}"),
                      svg.label(right + 6, y + 4, text, style="halo")]
    return svg.drawing(
        WIDTH, bottom + 40, "classes", "Image AUROC of each class", "".join(descriptions).rstrip("; "),
        svg.x_axis(x, bottom, blocks.top - 8, "image AUROC (0.5 is chance)"),
        *marks, svg.line(x(0.5), blocks.top - 8, x(0.5), bottom, "axis"),
    )


Change = Optional[Tuple[float, float, float]]
"""Low end, difference, high end."""


def class_changes(classes: Sequence[str], models: IndexedNames, changes: Sequence[Sequence[Change]],
                  confidence: float) -> Markup:
    """The change of each class and model with its interval, in the rows of ``class_bars``."""
    blocks = _Blocks(len(models))
    bounds = [0.0, *(bound for class_row in changes for change in class_row for bound in change or ())]
    margin = 0.06 * (max(bounds) - min(bounds)) or 0.01
    x = Scale(min(bounds) - margin, max(bounds) + margin, 26, WIDTH - 12)
    bottom = blocks.start(len(classes)) - 8
    marks: List[Markup] = []
    descriptions = []
    for index, (class_name, class_row) in enumerate(zip(classes, changes)):
        marks.append(blocks.name(index, x.start, class_name))
        for row, ((model, model_name), change) in enumerate(zip(models, class_row)):
            if not change:
                continue
            y, (low, difference, high) = blocks.middle(index, row), change
            text = (f"{class_name}, {model_name}: {number(difference, 4, '+')}, "
                    f"{confidence:.0%} interval {number(low, 4, '+')} to {number(high, 4, '+')}")
            descriptions.append(text)
            marks += [svg.label(x.start - 20, y + 4, str(model + 1), style="soft"),
                      svg.of_model(model, svg.line(x(low), y, x(high), y, "whisker"),
                                   svg.circle(x(difference), y, 4.5, "dot"), title=text)]
    return svg.drawing(
        WIDTH, bottom + 40, "changes", f"Change of image AUROC against {models[0][1]}", "; ".join(descriptions),
        svg.x_axis(x, bottom, blocks.top - 8, "change of image AUROC", sign="+"),
        svg.line(x(0), blocks.top - 8, x(0), bottom, "axis"), *marks,
    )


class Curve(NamedTuple):
    """The ROC curve of a model (its index). ``at_threshold`` is its false-positive rate and its recall."""

    model: int
    name: str
    false: np.ndarray
    true: np.ndarray
    auroc: float
    at_threshold: Tuple[float, float]

    def __str__(self) -> str:
        false, true = self.at_threshold
        return (f"{self.name}: AUROC {number(self.auroc, 3)}; at its threshold it finds {true:.0%} of the defective "
                f"images, with {false:.0%} of the good ones above it")


def roc(curves: Sequence[Curve]) -> Markup:
    """ROC curves of all images in one list, with each model's number at its threshold."""
    left, top, height = 44.0, 34.0, 420.0
    side = height - top - 48
    x, y = Scale(0, 1, left, left + side), Scale(0, 1, top + side, top)
    lines: List[Markup] = []
    thresholds: List[Markup] = []
    taken: List[Tuple[float, float]] = []
    for row, curve in enumerate(curves):
        points = [(x(float(false)), y(float(true))) for false, true in zip(curve.false, curve.true)]
        legend = y(0) - 14 - 20 * (len(curves) - 1 - row)
        lines += [
            svg.of_model(curve.model, svg.path(points, "curve"),
                         svg.path([(left + 126, legend), (left + 154, legend)], "curve")),
            svg.badge(left + 168, legend, curve.model),
            svg.label(left + 182, legend + 4, f"{svg.shortened(curve.name, 150)}, {number(curve.auroc, 3)}",
                      style="halo"),
        ]
        point = (x(curve.at_threshold[0]), y(curve.at_threshold[1]))
        places = [(point[0] + across, point[1] + down) for across, down in _BADGE_OFFSETS]
        place = next((place for place in places if x(0) + 8 <= place[0] <= x(1) and y(1) + 8 <= place[1] <= y(0)
                      and all(math.dist(place, other) > 16 for other in taken)), places[0])
        taken.append(place)
        thresholds += [svg.of_model(curve.model, svg.line(*point, *place, "leader"), svg.circle(*point, 4, "dot")),
                       svg.badge(*place, curve.model)]
    return svg.drawing(
        WIDTH, height, "roc", "ROC curves, all images in one list", "; ".join(map(str, curves)),
        svg.y_axis(y, left, left + side, "defective images found"), svg.x_axis(x, y.start, y.end, "good images above"),
        svg.line(x(0), y(0), x(1), y(1), "chance"), *lines, *thresholds,
    )


class Scores(NamedTuple):
    """The scores that a model (its index) gives the good and the defective images of a class, and its threshold.

    ``above`` and ``caught`` count the good and the defective images that it takes for anomalous.
    """

    model: int
    good: np.ndarray
    defective: np.ndarray
    threshold: float
    above: int
    caught: int


def histograms(name: str, title: str, models: Sequence[Scores]) -> Markup:
    """Score histograms, a panel for each model on a common axis: good images upwards, defective ones downwards.

    The last bin also counts scores far above the thresholds, which would otherwise squeeze the rest.
    """
    width, panel, head = 340.0, 80.0, 20.0
    everything = np.concatenate([scores for model in models for scores in (model.good, model.defective)])
    thresholds = [model.threshold for model in models]
    far = max(float(np.quantile(everything, 0.9)), 2.5 * max(thresholds))
    high = max(min(float(everything.max()), far), *thresholds)
    low = min(float(everything.min()), *thresholds)
    margin = 0.02 * (high - low) or 1.0
    x = Scale(low - margin, high + margin, 22, width - 4)
    edges = np.linspace(x.low, x.high, BINS + 1)
    shares = [[np.histogram(np.minimum(scores, high), edges)[0] / max(1, len(scores))
               for scores in (model.good, model.defective)] for model in models]
    tallest = max(share.max() for model_shares in shares for share in model_shares) or 1.0
    bottom = (panel + head) * len(models)
    marks: List[Markup] = []
    descriptions = []
    for row, (model, (good, defective)) in enumerate(zip(models, shares)):
        base = row * (panel + head) + head + panel / 2
        for style, share, direction in (("good", good, -1), ("defective", defective, 1)):
            if share.any():
                heights = [base + direction * (panel / 2 - 2) * float(value) / tallest for value in share]
                outline = svg.steps([x(float(edge)) for edge in edges], heights, base)
                marks.append(svg.path(list(outline), style, closed=True))
        descriptions.append(f"model {model.model + 1}: {model.above} of {len(model.good)} good above, "
                            f"{model.caught} of {len(model.defective)} defective above the threshold of "
                            f"{number(model.threshold, 2)}")
        at = x(model.threshold)
        marks += [
            svg.line(x.start, base, x.end, base, "axis"),
            svg.line(at, base - panel / 2, at, base + panel / 2, "threshold"),
            svg.badge(9, base, model.model),
            svg.label(x.end, base - panel / 2 - 5, f"above: {model.above}/{len(model.good)} good, "
                      f"{model.caught}/{len(model.defective)} defective", "end", "small"),
        ]
    clipped = float(everything.max()) > high
    marks += [svg.label(x(value), bottom + 16, text, "middle", "soft") for value, text in x.ticks(6)
              if not clipped or x(value) < x.end - 52]
    if clipped:
        marks.append(svg.label(x.end, bottom + 16, f"\u2265 {number(high, 1)}", "end", "soft"))
    return svg.drawing(width, bottom + 22, name, f"Scores of {title}", "; ".join(descriptions), *marks)
