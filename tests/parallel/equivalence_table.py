"""The page of the equivalence matrix (docs/equivalence.md), made from what a run of it measured.

A result is a plain dict: the fields of its `Case`, the worst relative error against one process of `loss`, `gradients`,
`weights` (after three steps) and `alpha`, and if it was timed `seconds`. A worst figure is the largest, and NaN is
larger than everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.covering import AXES, all_cases

from skymoe.base.errors import ConfigError

FIGURES = ("loss", "gradients", "weights", "alpha")
MEASURE = "A figure is the largest relative error over all tensors of that kind."
_CHOICES = ("expert", "dispatch", "schedule", "recompute", "capacity")

Result = Mapping[str, Any]


def write_table(
    results: Sequence[Result], path: Path, *, command: str, measure: str = MEASURE, tolerance: float = 1e-5
) -> None:
    """Write the page: the verdict, the worst figure of each value of each axis, then every case by its ranks.

    Args:
        results: one dict a case, see the module docstring.
        path: the Markdown file.
        command: the line that made the results.
        measure: one sentence on how the error of a tensor is reckoned.
        tolerance: relative error up to which a case holds.
    """
    if not results:
        raise ConfigError("no results to write a table of", where=path)
    ordered = sorted(results, key=lambda result: (_world(result), *(_place(result, axis) for axis in AXES)))
    parts = [_verdict(ordered, command, measure, tolerance), _by_value(ordered, tolerance), "\n## Every case\n"]
    meshes = dict.fromkeys(_mesh(result) for result in ordered)
    parts += [_mesh_table([r for r in ordered if _mesh(r) == mesh], tolerance) for mesh in meshes]
    path.write_text("\n".join(parts), encoding="utf-8")


def _verdict(results: Sequence[Result], command: str, measure: str, tolerance: float) -> str:
    failed = [result for result in results if not _holds(_worst([result], FIGURES), tolerance)]
    worst = max(results, key=lambda result: _order(_worst([result], FIGURES)))
    worlds = sorted({_world(result) for result in results})
    verdict = (
        f"{len(failed)} of {len(results)} cases do not hold."
        if failed
        else f"All {len(results)} cases hold, on {', '.join(map(str, worlds))} gloo processes."
    )
    lines = [
        "# Equivalence: every layout computes what one process computes",
        "",
        f"Loss, every gradient, and the weights and α after three steps, of {_scope(results)},",
        "against one process in fp32.",
        f"{measure} A case holds up to {tolerance:.1e}.",
        "",
        f"**{verdict}** The worst figure of all is {_text(_worst([worst], FIGURES), math.inf)}:",
        f"`{_name(worst)}`.",
        "",
        "Made by",
        "",
        "```",
        command,
        "```",
        "",
        "What the axes mean: [parallelism.md](parallelism.md).",
    ]
    if seconds := sum(float(result.get("seconds") or 0.0) for result in results):
        lines += ["", f"The cases together took {seconds:.0f} s."]
    return "\n".join(lines) + "\n"


def _scope(results: Sequence[Result]) -> str:
    """All combinations, or how many of them."""
    total = len(all_cases())
    if len(results) == total:
        return f"each of the {total} legal combinations of the axes below"
    return f"{len(results)} of the {total} legal combinations of the axes below"


def _by_value(results: Sequence[Result], tolerance: float) -> str:
    rows = []
    for axis, values in AXES.items():
        for value in values:
            having = [result for result in results if str(result[axis]) == str(value)]
            if having:
                figures = [_text(_worst(having, [figure]), tolerance) for figure in FIGURES]
                rows.append([axis, str(value), str(len(having)), *figures])
    return "\n".join(["## Worst figure by value of an axis", "", *_table(["axis", "value", "cases", *FIGURES], rows)])


def _mesh_table(results: Sequence[Result], tolerance: float) -> str:
    first = results[0]
    title = f"### {_world(first)} ranks: pp {first['pp']}, tp {first['tp']}, dp {first['dp']}"
    rows = [
        [*(str(result[axis]) for axis in _CHOICES), *(_text(_worst([result], [f]), tolerance) for f in FIGURES)]
        for result in results
    ]
    summary = f"Worst of {len(results)}: {_text(_worst(results, FIGURES), tolerance)}."
    return "\n".join([title, "", summary, "", *_table([*_CHOICES, *FIGURES], rows), ""])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _worst(results: Iterable[Result], figures: Sequence[str]) -> float | None:
    """The largest figure; None where a case has none (α of a dense model)."""
    values = [float(value) for result in results for figure in figures if (value := result[figure]) is not None]
    return max(values, key=_order) if values else None


def _order(value: float | None) -> float:
    return -1.0 if value is None else math.inf if math.isnan(value) else value


def _holds(value: float | None, tolerance: float) -> bool:
    return value is None or value <= tolerance


def _text(value: float | None, tolerance: float) -> str:
    if value is None:
        return "-"
    plain = "0" if value == 0 else f"{value:.1e}"
    return plain if _holds(value, tolerance) else f"**{plain}**"


def _world(result: Result) -> int:
    return int(result["pp"]) * int(result["tp"]) * int(result["dp"])


def _mesh(result: Result) -> tuple[int, int, int]:
    return int(result["pp"]), int(result["tp"]), int(result["dp"])


def _place(result: Result, axis: str) -> int:
    return [str(value) for value in AXES[axis]].index(str(result[axis]))


def _name(result: Result) -> str:
    ranks = "-".join(f"{axis}{result[axis]}" for axis in ("pp", "tp", "dp"))
    return "-".join([ranks, *(str(result[axis]) for axis in _CHOICES)])
