"""The page: no script, nothing from outside, everything escaped, one style sheet that its policy knows by hash."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

from skymoe.plan.draw.page import (
    Card,
    Page,
    Section,
    code,
    folded,
    html_page,
    memory_section,
    paragraph,
    points_section,
    rows,
    said,
    schedule_section,
)  # fmt: skip
from skymoe.plan.draw.panel import Bars, Panel, Point
from skymoe.plan.orders import one_f_one_b
from skymoe.plan.simulator import simulate

HOSTILE = '</style><script>alert(1)</script><img src=x onerror="alert(2)">\x00'
VOID = {"meta", "br", "input"}


class Checker(HTMLParser):
    """All elements are closed in order; what the page has is listed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def hostile_page() -> str:
    timeline = simulate(one_f_one_b(2, 3), [1.0, 1.0], [2.0, 2.0])
    memory = {"weights": 1e9, "gradients": 1e9, "optimizer": 0, "activations": 3e9, "transient": 0, "reserve": 1e9}
    return html_page(
        Page(
            kind=HOSTILE,
            title=HOSTILE,
            lede=HOSTILE,
            cards=(Card(name=HOSTILE, value=HOSTILE, unit=HOSTILE, tone='" onclick="x'),),
            sections=(
                schedule_section([Panel(title=HOSTILE, timeline=timeline)]),
                memory_section([Bars(title=HOSTILE, ranks=(memory,))], 5e9),
                points_section(
                    [Point(x=1, y=1, name=HOSTILE), Point(x=2, y=2, name=HOSTILE, chosen=True)],
                    title=HOSTILE,
                    chart=HOSTILE,
                    x_name=HOSTILE,
                    y_name=HOSTILE,
                    below=(rows((HOSTILE,), [(HOSTILE,)] * 300, HOSTILE), folded(HOSTILE, code(HOSTILE))),
                ),  # fmt: skip
                Section(title=HOSTILE, body=(said([HOSTILE]), paragraph(HOSTILE))),
                Section(title="left out", body=(said([]),)),
            ),
        )
    )


def test_hostile_names_do_nothing() -> None:
    page = hostile_page()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    tags = {tag for tag, _ in checker.seen}
    assert not tags & {"script", "img", "iframe", "link", "object", "form", "a", "base"}
    assert not any(name.startswith("on") or name in ("style", "src", "href") for _, own in checker.seen for name in own)
    assert "\x00" not in page
    assert "left out" not in "".join(checker.words), "an empty section has no heading"
    assert "100 more are not shown." in checker.words


def test_the_policy_allows_the_style_sheet_and_nothing_else() -> None:
    page = hostile_page()
    style = page.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    expected = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert policy[1].replace("&#x27;", "'") == expected
    assert page.count("<style>") == 1, "drawings in a page use its style sheet"
    assert "url(" not in style and "@import" not in style and "://" not in page
