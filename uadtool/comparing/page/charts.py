"""The charts of the comparison page, each a self-contained SVG from plain numbers.

Models come by their index: its number in a ring, its colour and its dashes are the same in the whole page, so nothing
is told by colour alone. Each chart holds what it shows as text, too.
"""

import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from uadtool.comparing.page import svg
from uadtool.comparing.page.markup import Markup, join, tag
from uadtool.comparing.page.svg import Scale, number

BINS = 32
"""Of a histogram."""

WIDTH = 480.0
"""Of all charts but histograms, so that their letters are of one size."""


_BESIDE = ((-17, -13), (17, 13), (17, -13), (-17, 13), (17, 33), (37, 13))
"""Where the number of a point may stand: points of similar models lie on each other."""


class Point(NamedTuple):
    """A model (its index) in the plane of cost and accuracy: ms, image AUROC and, if known, MB."""

    model: int
    name: str
    latency: float
    auroc: float
    size: Optional[float]


def trade_off(points: Sequence[Point]) -> Markup:
    """Accuracy over latency; the area of a circle is the file size."""
    width, height = WIDTH, 420.0
    lowest, highest = (pick(point.auroc for point in points) for pick in (min, max))
    margin = max(0.02, 0.25 * (highest - lowest))
    x = Scale(0, 1.25 * max(point.latency for point in points), 48, width - 12)
    y = Scale(max(0.0, lowest - margin), min(1.0, highest + margin), height - 48, 34)
    largest = max((point.size or 0 for point in points), default=0) or 1
    circles = [(point, x(point.latency), y(point.auroc), max(5.0, 30 * ((point.size or 0) / largest) ** 0.5))
               for point in points]
    taken = [(cx - r, cy - r, cx + r, cy + r) for _, cx, cy, r in circles]
    marks: List[str] = []
    for point, cx, cy, r in sorted(circles, key=lambda circle: -circle[3]):  # small ones above large ones
        size = f", {number(point.size, 1)} MB" if point.size else ""
        text = f"{svg.shortened(point.name, 170)}{size}" if r > 8 else f"{point.model + 1} {point.name}{size}"
        wide = svg.width_of(text)
        places = [(cx + r + 6, cy + 4), (cx - r - 6 - wide, cy + 4), (cx - wide / 2, cy - r - 6),
                  (cx - wide / 2, cy + r + 16), (x.end - wide, cy - r - 6), (x.end - wide, cy + r + 16)]
        left, base = svg.free_place(places, wide, taken, (x.start, width))
        taken.append((left, base - svg.SIZE, left + wide, base + 4))
        marks += [
            tag("g", tag("circle", tag("title", _told(point)), cx=cx, cy=cy, r=r, class_="disc"),
                class_=svg.model_class(point.model)),
            svg.label(cx, cy + 4, str(point.model + 1), "middle", "strong") if r > 8 else "",
            svg.label(left, base, text),
        ]
    return svg.drawing(
        width, height, "trade-off", "Accuracy over latency", "; ".join(map(_told, points)),
        svg.y_axis(y, x.start, x.end, "mean image AUROC"), svg.x_axis(x, y.start, y.end, "latency p50, ms"), *marks,
    )


def _told(point: Point) -> str:
    size = f", {number(point.size, 1)} MB" if point.size else ""
    return f"{point.name}: {number(point.latency, 2)} ms, image AUROC {number(point.auroc, 4)}{size}"


class _Blocks(NamedTuple):
    """The rows of a chart by class: for each class its name, and below it a row for each of the models."""

    models: int
    top: float = 26.0
    row: float = 14.0

    def head(self, place: int) -> float:
        """Where the class ``place`` begins."""
        return self.top + place * (18 + self.row * self.models + 18)

    def middle(self, place: int, model: int) -> float:
        """The middle of a model's row in it."""
        return self.head(place) + 18 + self.row * (model + 0.5)


Named = Sequence[Tuple[int, str]]
"""Models by index and name."""


