"""The parts of the page that are text: receipt, samples, configuration, environment, how to reproduce it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from skymoe.base.document import parse_yaml
from skymoe.base.errors import SkymoeError
from skymoe.base.html import Html, el, facts, join, table
from skymoe.report.data import Material, Run
from skymoe.report.sections import Section, missing, swatch
from skymoe.report.verdict import duration, scientific

_NAMES = {"dense": "dense, continued", "moe": "MoE"}
_MAX_ROWS = 400
_MAX_DEPTH = 8


def receipt(material: Material) -> Section:
    """The parity receipt of upcycling: does the mixture of experts start as the same function?"""
    data = material.receipt
    if not data:
        note = "No upcycling receipt was found beside these runs."
        return missing("receipt", "Upcycling receipt", note)
    verdict = Html("")
    if isinstance(data.get("exact"), bool):
        verb = "computes the same function as" if data["exact"] else "does not compute exactly the function of"
        verdict = el("p", el("strong", f"The new model {verb} its dense parent. "), str(data.get("reason", "")))
    names = {"max_abs_dlogit": "largest change of a logit", "kl": "Kullback-Leibler divergence"}
    rows = [(words, scientific(data[key])) for key, words in names.items() if key in data]
    shown = {"exact", "reason", *names}
    rows += [(key, _show(value)) for key, value in flatten({k: v for k, v in data.items() if k not in shown})]
    return Section("receipt", "Upcycling receipt", el("div", verdict, facts(rows), class_="card"))


def samples(material: Material) -> Section:
    """Continuations of the same prompts, side by side."""
    if not material.samples:
        return missing("samples", "Samples", "No sample texts were written.")
    cards = []
    for row in material.samples[:50]:
        texts = [
            el(
                "div",
                el("h4", _NAMES.get(name, name)),
                el("p", el("b", row["prompt"]), text),
                class_=f"sample {_tone(name)}",
            )
            for name, text in row.items()
            if name != "prompt"
        ]
        cards.append(el("div", *texts, class_="card samples"))
    intro = el("p", "The prompt is bold. Small models write small sentences: look at the difference, not at the wit.")
    return Section("samples", "Samples", join([intro, *cards]))


def configuration(runs: Sequence[Run], colors: Mapping[str, str]) -> Section:
    """Where the recipes differ, and all of them."""
    written = [run for run in runs if run.recipe]
    if not written:
        return missing("config", "Configuration", "The run directories hold no recipe.yaml.")
    parts = []
    if len(written) > 1:
        parts += _differences({run.name: _keys(run) for run in written}, colors)
    parts += [
        el("details", el("summary", f"Recipe of {run.name}"), el("pre", el("code", run.recipe))) for run in written
    ]
    return Section("config", "Configuration", join(parts))


def environment(runs: Sequence[Run], colors: Mapping[str, str]) -> Section:
    """The machine and the versions; one column when all runs had the same."""
    known = {run.name: dict(flatten(_without_command(run.environment))) for run in runs if run.environment}
    if not known:
        return missing("environment", "Environment", "The run directories hold no environment.json.")
    first = next(iter(known.values()))
    rows: list[tuple[str, str | Html]] = [(key, _show(value)) for key, value in first.items()]
    parts = [el("div", facts(rows), class_="card")]
    if any(keys != first for keys in known.values()):
        parts += [el("p", f"Shown for {next(iter(known))}; the runs differ:"), *_differences(known, colors)]
    return Section("environment", "Environment", join(parts))


def reproduce(material: Material) -> Section:
    """The commands that make these runs and this page again, what happened on the way, and how long it took."""
    if material.demo is not None:
        seed = material.summary.get("seed", 0)
        quick = " --quick" if material.summary.get("quick") is True else ""
        command = _command(
            material.summary, f"skymoe demo --out {shlex.quote(material.demo.name)} --seed {seed}{quick}"
        )
        lines = [command, f"skymoe report {shlex.quote(material.demo.name)}"]
    else:
        recipes = [f"skymoe train {shlex.quote(run.path.name + '/recipe.yaml')}" for run in material.runs]
        lines = [_command(run.environment, recipe) for run, recipe in zip(material.runs, recipes, strict=True)]
        lines.append("skymoe report " + " ".join(shlex.quote(run.path.name) for run in material.runs))
    parts = [el("pre", el("code", "\n".join(lines)))]
    seconds = material.summary.get("seconds")
    if isinstance(seconds, dict) and seconds:
        rows = [(str(stage), duration(value)) for stage, value in seconds.items()]
        parts.append(el("div", el("h3", "Time by stage"), facts(rows), class_="card"))
    parts += _history(material.runs)
    return Section("reproduce", "Reproduce", join(parts))


def flatten(data: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values, at most a few hundred and not too deep: files may hold anything."""
    return islice(_flatten(data, prefix, depth), _MAX_ROWS)


def _flatten(data: object, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping) and data and depth < _MAX_DEPTH:
        for key, value in data.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    elif isinstance(data, list) and any(isinstance(item, dict | list) for item in data) and depth < _MAX_DEPTH:
        for index, item in enumerate(data):
            yield from _flatten(item, f"{prefix}[{index}]", depth + 1)
    else:
        yield prefix, data


def _keys(run: Run) -> dict[str, Any]:
    try:
        return dict(flatten(parse_yaml(run.recipe, "recipe.yaml").data))
    except SkymoeError:
        return {}


def _differences(known: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str]) -> list[Html]:
    keys = list(dict.fromkeys(key for values in known.values() for key in values))
    rows = [
        (key, *(_show(values[key]) if key in values else "–" for values in known.values()))
        for key in keys
        if len({_show(values.get(key)) for values in known.values()}) > 1
    ]
    if not rows:
        return [el("p", "The runs have the same settings.")]
    head = ["differs", *(swatch(name, colors[name]) for name in known)]
    return [table(head, rows, label="Settings that differ between the runs")]


def _history(runs: Sequence[Run]) -> list[Html]:
    rows = [
        (run.name, _show(event.get("step")), _show(event.get("event")), _show(event.get("detail", "")))
        for run in runs
        for event in run.events
        if event.get("event") not in ("start", "save", "stop")
    ]
    if not rows:
        return []
    head = ["run", "step", "event", "detail"]
    return [el("h3", "What happened on the way"), table(head, rows[:_MAX_ROWS], label="Events of the runs")]


def _without_command(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in ("command", "argv")}


def _command(data: Mapping[str, Any], otherwise: str) -> str:
    """The recorded command line, as text or as a list of words."""
    command = data.get("command", data.get("argv"))
    if isinstance(command, list) and command:
        return shlex.join(map(str, command))
    return command if isinstance(command, str) and command else otherwise


def _show(value: object) -> str:
    if isinstance(value, str):
        return value[:2000]
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False, default=str)[:2000]


def _tone(name: str) -> str:
    return "moe" if "moe" in name.lower() else "dense" if "dense" in name.lower() else ""
