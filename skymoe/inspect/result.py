"""InspectReport: the stable answer of `skymoe inspect`, schema 1."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class InspectReport:
    """Everything `skymoe inspect` found."""

    schema: int

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)
