"""The frame of every drawing: one `svg` element with its title and its description in words, and small marks.

Drawings are written by `skymoe.base.html.el`, which escapes all text. A drawing on its own carries its style sheet; in
a page the page has it once. Colours follow the reader's light or dark scheme; on paper they are light. No script, no
font and no picture is loaded from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import resources

from skymoe.base.html import Html, el, join
from skymoe.plan.draw.words import name


@cache
def style_sheet() -> str:
    """The rules of all drawings."""
    return (resources.files("skymoe.plan.draw") / "assets" / "drawing.css").read_text(encoding="utf-8")


def drawing(
    children: Iterable[Html], *, width: float, height: float, title: str, description: str, standalone: bool
) -> Html:
    """An `svg` element as wide as its place allows.

    Args:
        children: what is in it.
        width, height: of its coordinates.
        title, description: for those who do not see it.
        standalone: with the style sheet, and with the name space that a file needs.
    """
    head = [el("title", name(title, 200)), el("desc", name(description, 2000))]
    if standalone:
        head.append(el("style", Html(style_sheet())))
    attributes = {"viewBox": f"0 0 {number(width)} {number(height)}", "role": "img", "class_": "drawing"}
    if standalone:
        attributes |= {"xmlns": "http://www.w3.org/2000/svg", "width": number(width), "height": number(height)}
    ground = el("rect", class_="ground", width=number(width), height=number(height), rx="6")
    return el("svg", *head, ground, *children, **attributes)


def text(words: str, x: float, y: float, class_: str = "") -> Html:
    """Words with their base line at (x, y)."""
    return el("text", words, x=number(x), y=number(y), class_=class_)


def runs(x: float, y: float, *words: tuple[str, str]) -> Html:
    """Pieces of a line, (class, words), one after the other, however wide they are."""
    spans = [el("tspan", piece, class_=class_, dx="12" if index else "") for index, (class_, piece) in enumerate(words)]
    return el("text", *spans, x=number(x), y=number(y))


def box(class_: str, x: float, y: float, width: float, height: float) -> Html:
    """A filled rectangle."""
    return el(
        "rect", class_=class_, x=number(x), y=number(y), width=number(max(0.0, width)), height=number(max(0.0, height))
    )


def path(class_: str, data: str) -> Html:
    """A path."""
    return el("path", class_=class_, d=data)


def legend(entries: Iterable[tuple[str, str]], x: float, y: float) -> Html:
    """Squares with names, one after the other on the base line `y`."""
    parts = []
    for class_, words in entries:
        parts += [box(class_, x, y - 9, 11, 11), text(words, x + 16, y, "soft")]
        x += 16 + text_width(words) + 18
    return join(parts)


def text_width(words: str, size: float = 12.0) -> float:
    """About how wide `words` are: the fonts are not known here."""
    return 0.56 * size * len(words)


def number(value: float) -> str:
    """A coordinate with one digit after the point."""
    return f"{value:.1f}".removesuffix(".0")
