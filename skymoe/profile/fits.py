"""Two laws fitted to measured points, by relative error: a microsecond counts for a small message, not for a large one.

    links   t = alpha + f bytes / B                                      weighted least squares, alpha >= 0
    GEMM    t = t0 + sqrt((2MKN / rate)^2 + (bytes / bandwidth)^2)       search over the three logarithms

The GEMM law is that of the planner (plan/hardware/gpu.py); it fits 37,584 measured products on three GPUs within 6 to
10 %. On a CPU, whose caches have no place in it, it fits worse: the error is written beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """t = start + x / rate."""

    start: float
    rate: float
    error: float


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """Through (x, t), t > 0, minimising the sum of squared relative errors; start >= 0 and rate > 0."""
    rows = [(1 / t, x / t) for x, t in points]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = aa * bb - ab * ab
    start = max(0.0, (a * bb - b * ab) / determinant) if determinant > 1e-9 * aa * bb else 0.0
    slope = (b - start * ab) / bb
    if slope <= 0:  # time does not grow with size here: latency is all there is
        start, slope = a / aa, 1e-15
    error = sum(abs(start + slope * x - t) / t for x, t in points) / len(points)
    return Line(start, 1 / slope, error)


@dataclass(frozen=True)
class GemmFit:
    """t = launch_s + sqrt((flops / rate)^2 + (bytes / bandwidth)^2)."""

    rate: float
    bandwidth: float
    launch_s: float
    error: float


def fit_gemm(points: Sequence[tuple[float, float, float]]) -> GemmFit:
    """Through (flops, bytes, seconds)."""

    def seconds(logs: Sequence[float], flops: float, size: float) -> float:
        rate, bandwidth, launch_s = map(math.exp, logs)
        return launch_s + math.hypot(flops / rate, size / bandwidth)

    def error(logs: Sequence[float]) -> float:
        return sum(abs(math.log(seconds(logs, flops, size) / t)) for flops, size, t in points)

    start = [
        math.log(max(flops / t for flops, _, t in points)),
        math.log(4 * max(size / t for _, size, t in points)),
        math.log(min(t for _, _, t in points) / 4),
    ]
    rate, bandwidth, launch_s = map(math.exp, _descend(error, start))
    logs = [math.log(value) for value in (rate, bandwidth, launch_s)]
    mean = sum(abs(seconds(logs, flops, size) / t - 1) for flops, size, t in points) / len(points)
    return GemmFit(rate, bandwidth, launch_s, mean)


def _descend(error: Callable[[Sequence[float]], float], start: Sequence[float]) -> list[float]:
    """Pattern search: a step along each coordinate while it helps, then half the step."""
    best, value, step = list(start), error(start), 1.0
    while step > 1e-3:
        moved = False
        for place in range(len(best)):
            for sign in (step, -step):
                tried = [x + sign * (i == place) for i, x in enumerate(best)]
                if (found := error(tried)) < value:
                    best, value, moved = tried, found, True
        step = step if moved else step / 2
    return best
