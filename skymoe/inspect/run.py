"""`skymoe inspect`: what a model is and what it costs, from a directory or a preset."""

from __future__ import annotations

from skymoe.inspect.config import InspectConfig
from skymoe.inspect.result import InspectReport


def run(config: InspectConfig) -> InspectReport:
    """Describe `config.model`; print it with `skymoe.inspect.table.show`, or `report.as_json()`."""
    raise NotImplementedError