def class_bars(classes: Sequence[str], models: Named, values: Sequence[Sequence[Optional[float]]]) -> Markup:
    """A bar for each class and model; ``values`` are [classes][models]. Bars start at 0.5, which is chance."""
    blocks = _Blocks(len(models))
    lowest = min([0.5, *(value for of_class in values for value in of_class if value is not None)])
    x = Scale(lowest if lowest == 0.5 else max(0.0, lowest - 0.05), 1, 26, WIDTH - 48)
    bottom = blocks.head(len(classes)) - 8
    marks: List[str] = []
    told = []
    for place, (name, of_class) in enumerate(zip(classes, values)):
        marks.append(svg.label(x.start, blocks.head(place) + 12, svg.shortened(name, 380), class_="strong halo"))
        told.append(f"{name}: " + ", ".join("unknown" if value is None else number(value, 3) for value in of_class))
        for row, ((model, of_model), value) in enumerate(zip(models, of_class)):
            y = blocks.middle(place, row)
            marks.append(svg.label(x.start - 20, y + 4, str(model + 1), class_="soft"))
            if value is None:
                marks.append(svg.label(x(0.5) + 6, y + 4, "unknown", class_="soft"))
                continue
            left, right = sorted((x(0.5), x(value)))
            title = tag("title", f"{name}, {of_model}: {number(value, 4)}")
            marks += [tag("rect", title, x=left, y=y - 5.5, width=max(1.0, right - left), height=11,
                          class_=f"bar {svg.model_class(model)}"),
                      svg.label(right + 6, y + 4, number(value, 3), class_="halo")]
    return svg.drawing(
        WIDTH, bottom + 40, "classes", "Image AUROC of each class",
        f"Values of {', '.join(name for _, name in models)}. {'; '.join(told)}",
        svg.x_axis(x, bottom, blocks.top - 8, "image AUROC (0.5 is chance)"),
        *marks, svg.line(x(0.5), blocks.top - 8, x(0.5), bottom, "axis"),
    )


Change = Optional[Tuple[float, float, float]]
"""Low end, difference, high end."""


def class_changes(classes: Sequence[str], models: Named, intervals: Sequence[Sequence[Change]],
                  confidence: float) -> Markup:
    """The change of each class and model with its interval, in the rows that ``class_bars`` has for them."""
    blocks = _Blocks(len(models))
    bounds = [0.0, *(bound for of_class in intervals for interval in of_class for bound in interval or ())]
    margin = 0.06 * (max(bounds) - min(bounds)) or 0.01
    x = Scale(min(bounds) - margin, max(bounds) + margin, 26, WIDTH - 12)
    bottom = blocks.head(len(classes)) - 8
    marks: List[str] = []
    told = []
    for place, (name, of_class) in enumerate(zip(classes, intervals)):
        marks.append(svg.label(x.start, blocks.head(place) + 12, svg.shortened(name, 380), class_="strong halo"))
        for row, ((model, of_model), interval) in enumerate(zip(models, of_class)):
            if not interval:
                continue
            y, (low, middle, high) = blocks.middle(place, row), interval
            text = (f"{name}, {of_model}: {number(middle, 4, '+')}, "
                    f"{confidence:.0%} interval {number(low, 4, '+')} to {number(high, 4, '+')}")
            told.append(text)
            marks += [svg.label(x.start - 20, y + 4, str(model + 1), class_="soft"),
                      tag("g", tag("title", text), svg.line(x(low), y, x(high), y, "whisker"),
                          tag("circle", cx=x(middle), cy=y, r=4.5, class_="dot"), class_=svg.model_class(model))]
    return svg.drawing(
        WIDTH, bottom + 40, "changes", f"Change of image AUROC against {models[0][1]}", "; ".join(told),
        svg.x_axis(x, bottom, blocks.top - 8, "change of image AUROC", sign="+"),
        svg.line(x(0), blocks.top - 8, x(0), bottom, "axis"), *marks,
    )


class Curve(NamedTuple):
    """A ROC curve of a model (its index); ``at_threshold`` is its false-positive rate and its recall."""

    model: int
    name: str
    false: np.ndarray
    true: np.ndarray
    auroc: float
    at_threshold: Tuple[float, float]


