"""Curves: thinning, smoothing, reading a value at equal tokens or equal compute.

Shapes: S points of a curve, N layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skymoe.report.data import Run
from skymoe.report.metrics import number

Floats = NDArray[np.float64]
Points = list[float | None]


@dataclass(frozen=True)
class EvalCurve:
    """One held-out measure over a run: the measured points with both of their abscissas."""

    tokens_S: Floats
    flops_S: Floats
    value_S: Floats

    def __len__(self) -> int:
        return len(self.value_S)

    @property
    def last(self) -> float | None:
        """The final value."""
        return float(self.value_S[-1]) if len(self) else None


def bits_per_byte(run: Run, domain: str = "all") -> EvalCurve:
    """Held-out bits per byte of `run` on `domain`, at the evaluations that have it."""
    rows = []
    for record in run.evals:
        values = record.get("bits_per_byte")
        value = number(values.get(domain)) if isinstance(values, dict) else None
        if value is not None:
            rows.append((_or_nan(record.get("tokens")), _or_nan(record.get("flops")), value))
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)
    return EvalCurve(table[:, 0], table[:, 1], table[:, 2])


def domains(runs: Sequence[Run]) -> tuple[str, ...]:
    """Names of the evaluation domains in order of appearance, without "all"."""
    found: dict[str, None] = {}
    for run in runs:
        for record in run.evals:
            values = record.get("bits_per_byte")
            found |= dict.fromkeys(values if isinstance(values, dict) else ())
    return tuple(name for name in found if name != "all")


def value_at(x: float, x_S: Floats, value_S: Floats) -> float | None:
    """The curve at `x`, linear between points; None outside the measured range."""
    known = np.isfinite(x_S) & np.isfinite(value_S)
    x_S, value_S = x_S[known], value_S[known]
    if not len(x_S) or not math.isfinite(x) or x > x_S[-1] * (1 + 1e-9) or x < x_S[0]:
        return None
    return float(np.interp(x, x_S, value_S))


def common_end(first_S: Floats, second_S: Floats) -> float:
    """The largest abscissa that both curves reach; NaN when one has none."""
    if not len(first_S) or not len(second_S):
        return math.nan
    return float(min(first_S[-1], second_S[-1]))


def thin(length: int, max_points: int) -> NDArray[np.int64]:
    """Indices of at most `max_points` evenly spaced points out of `length`, both ends included."""
    if length <= max_points:
        return np.arange(length)
    return np.round(np.linspace(0, length - 1, max_points)).astype(np.int64)


def smooth(value_S: Floats, span: float) -> Floats:
    """Mean over about `span` neighbouring points, centred (no lag), with a shorter window at the start.

    NaNs take no part and stay NaN. Works along the first axis, on (S,) or (S, N).
    """
    half = int(span // 2)
    if half < 1 or not len(value_S):
        return value_S
    known = np.isfinite(value_S)
    zero = np.zeros((1, *value_S.shape[1:]))
    total = np.concatenate([zero, np.where(known, value_S, 0.0).cumsum(0)])
    count = np.concatenate([zero, known.cumsum(0)])
    index = np.arange(len(value_S))
    back = np.minimum(half, index)  # the steep start is not averaged with what follows; the flat end may look back
    low, high = index - back, np.minimum(len(value_S), index + back + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, (total[high] - total[low]) / (count[high] - count[low]), np.nan)


def points(values: Floats) -> Points:
    """Plain numbers for JSON: six significant digits, None for a gap."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def mean(values: Floats, axis: int | None = None) -> Floats:
    """Mean that ignores NaN, without a warning where there is nothing."""
    known = np.isfinite(values)
    count = known.sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis=axis) / count, dtype=np.float64)


def tail_mean(values: Floats, share: float = 0.1) -> float | None:
    """Mean over the last `share` of the rows (at least one): a steady reading of a noisy column."""
    if not len(values):
        return None
    result = float(mean(values[-max(1, round(len(values) * share)) :]))
    return result if math.isfinite(result) else None


def _or_nan(value: object) -> float:
    result = number(value)
    return math.nan if result is None else result
