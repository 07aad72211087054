"""Numbers in drawings: short, with a unit, the same everywhere."""

from __future__ import annotations

import math

from skymoe.base.errors import printable
from skymoe.plan.draw.panel import Panel

GB = 1e9


def name(text: str, limit: int = 80) -> str:
    """A name from anywhere, without control characters (which XML cannot hold at all), of bounded length."""
    return printable(text, limit)


def time(value: float, unit: str = "s") -> str:
    """12.3 s, 45 ms; in abstract units the number alone."""
    if unit != "s":
        return f"{value:.4g} {unit}".rstrip()
    for size, short in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:{'.3g' if abs(value) < 999.5 * size else '.0f'}} {short}"
    return f"{value * 1e6:.0f} µs" if value else "0"


def percent(share: float) -> str:
    """10 %, 1.5 %, 0.2 %."""
    digits = 0 if share >= 0.0995 or share < 0.0005 else 1
    return f"{100 * share:.{digits}f} %"


def gigabytes(size: float) -> str:
    """Of 10^9 bytes."""
    return f"{size / GB:.3g}" if size < 99.95 * GB else f"{size / GB:.0f}"


def short(value: float) -> str:
    """For axes: 950, 12.5k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if letter == "k" else 1):
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`: 1, 2 or 5 times a power of ten apart."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def figures(panel: Panel) -> str:
    """Step, bubble and period of a panel."""
    timeline = panel.timeline
    words = [f"step {time(timeline.span_s, panel.unit)}", f"bubble {percent(timeline.bubble)}"]
    stages = {span.stage for span in timeline.spans} or {0}
    period, last = timeline.period_s(min(stages)), timeline.period_s(max(stages))
    if period and abs(period - last) <= 0.02 * period:  # else there is no steady state to speak of
        words.append(f"a micro-batch every {time(period, panel.unit)}")
    return " · ".join(words)
