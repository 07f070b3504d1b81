"""HTML and SVG, escaped by construction: text becomes markup only through a tag."""

from html import escape
from typing import Iterable, Union

_VOID = {"img", "meta", "wbr"}
"""Elements of HTML that have no end tag."""


class Markup(str):
    """Markup that may stand in a page as it is; any other string in a tag is text."""


def tag(element: str, /, *content: str, **attributes: Union[str, float, bool, None]) -> Markup:
    """``<element attributes>content</element>``, with text and attributes escaped.

    In the name of an attribute ``_`` stands for ``-``, and one at its end for nothing (``class_``). An attribute that
    is None or False is left out, one that is True has no value.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_attribute(value)}"')
        for key, value in attributes.items() if value is not None and value is not False
    )
    start = Markup(f"<{element}{written}>")
    return start if element in _VOID else Markup(f"{start}{join(content)}</{element}>")


def join(content: Iterable[str]) -> Markup:
    """Markup and text (which is escaped), one after another."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part, quote=False) for part in content))


def _attribute(value: Union[str, float]) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
