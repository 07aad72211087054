"""How far the planner was off against published measurements, as its last validation found: the figures of
docs/plan_accuracy.md as data (`accuracy.json`), so that every plan can say how far to trust it.

Written by `skymoe plan validate --cases FILE --write-accuracy skymoe/plan/accuracy.json`, never by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from skymoe.base.strict_json import read_json_object

FILE = Path(__file__).with_name("accuracy.json")


@dataclass(frozen=True)
class Found:
    """One promise and how it was met.

    Attributes:
        name: of the gate.
        error: mean absolute relative error, or a count.
        limit: the largest that was asked for.
        num_cases: figures compared.
    """

    name: str
    error: float
    limit: float
    num_cases: int

    @property
    def said(self) -> str:
        """In words."""
        verdict = "" if self.error <= self.limit else f", more than the {self.limit:.0%} aimed at"
        return f"{self.name}: {self.error:.1%} off on average over {self.num_cases} published figures{verdict}"


@cache
def found() -> dict[str, Found]:
    """All that have a figure, by name."""
    rows = read_json_object(FILE, max_bytes=1 << 16)["gates"]
    return {row["name"]: Found(row["name"], row["error"], row["limit"], row["num_cases"]) for row in rows}


def encode(all_found: Iterable[Found]) -> bytes:
    """The file."""
    rows = [
        {"name": one.name, "error": round(one.error, 4), "limit": one.limit, "num_cases": one.num_cases}
        for one in all_found
    ]
    return (json.dumps({"gates": rows}, indent=1) + "\n").encode()