def roc(curves: Sequence[Curve]) -> Markup:
    """ROC curves of all images in one list, with the point where each model's threshold lies."""
    left, top, height = 44.0, 34.0, 420.0
    side = height - top - 48
    x, y = Scale(0, 1, left, left + side), Scale(0, 1, top + side, top)
    marks: List[str] = []
    told = []
    for place, curve in enumerate(curves):
        colour, dashes = svg.model_class(curve.model), svg.model_dashes(curve.model)
        points = [(x(float(false)), y(float(true))) for false, true in zip(curve.false, curve.true)]
        marks.append(svg.path(points, f"curve {colour}", dashes=dashes))
        legend = y(0) - 14 - 20 * (len(curves) - 1 - place)
        name = svg.shortened(curve.name, 150)
        marks += [
            svg.path([(left + 126, legend), (left + 154, legend)], f"curve {colour}", dashes=dashes),
            svg.badge(left + 168, legend, curve.model),
            svg.label(left + 182, legend + 4, f"{name}, {number(curve.auroc, 3)}", class_="halo"),
        ]
        told.append(f"{curve.name}: AUROC {number(curve.auroc, 3)}; at its threshold it finds "
                    f"{curve.at_threshold[1]:.0%} of the defective images, with {curve.at_threshold[0]:.0%} of the "
                    "good ones above it")
    taken: List[Tuple[float, float]] = []
    for curve in curves:
        at = (x(curve.at_threshold[0]), y(curve.at_threshold[1]))
        places = [(at[0] + across, at[1] + down) for across, down in _BESIDE]
        beside = next((place for place in places if x(0) + 8 <= place[0] <= x(1) and y(1) + 8 <= place[1] <= y(0)
                       and all(math.dist(place, other) > 16 for other in taken)), places[0])
        taken.append(beside)
        marks += [tag("g", svg.line(*at, *beside, "leader"), tag("circle", cx=at[0], cy=at[1], r=4, class_="dot"),
                      class_=svg.model_class(curve.model)),
                  svg.badge(*beside, curve.model)]
    return svg.drawing(
        WIDTH, height, "roc", "ROC curves, all images in one list", "; ".join(told),
        svg.y_axis(y, left, left + side, "defective images found"), svg.x_axis(x, y.start, y.end, "good images above"),
        svg.line(x(0), y(0), x(1), y(1), "chance"), *marks,
    )


class Scores(NamedTuple):
    """Scores of a class's good and defective images by one model, and its threshold."""

    good: np.ndarray
    defective: np.ndarray
    threshold: float


def histograms(name: str, title: str, found: Sequence[Tuple[int, Scores]]) -> Markup:
    """Score histograms, a panel per model (its index and scores): good images upwards, defective ones downwards.

    They share an axis. What lies far above the thresholds is counted in the last bin, so that it does not squeeze the
    rest.
    """
    width, panel, head = 340.0, 80.0, 20.0
    models = [scores for _, scores in found]
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
    tallest = max(share.max() for of_model in shares for share in of_model) or 1.0
    bottom = (panel + head) * len(models)
    marks: List[str] = []
    told = []
    for place, ((index, model), (good, defective)) in enumerate(zip(found, shares)):
        base = place * (panel + head) + head + panel / 2
        places = [x(float(edge)) for edge in edges]
        for class_, share, direction in (("good", good, -1), ("defective", defective, 1)):
            if share.any():
                heights = [base + direction * (panel / 2 - 2) * float(value) / tallest for value in share]
                marks.append(svg.path(list(svg.steps(places, heights, base)), class_, closed=True))
        above, caught = (int(np.sum(scores > model.threshold)) for scores in (model.good, model.defective))
        text = f"{above} of {len(model.good)} good above, {caught} of {len(model.defective)} defective"
        told.append(f"model {index + 1}: {text} above the threshold of {number(model.threshold, 2)}")
        at = x(model.threshold)
        marks += [
            svg.line(x.start, base, x.end, base, "axis"),
            svg.line(at, base - panel / 2, at, base + panel / 2, "threshold"),
            svg.badge(9, base, index),
            svg.label(x.end, base - panel / 2 - 5, f"above: {above}/{len(model.good)} good, "
                      f"{caught}/{len(model.defective)} defective", "end", "small"),
        ]
    clipped = float(everything.max()) > high
    ticks = [(value, text) for value, text in x.ticks(6) if not clipped or x(value) < x.end - 52]
    marks += [svg.label(x(value), bottom + 16, text, "middle", "soft") for value, text in ticks]
    if clipped:
        marks.append(svg.label(x.end, bottom + 16, f"\u2265 {number(high, 1)}", "end", "soft"))
    return svg.drawing(width, bottom + 22, name, f"Scores of {title}", "; ".join(told), join(marks))
