"""What charts consist of: scales with round ticks, axes, marks. Colours, dashes and fonts come from the page's CSS.

``Markup.format`` escapes every text that it puts into the markup.
"""

import math
from typing import Iterator, List, NamedTuple, Sequence, Tuple

from markupsafe import Markup

SIZE = 12
"""Font size."""

LETTER = 0.58 * SIZE
"""Approximate width of a letter."""

MODEL_STYLES = 6
"""Classes m1 to m6 of the style sheet. Further models reuse them and differ only by number."""


class Scale(NamedTuple):
    """Maps values from ``low`` to ``high`` to positions from ``start`` to ``end``; values beyond go beyond."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5, sign: str = "") -> List[Tuple[float, str]]:
        """About ``count`` round values between ``low`` and ``high``, with their text."""
        least = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(least))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.75 * least)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(index * step, number(index * step, digits, sign)) for index in range(first, last + 1)]


def number(value: float, digits: int, sign: str = "") -> str:
    """A number as the page prints it, with a real minus and without a sign at zero."""
    text = f"{value:{sign}.{digits}f}"
    return (text.lstrip("+-") if not text.strip("+-0.") else text).replace("-", "\u2212")


def drawing(width: float, height: float, name: str, title: str, description: str, *marks: Markup) -> Markup:
    """An ``svg`` as wide as its box, and an image to screen readers. ``name`` is unique in the page."""
    return Markup('<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title" '
                  'aria-describedby="{name}-text"><title id="{name}-title">{title}</title>'
                  '<desc id="{name}-text">{description}</desc>{marks}</svg>').format(
        width=width, height=height, name=name, title=title, description=description, marks=Markup().join(marks))


def label(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> Markup:
    """Text on the base line ``y``; ``anchor`` is start, middle or end."""
    return Markup('<text x="{:.6g}" y="{:.6g}" text-anchor="{}" class="{}">{}</text>').format(x, y, anchor, style, text)


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return Markup('<line x1="{:.6g}" y1="{:.6g}" x2="{:.6g}" y2="{:.6g}" class="{}"/>').format(x1, y1, x2, y2, style)


def circle(x: float, y: float, radius: float, style: str) -> Markup:
    return Markup('<circle cx="{:.6g}" cy="{:.6g}" r="{:.6g}" class="{}"/>').format(x, y, radius, style)


def bar(x: float, y: float, width: float, height: float) -> Markup:
    return Markup('<rect x="{:.6g}" y="{:.6g}" width="{:.6g}" height="{:.6g}" class="bar"/>').format(
        x, y, width, height)


def path(points: Sequence[Tuple[float, float]], style: str, closed: bool = False) -> Markup:
    """A line through ``points``."""
    return Markup('<path d="M{}{}" class="{}"/>').format(
        "L".join(f"{x:.1f} {y:.1f}" for x, y in points), "Z" if closed else "", style)


def of_model(index: int, *marks: Markup, title: str = "") -> Markup:
    """Marks in the colour of the model ``index``; a pointer that rests on them shows the ``title``."""
    tooltip = Markup("<title>{}</title>").format(title) if title else ""
    return Markup('<g class="{}">{}{}</g>').format(model_style(index), tooltip, Markup().join(marks))


def badge(x: float, y: float, index: int) -> Markup:
    """The number of the model ``index`` in a ring of its colour, centred at ``x``, ``y``."""
    return of_model(index, circle(x, y, 8, "ring"), label(x, y + 4, str(index + 1), "middle"))


def model_style(index: int) -> str:
    """The class of the style sheet for the model ``index`` (from 0)."""
    return f"m{index % MODEL_STYLES + 1}"


def x_axis(scale: Scale, y: float, top: float, title: str, sign: str = "") -> Markup:
    """Ticks below ``y`` with lines up to ``top``, and the title below them."""
    ticks = [(scale(value), text) for value, text in scale.ticks(sign=sign)]
    return Markup().join([
        *(line(x, top, x, y, "grid") + label(x, y + SIZE + 4, text, "middle", "soft") for x, text in ticks),
        line(scale.start, y, scale.end, y, "axis"),
        label((scale.start + scale.end) / 2, y + 2 * SIZE + 10, title, "middle", "soft"),
    ])


def y_axis(scale: Scale, x: float, right: float, title: str) -> Markup:
    """Ticks left of ``x`` with lines to ``right``, and the title above them."""
    ticks = [(scale(value), text) for value, text in scale.ticks()]
    return Markup().join([
        *(line(x, y, right, y, "grid") + label(x - 6, y + 4, text, "end", "soft") for y, text in ticks),
        label(x, scale.end - 10, title, style="soft"),
    ])


def shortened(text: str, width: float) -> str:
    """The text, or its beginning and end where it is wider than about ``width``."""
    room = int(width / LETTER)
    return text if len(text) <= room else f"{text[:(room - 1) // 2]}\u2026{text[-(room // 2):]}"


def free_place(places: Sequence[Tuple[float, float]], width: float, taken: Sequence[Tuple[float, float, float, float]],
               bounds: Tuple[float, float]) -> Tuple[float, float]:
    """The first of ``places`` (x, base line) where a label of this width is within ``bounds`` (x) and covers nothing.

    ``taken`` are boxes: left, top, right, bottom. Without a free place, the first place.
    """
    def is_free(left: float, base: float) -> bool:
        top, right, bottom = base - SIZE, left + width, base + 4
        return bounds[0] <= left and right <= bounds[1] and not any(
            left < box[2] and box[0] < right and top < box[3] and box[1] < bottom for box in taken)

    return next((place for place in places if is_free(*place)), places[0])


def steps(edges: Sequence[float], heights: Sequence[float], base: float) -> Iterator[Tuple[float, float]]:
    """The outline of a histogram: bars between ``edges`` that reach from ``base`` to ``heights``."""
    yield edges[0], base
    for left, right, height in zip(edges, edges[1:], heights):
        yield left, height
        yield right, height
    yield edges[-1], base
