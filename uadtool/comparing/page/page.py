"""A comparison as one page to look at: table, charts, images and provenance, in one file that needs nothing else.

It is made of numbers that do not grow with the number of images: histograms, thinned curves, at most 18 thumbnails.
"""

import logging
import re
from pathlib import Path, PurePath
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from uadtool.comparing.comparison import METRICS, Model
from uadtool.comparing.gates import Verdict
from uadtool.comparing.page import charts
from uadtool.comparing.page.markup import Markup, join, tag
from uadtool.comparing.page.svg import model_class, number
from uadtool.comparing.page.thumbnails import Group, Shown, disagreements, thumbnails
from uadtool.comparing.results import Result
from uadtool.comparing.table import DECIMALS
from uadtool.scoring.metrics import roc_curve

log = logging.getLogger("uadtool")

PANELS = 120
"""Histograms at most: of a hundred classes the first ones are drawn. The table has them all."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""The page may load nothing and run nothing, whatever the names in it are."""

Record = Dict[str, Any]


def as_html(models: Sequence[Model], record: Record, verdicts: Sequence[Verdict]) -> str:
    """The page of a ``uadtool.compare/1`` record about ``models``, with the verdicts of gates, if any."""
    title = " and ".join(model.label for model in models) if len(models) < 3 else f"{len(models)} detectors"
    sections = [(name, heading, join(content)) for name, heading, content in (
        ("models", "Models", _cards(record)),
        ("gates", "Gates", _gates(verdicts)),
        ("figures", "All figures", _table(record)),
        ("accuracy", "Accuracy", _accuracy(models, record)),
        ("scores", "Scores by class", _scores(models)),
        ("images", "Images to look at", _images(models)),
        ("provenance", "Provenance", _provenance(models, record)),
    ) if content]
    page = tag(
        "html",
        tag("head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", f"{title}: comparison"),
            tag("style", Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8")))),
        tag("body",
            tag("a", "Skip to the comparison", href="#main", class_="skip"),
            tag("header",
                tag("p", "uadtool compare", class_="eyebrow"),
                tag("h1", title),
                tag("p", _subject(models), class_="lead"),
                tag("nav", tag("ul", *(tag("li", tag("a", heading, href=f"#{name}")) for name, heading, _ in sections)),
                    aria_label="Sections")),
            tag("main",
                *(tag("section", tag("h2", heading, id=f"{name}-heading"), content, id=name,
                      aria_labelledby=f"{name}-heading") for name, heading, content in sections),
                id="main"),
            tag("footer", tag("p", f"Made by {record['tool']}."))),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _subject(models: Sequence[Model]) -> str:
    truths = [model.scores.truth for model in models if model.scores]
    truth = max(truths, key=len, default={})
    against = f"Each model is set against the first, {models[0].label}." if len(models) > 1 else ""
    if not truth:
        return against or "Speed and size; there are no labelled scores."
    classes = {name for _, name in truth.values() if name}
    defective = sum(anomalous for anomalous, _ in truth.values())
    of = f" of {len(classes)} classes" if len(classes) > 1 else ""
    return f"{len(truth):,} images{of}, {len(truth) - defective:,} good and {defective:,} defective. {against}"


def _named(index: int, label: str) -> Markup:
    """A model as it is called everywhere: its number in a ring of its colour, and its label."""
    return join([tag("span", str(index + 1), class_=f"number {model_class(index)}"), label])


def _breakable(label: str) -> Markup:
    """The label, which may go on in a new line after punctuation."""
    return join(part for word in re.findall(r"[^-_/. ]*[-_/. ]|[^-_/. ]+", label) for part in (word, tag("wbr")))


def _precision(model: Record) -> str:
    quantized = model.get("quantization")
    if not quantized:
        return str(model["precision"])
    in_float = f", {quantized['float_layers']} layers in float" if quantized.get("float_layers") else ""
    return (f"{model['precision']}: {quantized.get('method')}, {quantized.get('calibration')} on "
            f"{quantized.get('source')}{in_float}")


# Models: what one wants to know first


def _cards(record: Record) -> List[str]:
    rows = {row["metric"]: row for row in record["rows"]}
    keys = [(label, rows[name]) for label, name in (
        ("Image AUROC", "image_auroc"), ("AUPRO", "aupro"), ("Latency p50", "latency_p50"), ("Energy", "energy"),
        ("File size", "file_size")) if name in rows]
    cards = []
    for index, model in enumerate(record["models"]):
        figures = join(
            join([tag("dt", label), tag("dd", _value(row, index)), tag("dd", _change(row, index)) if index else ""])
            for label, row in keys)
        cards.append(tag("li", tag("h3", _named(index, model["label"])), tag("p", _precision(model), class_="note"),
                         tag("dl", figures, class_="key" if index else "key first"), class_=model_class(index)))
    return [tag("ul", *cards, class_="cards")]


def _value(row: Record, index: int) -> Markup:
    value = row["values"][index]
    if value is None:
        return tag("span", tag("span", "–", aria_hidden="true"), tag("span", "not measured", class_="hidden"),
                   class_="none")
    return join([number(value, DECIMALS[row["unit"]]), f" {row['unit']}" if row["unit"] else ""])


def _change(row: Record, index: int) -> Markup:
    """The change against the first model; where its interval is all on one side, with a sign and a word of it."""
    change = row["changes"][index]
    if change is None:
        return Markup("")
    if row["change"] == "ratio":
        return join([f"{change:.2f}×"])
    text = number(change, DECIMALS[row["unit"]], "+")
    interval = row.get("intervals", [None] * (index + 1))[index]
    if interval and (interval[0] > 0 or interval[1] < 0):
        better = (interval[0] > 0) == (row["better"] == "higher")
        return tag("span", tag("span", "▲ " if change > 0 else "▼ ", aria_hidden="true"), text,
                   tag("span", " better" if better else " worse", class_="hidden"),
                   class_="better" if better else "worse")
    return join([text])


# Gates


def _gates(verdicts: Sequence[Verdict]) -> List[str]:
    if not verdicts:
        return []
    missed = sum(bool(verdict.failures) for verdict in verdicts)
    rows = [tag("tr",
                tag("th", tag("code", str(verdict.gate)), scope="row"),
                tag("td", tag("span", "✗ not met" if verdict.failures else "✓ met",
                              class_="worse" if verdict.failures else "better"), class_="left"),
                tag("td", "; ".join(verdict.failures), class_="left")) for verdict in verdicts]
    summary = f"{missed} of {len(verdicts)} not met." if missed else "All of them are met."
    head = tag("tr", *(tag("th", text, scope="col", class_="left") for text in ("Gate", "Verdict", "Why not")))
    return [tag("p", summary),
            _scrolled("Gates", tag("table", tag("caption", "Conditions on the figures below", class_="hidden"),
                                   tag("thead", head), tag("tbody", *rows)))]


# The table


def _table(record: Record) -> List[str]:
    models, rows = record["models"], record["rows"]
    with_interval = [any(row.get("intervals", [None] * len(models))[index] for row in rows)
                     for index in range(len(models))]
    head = [tag("th", "Metric", scope="col")]
    columns = 1
    for index, model in enumerate(models):
        extra = [text for text, wanted in (("change", index > 0),
                                           (f"{record['confidence']:.0%} interval", with_interval[index])) if wanted]
        head += [tag("th", _named(index, _breakable(model["label"])), scope="col"),
                 *(tag("th", text, tag("span", f" of {model['label']}", class_="hidden"), scope="col", class_="small")
                   for text in extra)]
        columns += 1 + len(extra)
    bodies = []
    for title, of_group in _groups(rows):
        by_class = of_group[0]["metric"] not in METRICS
        lines = [tag("tr", tag("th", title, scope="rowgroup", colspan=columns))]
        for row in of_group:
            unit = tag("span", f", {row['unit']}", class_="unit") if row["unit"] else ""
            cells = [tag("th", _class_of(row) if by_class else _capitalised(row["label"]), unit, scope="row")]
            for index in range(len(models)):
                value = row["values"][index]
                cells.append(tag("td", _value({**row, "unit": ""}, index) if value is None else
                                 number(value, DECIMALS[row["unit"]])))
                if index:
                    cells.append(tag("td", _change(row, index), class_="change"))
                if with_interval[index]:
                    cells.append(tag("td", _interval(row, index), class_="interval"))
            lines.append(tag("tr", *cells))
        bodies.append(tag("tbody", *lines))
    notes = []
    if len(models) > 1:
        notes.append("Changes are differences to the first model, and ratios (×) for speed and size.")
    if any(with_interval):
        notes.append(f"Intervals: paired bootstrap, {record['resamples']} resamples of the images; ▲ ▼ where zero is "
                     "outside.")
    caption = tag("caption", f"Figures of {', '.join(model['label'] for model in models)}", class_="hidden")
    return [*([tag("p", " ".join(notes), class_="note")] if notes else []),
            _scrolled("All figures", tag("table", caption, tag("thead", tag("tr", *head)), *bodies))]


def _groups(rows: Sequence[Record]) -> Iterator[Tuple[str, List[Record]]]:
    of_classes = [row for row in rows if row["metric"] not in METRICS]
    accuracy = [row for row in rows if row["change"] == "difference" and row["metric"] in METRICS]
    for title, of_group in (("Accuracy", accuracy), ("Image AUROC of each class", of_classes),
                            ("Speed and size", [row for row in rows if row["change"] == "ratio"])):
        if of_group:
            yield title, of_group


def _interval(row: Record, index: int) -> str:
    interval = row.get("intervals", [None] * (index + 1))[index]
    return f"{number(interval[0], 4, '+')} to {number(interval[1], 4, '+')}" if interval else ""


def _class_of(row: Record) -> str:
    return str(row["metric"][len("image_auroc."):])


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _scrolled(name: str, table: Markup) -> Markup:
    """A table that scrolls sideways by itself where it is too wide; by keyboard, too."""
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=name)


# Charts


def _accuracy(models: Sequence[Model], record: Record) -> List[str]:
    rows = {row["metric"]: row["values"] for row in record["rows"]}
    names = [model.label for model in models]
    nothing = [None] * len(models)
    figures = []
    points, left_out = [], []
    for index, (name, latency, auroc, size) in enumerate(zip(
            names, rows.get("latency_p50", nothing), rows.get("image_auroc", nothing), rows.get("file_size", nothing))):
        if latency is None or auroc is None:
            left_out.append(name)
        else:
            points.append(charts.Point(index, name, latency, auroc, size))
    if points:
        missing = f" Without latency or labels: {', '.join(left_out)}." if left_out else ""
        caption = f"Up and to the left is better. The area of a circle is the file size.{missing}"
        figures.append(_figure("Accuracy over latency", caption, charts.trade_off(points)))
    curves = [curve for index, model in enumerate(models) for curve in _curve(index, model)]
    if curves:
        caption = "All images in one list, one threshold for all classes: the numbered point."
        figures.append(_figure("ROC", caption, charts.roc(curves)))
    figures += _classes(names, record)
    return [tag("div", *figures, class_="charts")] if figures else []


def _classes(names: Sequence[str], record: Record) -> Iterator[Markup]:
    """AUROC and its change, of the mean and of each class."""
    rows = [row for row in record["rows"] if row["metric"] == "image_auroc" or row["metric"] not in METRICS]
    models = [(index, name) for index, name in enumerate(names)
              if any(row["values"][index] is not None for row in rows)]
    if not models:
        return
    shown = rows[:max(2, PANELS // len(models))]
    more = f" The first {len(shown) - 1} of {len(rows) - 1} classes." if len(shown) < len(rows) else ""
    classes = ["Mean" if row["metric"] == "image_auroc" else _class_of(row) for row in shown]
    values = [[row["values"][index] for index, _ in models] for row in shown]
    yield _figure("Image AUROC of each class", f"A bar for each model, by its number.{more}",
                  charts.class_bars(classes, models, values))
    if any("intervals" in row for row in shown):
        intervals = [[_with_change(row, index) for index, _ in models] for row in shown]
        confidence = record["confidence"]
        caption = f"With {confidence:.0%} bootstrap intervals: what reaches over zero may be chance."
        drawing = charts.class_changes(classes, models, intervals, confidence)
        yield _figure(f"Change against {names[0]}", caption, drawing)


def _with_change(row: Record, index: int) -> charts.Change:
    interval = row["intervals"][index] if "intervals" in row else None
    return (interval[0], row["changes"][index], interval[1]) if interval else None


def _curve(index: int, model: Model) -> Iterator[charts.Curve]:
    if not model.scores or "image_auroc.pooled" not in model.scores.values:
        return
    good, defective = _split(model.scores)
    labels = np.repeat([False, True], [len(good), len(defective)])
    false, true = roc_curve(labels.tolist(), np.concatenate([good, defective]).tolist())
    threshold = model.scores.threshold
    yield charts.Curve(index, model.label, false, true, model.scores.values["image_auroc.pooled"],
                       (float(np.mean(good > threshold)), float(np.mean(defective > threshold))))


def _split(result: Result, class_name: Optional[str] = "") -> Tuple[np.ndarray, np.ndarray]:
    """The scores of good and of defective images of a class; of all where it is ``""``."""
    images = [image for image in result.images.values() if class_name in ("", image.class_name)]
    good, defective = ([image.score for image in images if image.label == label] for label in ("good", "anomalous"))
    return np.array(good), np.array(defective)


def _figure(title: str, caption: str, drawing: Markup) -> Markup:
    return tag("figure", tag("h3", title), tag("figcaption", caption), drawing)


def _scores(models: Sequence[Model]) -> List[str]:
    results = [(index, model.scores) for index, model in enumerate(models) if model.scores]
    names = sorted({name for _, result in results for _, name in result.truth.values()}, key=lambda name: name or "")
    if not names:
        return []
    shown = names[:max(1, PANELS // len(results))]
    figures = []
    for place, name in enumerate(shown):
        of_models = [(index, charts.Scores(*_split(result, name), result.threshold)) for index, result in results]
        found = [(index, scores) for index, scores in of_models if len(scores.good) + len(scores.defective)]
        title = name or "without a class"
        good, defective = (max(len(part) for part in parts)
                           for parts in zip(*((scores.good, scores.defective) for _, scores in found)))
        figures.append(_figure(title, f"{good} good, {defective} defective",
                               charts.histograms(f"scores-{place}", title, found)))
    more = f" The first {len(shown)} of {len(names)} classes." if len(shown) < len(names) else ""
    key = tag("p", "Shares of the images by score: ", tag("span", class_="swatch good"), "good ones upwards, ",
              tag("span", class_="swatch defective"), "defective ones downwards. The dashed line is the threshold. "
              f"What lies far above it is counted in the last bin.{more}")
    return [key, tag("div", *figures, class_="small-charts")]


# Images


def _images(models: Sequence[Model]) -> List[str]:
    groups = [group for group in disagreements(models) if group.total]
    pictures = thumbnails(groups)
    embedded = sum(picture is not None for picture in pictures.values())
    if embedded:
        log.info("the page holds thumbnails of %d images", embedded)
    numbers = {model.label: index for index, model in enumerate(models)}
    content: List[str] = []
    for group in groups:
        content += [tag("h3", _counted(group)), tag("ul", *(_card(image, pictures[image.path], numbers)
                                                            for image in group.images), class_="images")]
    return content


def _counted(group: Group) -> str:
    return f"{group.title}: {group.total}" + (
        f", of which the {len(group.images)} farthest" if group.total > len(group.images) else "")


def _card(image: Shown, picture: Optional[str], numbers: Dict[str, int]) -> Markup:
    kind = {"good": "good", "anomalous": "defective"}.get(image.label or "", "unlabelled")
    name = "/".join(PurePath(image.path).parts[-3:])
    described = f"{kind} image{f' of {image.class_name}' if image.class_name else ''}, {name}"
    shown = (tag("img", src=picture, alt=described,) if picture
             else tag("span", "not there any more", class_="gone"))
    scores = join(tag("span", _named(numbers[label], number(score, 2)),
                      " above " if score > threshold else " below ", number(threshold, 2), class_="score")
                  for label, score, threshold in image.scores)
    return tag("li", shown, tag("p", tag("strong", image.finding), f", {kind} {image.class_name or ''}"),
               tag("p", scores), tag("p", name if picture else image.path, class_="path", title=image.path))


# Provenance


def _provenance(models: Sequence[Model], record: Record) -> List[str]:
    content: List[str] = []
    for index, (model, told) in enumerate(zip(models, record["models"])):
        facts = [("Model file", tag("code", told["path"])), ("Digest", tag("code", told["digest"])),
                 ("Method", model.any.method), ("Precision", _precision(told)),
                 ("Runtime", told["runtime"]), ("Machine", told["machine"])]
        for kind, result in (("Scores", model.scores), ("Bench", model.bench)):
            if result:
                files = ", ".join(result.shards or [result.file])
                facts.append((kind, f"{files}, {result.started}, {result.tool}"))
        content += [tag("h3", _named(index, told["label"])),
                    tag("dl", *(join([tag("dt", name), tag("dd", value)]) for name, value in facts), class_="facts")]
    return content
