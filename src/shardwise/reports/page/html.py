"""Elements of HTML and SVG as text: whatever is not `Markup` is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

VOID = ("input", "meta")
"""Elements of HTML without content."""

SHAPES = ("rect", "line")
"""Elements of SVG without content."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """Return an element.

    Args:
        name: name of the element.
        children: content; texts are escaped, `Markup` is not.
        attributes: attributes: `class_` is `class`, other underscores become hyphens. None and False leave one out, and
            True gives one without a value.
    """
    parts = [name, *(_attribute(key, value) for key, value in attributes.items() if value not in (None, False))]
    if name in VOID or name in SHAPES:
        return Markup(f"<{' '.join(parts)}{'/' if name in SHAPES else ''}>")
    return Markup(f"<{' '.join(parts)}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """Return the children as one piece of HTML; texts are escaped, `Markup` is not."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> Markup:
    """Return a table: the first cell of each row is its heading, cells that begin with a digit are set to the right."""
    head = tag("tr", *(tag("th", name, scope="col") for name in header))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell, class_=_kind(cell)) for cell in row[1:]))
        for row in rows
        if row
    ]
    said = [tag("caption", caption)] if caption else []
    return tag(
        "div",
        tag("table", *said, tag("thead", head), tag("tbody", *body)),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption or "Table",
    )


def _kind(cell: str) -> str | None:
    return "number" if cell[:1].isdigit() or cell[:1] in "-+±~$" else None


def _attribute(key: str, value: str | float | bool | None) -> str:
    name = key.rstrip("_").replace("_", "-")
    return name if value is True else f'{name}="{escape(str(value))}"'
