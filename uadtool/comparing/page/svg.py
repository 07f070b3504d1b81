"""What charts are made of: scales with round ticks, axes, marks. Colours and fonts come from the page's style sheet."""

import math
from typing import Iterator, List, NamedTuple, Sequence, Tuple

from uadtool.comparing.page.markup import Markup, join, tag

SIZE = 12
"""Of the letters."""

MODEL_COLOURS = 6
"""Classes m1 to m6 of the style sheet; further models take them again, and differ by dashes and numbers."""

_DASHES = (None, "7 3", "2 3", "9 3 2 3", "4 2", "1 4")


class Scale(NamedTuple):
    """Maps values from ``low`` to ``high`` to positions from ``start`` to ``end``; values beyond go beyond."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5, sign: str = "") -> List[Tuple[float, str]]:
        """About ``count`` round values between ``low`` and ``high``, and how they are written."""
        step = _round_step((self.high - self.low) / count)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(index * step, number(index * step, digits, sign)) for index in range(first, last + 1)]


def _round_step(wanted: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(wanted))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.75 * wanted)


def number(value: float, digits: int, sign: str = "") -> str:
    """A number as it is printed in a page, with a real minus."""
    text = f"{value:{sign}.{digits}f}"
    return (text.lstrip("+-") if not text.strip("+-0.") else text).replace("-", "\u2212")  # zero has no sign


def drawing(width: float, height: float, name: str, title: str, description: str, *content: str) -> Markup:
    """An ``svg`` that fills its box in width and is an image to a screen reader. ``name`` is unique in the page."""
    ids = f"{name}-title", f"{name}-text"
    return tag(
        "svg", tag("title", title, id=ids[0]), tag("desc", description, id=ids[1]), *content,
        viewBox=f"0 0 {width:g} {height:g}", role="img", aria_labelledby=ids[0], aria_describedby=ids[1],
    )


def label(x: float, y: float, content: str, anchor: str = "start", class_: str = "") -> Markup:
    """Text whose base line is at ``y``; ``anchor`` is start, middle or end."""
    return tag("text", content, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_ or None)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[Tuple[float, float]], class_: str, closed: bool = False, dashes: str = "") -> Markup:
    """A line through ``points``."""
    places = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return tag("path", d=f"M{places}{'Z' if closed else ''}", class_=class_, stroke_dasharray=dashes or None)


def x_axis(scale: Scale, y: float, top: float, title: str, sign: str = "") -> Markup:
    """Ticks below ``y`` with lines up to ``top``, and the title below them."""
    return join([
        *(join([line(scale(value), top, scale(value), y, "grid"),
                label(scale(value), y + SIZE + 4, text, "middle", "soft")]) for value, text in scale.ticks(sign=sign)),
        line(scale.start, y, scale.end, y, "axis"),
        label((scale.start + scale.end) / 2, y + 2 * SIZE + 10, title, "middle", "soft"),
    ])


def y_axis(scale: Scale, x: float, right: float, title: str) -> Markup:
    """Ticks left of ``x`` with lines to ``right``, and the title above them."""
    return join([
        *(join([line(x, scale(value), right, scale(value), "grid"),
                label(x - 6, scale(value) + 4, text, "end", "soft")]) for value, text in scale.ticks()),
        label(x, scale.end - 10, title, class_="soft"),
    ])


def model_class(index: int) -> str:
    """The colour of the model ``index`` (from 0), as a class of the style sheet."""
    return f"m{index % MODEL_COLOURS + 1}"


def model_dashes(index: int) -> str:
    """The dashes of its line."""
    return _DASHES[index % len(_DASHES)] or ""


def badge(x: float, y: float, index: int) -> Markup:
    """The number of the model ``index`` in a ring of its colour, with its centre at ``x``, ``y``."""
    return tag("g", tag("circle", cx=x, cy=y, r=8), label(x, y + 4, str(index + 1), "middle"),
               class_=f"badge {model_class(index)}")


def width_of(text: str) -> float:
    """About how wide a label is."""
    return 0.58 * SIZE * len(text)


def shortened(text: str, width: float) -> str:
    """The text, or its beginning and end, in about ``width``."""
    room = int(width / (0.58 * SIZE))
    return text if len(text) <= room else f"{text[:(room - 1) // 2]}\u2026{text[-(room // 2):]}"


def free_place(places: Sequence[Tuple[float, float]], width: float, taken: Sequence[Tuple[float, float, float, float]],
               bounds: Tuple[float, float]) -> Tuple[float, float]:
    """The first place (x, base line) for a label ``width`` wide that is within ``bounds`` (x) and where nothing is."""
    def box(x: float, y: float) -> Tuple[float, float, float, float]:
        return x, y - SIZE, x + width, y + 4

    def free(x: float, y: float) -> bool:
        left, top, right, bottom = box(x, y)
        return bounds[0] <= left and right <= bounds[1] and not any(
            left < right_of and left_of < right and top < bottom_of and top_of < bottom
            for left_of, top_of, right_of, bottom_of in taken)

    return next((place for place in places if free(*place)), places[0])


def steps(edges: Sequence[float], heights: Sequence[float], base: float) -> Iterator[Tuple[float, float]]:
    """The outline of a histogram: bars between ``edges`` that reach from ``base`` to ``heights``."""
    yield edges[0], base
    for left, right, height in zip(edges, edges[1:], heights):
        yield left, height
        yield right, height
    yield edges[-1], base
