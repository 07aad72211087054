"""Read `metrics.jsonl`: one JSON object a line, training records into columns.

Tolerant on purpose: a last line cut off by a crash, a null or NaN where a number belongs, and layers that come and go
are gaps, not errors. Training records become columns of float64 at once, so that a hundred thousand steps of fifty
layers fit in memory.

Shapes: S training records, N MoE layers.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("step", "tokens", "flops", "loss", "aux_loss", "lr", "grad_norm", "tokens_per_s", "mfu_causal", "mfu_full",
           "seconds", "hfu", "tokens_per_s_per_device", "world_size")  # fmt: skip
LAYER_COLUMNS = ("drop_rate", "alpha", "max1_max2", "max2_max3", "load_cov", "dead_experts", "gate_entropy")
_MAX_LINE_BYTES = 64 * 2**20


def number(value: object) -> float | None:
    """`value` as a finite float, or None: metrics may hold NaN, null or anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


class Columns:
    """Training records as growing columns."""

    def __init__(self) -> None:
        self._train = {name: array("d") for name in COLUMNS}
        self._layers: dict[str, list[array[float]]] = {}

    def __len__(self) -> int:
        return len(self._train["step"])

    def append(self, record: dict[str, Any]) -> None:
        """Add one record. A step that was seen before replaces it and all later ones (a resumed run)."""
        steps = self._train["step"]
        while len(self) and steps[-1] >= record["step"]:
            for column in self._train.values():
                column.pop()
            for rows in self._layers.values():
                rows.pop()
        for name, column in self._train.items():
            column.append(_or_nan(record.get(name)))
        layers = record.get("layers")
        for name in LAYER_COLUMNS:
            values = layers.get(name) if isinstance(layers, dict) else None
            if isinstance(values, list) and name not in self._layers:
                self._layers[name] = [array("d")] * (len(self) - 1)
            if name in self._layers:
                self._layers[name].append(array("d", map(_or_nan, values if isinstance(values, list) else ())))

    def arrays(self) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
        """The columns as numpy arrays; layer rows of another width are padded with NaN."""
        train = {name: np.array(column, dtype=np.float64) for name, column in self._train.items()}
        layers = {}
        for name, rows in self._layers.items():
            width = max(map(len, rows), default=0)
            values_SN = np.full((len(rows), width), np.nan)
            for index, row in enumerate(rows):
                values_SN[index, : len(row)] = row
            if width:
                layers[name] = values_SN
        return train, layers


def _or_nan(value: object) -> float:
    result = number(value)
    return math.nan if result is None else result


def read_records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line. Lines that are none are counted in one note."""
    bad = 0
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            record = _parse(line) if line.strip() else {}
            bad += record is None
            if record:
                yield record
    if bad:
        notes.append(f"{bad} line(s) of {path.name} could not be read and were left out")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
