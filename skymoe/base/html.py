"""HTML that escapes by construction: `el("td", text)` escapes `text`, unless it already is `Html`.

Names, recipes and samples come from files that anybody may have written; nothing reaches the page except through here.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_VOID = frozenset({"meta", "br", "input"})


class Html(str):
    """Text that is markup already. Made by `el` and `join`; by hand only from constants."""

    __slots__ = ()


def el(tag: str, *children: str | Html, **attributes: str | bool) -> Html:
    """An element. A trailing underscore of an attribute is dropped, others become hyphens; True makes it bare."""
    words = [tag]
    for name, value in attributes.items():
        if value is False or value == "":
            continue
        name = name.rstrip("_").replace("_", "-")
        words.append(name if value is True else f'{name}="{html.escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if tag in _VOID else f"{opening}{join(children)}</{tag}>")


def join(children: Iterable[str | Html]) -> Html:
    """Children one after the other; plain text is escaped."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))


def table(head: Sequence[str | Html], rows: Iterable[Sequence[str | Html]], *, label: str) -> Html:
    """A table that scrolls sideways on its own when the page is narrow. The first column heads its row."""
    header = el("thead", el("tr", *(el("th", cell, scope="col") for cell in head)))
    body = [el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in rows]
    scroller = el("table", header, el("tbody", *body))
    return el("div", scroller, class_="scroll", role="region", tabindex="0", aria_label=label)


def facts(rows: Iterable[tuple[str, str | Html]]) -> Html:
    """Names and values as a definition list."""
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in rows), class_="facts")
