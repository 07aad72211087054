"""A plan as one HTML page: it needs no network, no script and no server, reads on a phone and on paper.

The content security policy allows nothing but the style sheet that is written here, by its hash: even a mistake in
escaping could not run a script, load a file or send a form. Names come from files that anybody may have written; they
reach the page through `skymoe.base.html.el`, which escapes them, and through `printable`, which bounds them.

The page takes plain data. What a command has to say it puts into a `Page` (plan/train/page.py, plan/serve/page.py).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from skymoe.base.errors import printable
from skymoe.base.html import Html, el, join, table
from skymoe.plan.draw.bars import memory_svg
from skymoe.plan.draw.charts import curves_svg, points_svg
from skymoe.plan.draw.frame import style_sheet
from skymoe.plan.draw.panel import Bars, Curve, Panel, Point
from skymoe.plan.draw.svg import timeline_svg

_MAX_ROWS = 200


@dataclass(frozen=True, kw_only=True)
class Card:
    """A figure at the top. `tone` is "", "good" or "bad"."""

    name: str
    value: str
    unit: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is below it; left out where that is nothing."""

    title: str
    body: tuple[Html, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """What stands on the page.

    Attributes:
        kind: "training", "serving", "pipeline".
        title, lede: the answer in a line, and what was asked.
        cards: the figures that matter.
        sections: in order.
    """

    kind: str
    title: str
    lede: str
    cards: tuple[Card, ...] = ()
    sections: tuple[Section, ...] = ()


def html_page(page: Page) -> str:
    """The whole HTML document."""
    style = (resources.files("skymoe.plan.draw") / "assets" / "page.css").read_text(encoding="utf-8") + style_sheet()
    head = el(
        "head",
        Html('<meta charset="utf-8">'),
        el("meta", http_equiv="Content-Security-Policy", content=_policy(style)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{printable(page.title)} - skymoe plan"),
        el("style", Html(style)),
    )
    body = el(
        "body",
        el(
            "header",
            el("p", el("b", "skymoe"), f" plan · {printable(page.kind)}", class_="kicker"),
            el("h1", printable(page.title)),
            el("p", printable(page.lede, 1000), class_="lede"),
            el("div", *map(_card, page.cards), class_="cards"),
        ),
        el("main", *(_section(section) for section in page.sections if any(section.body))),
        el("footer", el("p", "Made by ", el("code", "skymoe plan"), ": predicted, not measured. No network needed.")),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def schedule_section(panels: Sequence[Panel], title: str = "Schedule") -> Section:
    """Timelines with one scale, one above the other."""
    drawn = timeline_svg(panels, title="One step, pipeline rank by pipeline rank", standalone=False)
    return Section(title=title, body=(_drawn(drawn),) if panels else ())


def memory_section(
    groups: Sequence[Bars], capacity: float | None, *, title: str = "Memory", chart: str = "Memory per rank"
) -> Section:
    """Bars with the line of what a GPU has."""
    drawn = memory_svg(groups, capacity, title=chart, standalone=False)
    return Section(title=title, body=(_drawn(drawn),) if groups else ())


def points_section(
    points: Sequence[Point], *, title: str, chart: str, x_name: str, y_name: str, below: Sequence[Html] = ()
) -> Section:
    """A scatter of candidates, and what is said about them."""
    drawn = [_drawn(points_svg(points, title=chart, x_name=x_name, y_name=y_name, standalone=False))]
    return Section(title=title, body=(*(drawn if len(points) > 1 else []), *below))


def curves_section(curves: Sequence[Curve], *, title: str, chart: str, x_name: str, y_name: str) -> Section:
    """Lines over a batch or the like."""
    drawn = curves_svg(curves, title=chart, x_name=x_name, y_name=y_name, standalone=False)
    return Section(title=title, body=(_drawn(drawn),) if curves else ())


def rows(head: Sequence[str], lines: Sequence[Sequence[str]], label: str) -> Html:
    """A table of text; of many lines the first 200, and how many are left."""
    if not lines:
        return Html("")
    shown = [[printable(cell) for cell in line] for line in lines[:_MAX_ROWS]]
    left = len(lines) - len(shown)
    return join(
        [
            table([printable(cell) for cell in head], shown, label=printable(label)),
            el("p", f"{left} more are not shown.") if left else Html(""),
        ]
    )


def said(sentences: Sequence[str]) -> Html:
    """A list of sentences."""
    return el("ul", *(el("li", printable(one, 1000)) for one in sentences)) if sentences else Html("")


def folded(summary: str, *inside: Html) -> Html:
    """What is opened on demand."""
    return el("details", el("summary", printable(summary)), *inside) if any(inside) else Html("")


def code(text: str) -> Html:
    """A command or a file, as it is."""
    lines = [printable(line, 2000) for line in text.splitlines()[:400]]
    return el("pre", el("code", "\n".join(lines))) if lines else Html("")


def paragraph(words: str) -> Html:
    """A paragraph."""
    return el("p", printable(words, 2000)) if words else Html("")


def _drawn(drawing: Html) -> Html:
    return el("div", drawing, class_="card", tabindex="0", role="region", aria_label="Drawing")


def _card(card: Card) -> Html:
    tone = card.tone if card.tone in ("good", "bad") else ""
    return el(
        "div", el("span", printable(card.name, 60)), el("strong", printable(card.value, 60)),
        el("small", printable(card.unit, 120)), class_=f"figure {tone}".strip(),
    )  # fmt: skip


def _section(section: Section) -> Html:
    return el("section", el("h2", printable(section.title)), *section.body)


def _policy(style: str) -> str:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
