"""Who served better: medians over the rounds, ratios, and a table; of what `serve_load.summarize` found.

A server that refused or lost requests is compared with nobody: those that it did answer were served by a server with
less to do, and its latencies flatter it. How many failed stands in their place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

OURS = "skymoe"
Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
_FIGURES = {  # figure -> whether more is better
    ("output_tokens_per_s", None): True,
    ("goodput_requests_per_s", None): True,
    ("first_token_s", "p50"): False,
    ("first_token_s", "p99"): False,
    ("per_token_s", "p50"): False,
    ("between_pieces_s", "p99"): False,
    ("end_to_end_s", "p50"): False,
    ("end_to_end_s", "p99"): False,
}


def compare(rounds: Rounds) -> dict[str, Any]:
    """By figure: the median of each server, skymoe's over each other's, and whether that is a win."""
    failed = {name: sum(each["failed"] for each in found) for name, found in rounds.items()}
    figures: dict[str, Any] = {"failed": failed}
    for (figure, part), more in _FIGURES.items():
        medians = {name: _median(found, figure, part) for name, found in rounds.items()}
        whole = [name for name in rounds if name != OURS and not failed[name] and not failed[OURS]]
        ratios = {name: medians[OURS] / medians[name] for name in whole if medians[name] > 0}
        wins = {name: ratio > 1 if more else ratio < 1 for name, ratio in ratios.items()}
        figures[f"{figure} {part}" if part else figure] = {"medians": medians, "ratios": ratios, "wins": wins}
    return figures


def _median(found: Sequence[Mapping[str, Any]], figure: str, part: str | None) -> float:
    return float(median(each[figure] if part is None else each[figure][part] for each in found))


def table(figures: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"failed: {figures['failed']}"]
    for name, found in figures.items():
        if name == "failed":
            continue
        lines.append(name)
        for server, value in found["medians"].items():
            ratio = found["ratios"].get(server)
            verdict = "" if ratio is None else f"  skymoe has {ratio:.2f} of it: {_verdict(found['wins'][server])}"
            lines.append(f"    {server:32} {value:12.4f}{verdict}")
    return "\n".join(lines)


def _verdict(won: bool) -> str:
    return "wins" if won else "loses"


def as_json(result: object) -> bytes:
    """Strict JSON: what is no number is null."""
    return json.dumps(_plain(result), indent=1, allow_nan=False).encode() + b"\n"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
