"""The page around the sections: one HTML file that works from a disk without any network.

The content security policy allows exactly the two scripts that are written here, by their hashes, and no connection at
all: even a mistake in escaping could not run a script or load a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from skymoe.base.errors import MissingExtraError
from skymoe.base.html import Html, el
from skymoe.report.charts import AXES, Chart
from skymoe.report.data import Material
from skymoe.report.sections import Section
from skymoe.report.series import bits_per_byte, tail_mean
from skymoe.report.verdict import Comparison, count, fixed, headline, percent, scientific


def page(material: Material, comparison: Comparison | None, sections: Sequence[Section], title: str | None) -> str:
    """The whole HTML document."""
    heading = title or headline(material, comparison)
    scripts = (_plotly(), _asset("page.js"))
    shown = [section for section in sections if section.body]
    charts = [chart for section in shown for chart in section.charts]
    head = el(
        "head",
        Html('<meta charset="utf-8">'),
        el("meta", http_equiv="Content-Security-Policy", content=_policy(scripts)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{heading} - skymoe report"),
        el("style", Html(_asset("page.css"))),
    )
    body = el(
        "body",
        _header(material, comparison, heading),
        el("nav", *(el("a", part.title, href=f"#{part.id}") for part in shown), aria_label="Sections"),
        el("main", *map(_section, shown), _notes(material, sections)),
        el("footer", el("p", "Made by ", el("code", "skymoe report"), ". One file, no network.")),
        el("script", Html(_json({"charts": [_chart_data(c) for c in charts], "axes": AXES})), type="application/json",
           id="data"),
        *(el("script", Html(script)) for script in scripts),
    )  # fmt: skip
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _header(material: Material, comparison: Comparison | None, heading: str) -> Html:
    kind = "demo" if material.demo is not None else "training runs" if len(material.runs) > 1 else "training run"
    return el(
        "header",
        el("p", el("b", "skymoe"), f" report · {kind}", class_="eyebrow"),
        el("h1", heading),
        el("p", _lede(material, comparison), class_="lede"),
        el("div", *_cards(material, comparison), class_="cards"),
    )


def _lede(material: Material, comparison: Comparison | None) -> str:
    if comparison is None or comparison.equal_tokens is None:
        return " · ".join(run.name for run in material.runs)
    common = count(comparison.equal_tokens.at)
    if material.demo is None:
        return f"{comparison.moe.name} against {comparison.dense.name} after {common} tokens each, on held-out text."
    both = f"Both models grew from one dense parent and were trained on the same {common} tokens"
    return f"{both}; the figures are on held-out text. Lower bits per byte is better."


def _cards(material: Material, comparison: Comparison | None) -> list[Html]:
    cards: list[Html] = []
    tokens, flops = (comparison.equal_tokens, comparison.equal_flops) if comparison else (None, None)
    if comparison and tokens:
        names = (
            ("Mixture of experts", "Dense, continued")
            if material.demo
            else (comparison.moe.name, comparison.dense.name)
        )
        cards.append(_card(names[0], fixed(tokens.moe), "bits per byte", tone="moe"))
        cards.append(_card(names[1], fixed(tokens.dense), "bits per byte", tone="dense"))
        cards.append(_card("At equal tokens", percent(tokens.change), "bits per byte", tone=_tone(tokens.change)))
    else:
        for run in material.runs[:3]:
            last, unit = bits_per_byte(run).last, "bits per byte"
            if last is None:
                last, unit = tail_mean(run.train["loss"]), "training loss"
            cards.append(_card(run.name, fixed(last), unit, tone="moe" if run.is_moe else "dense"))
    if flops:
        spent = f"at {scientific(flops.at)} FLOPs"
        cards.append(_card("At equal compute", percent(flops.change), spent, tone=_tone(flops.change)))
    moe = comparison.moe if comparison else material.runs[-1]
    if moe.header.get("parameters") is not None:
        active = (
            f"{count(moe.header.get('active_parameters'))} active per token" if moe.is_moe else "all of them active"
        )
        cards.append(_card("Parameters", count(moe.header["parameters"]), active))
    if "max_abs_dlogit" in material.receipt:
        exact = "exact" if material.receipt.get("exact") is True else "parity"
        value = scientific(material.receipt["max_abs_dlogit"])
        cards.append(_card("Upcycling", exact, f"largest logit change {value}"))
    return cards


def _card(name: str, value: str, unit: str, *, tone: str = "") -> Html:
    return el("div", el("span", name), el("strong", value), el("small", unit), class_=f"figure {tone}".strip())


def _tone(change: float) -> str:
    return "good" if change < 0 else "bad" if change > 0 else ""


def _section(section: Section) -> Html:
    note = el("p", section.note, class_="note") if section.note else Html("")
    return el("section", el("h2", section.title), note, section.body, id=section.id)


def _notes(material: Material, sections: Sequence[Section]) -> Html:
    """What the page cannot show, and why."""
    notes = [el("li", f"{part.title}: {part.note}") for part in sections if part.note and not part.body]
    notes += [el("li", note) for note in material.notes]
    return el("section", el("h2", "Not shown"), el("ul", *notes), id="notes") if notes else Html("")


def _chart_data(chart: Chart) -> dict[str, Any]:
    kept = ("id", "axes", "lines", "y_title", "y_format", "from_zero", "heat")
    return {name: value for name, value in asdict(chart).items() if name in kept}


def _json(data: object) -> str:
    """JSON that may stand inside a script element: no character that could end it."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(scripts: Sequence[str]) -> str:
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    style = "style-src 'unsafe-inline'"  # plotly writes its own rules
    return f"default-src 'none'; script-src {hashes}; {style}; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _asset(name: str) -> str:
    return (resources.files("skymoe.report") / "assets" / name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("skymoe report", "report") from error
    source: str = get_plotlyjs()
    assert "</script" not in source.lower(), "this plotly.js cannot stand inside a page"
    return source
