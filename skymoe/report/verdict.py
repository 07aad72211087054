"""What the runs say: the comparison of one dense run with one mixture of experts, and figures in words.

The comparison is made where both curves were measured: at the smaller of the two final token counts, and at the smaller
of the two final amounts of compute. A mixture of experts spends more compute on a token: the second test is harder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from skymoe.report.data import Material, Run
from skymoe.report.metrics import number
from skymoe.report.series import bits_per_byte, common_end, value_at

MINUS = "\N{MINUS SIGN}"
NARROW = "\N{NARROW NO-BREAK SPACE}"


@dataclass(frozen=True)
class Pair:
    """Bits per byte of both runs at one abscissa."""

    at: float
    dense: float
    moe: float

    @property
    def change(self) -> float:
        """Relative difference of the mixture of experts; negative is better."""
        return self.moe / self.dense - 1


@dataclass(frozen=True)
class Comparison:
    """One dense run against one mixture of experts; a pair is None where the curves do not meet."""

    dense: Run
    moe: Run
    equal_tokens: Pair | None
    equal_flops: Pair | None


def compare(material: Material) -> Comparison | None:
    """The comparison, when there is a dense run and a mixture of experts (the last dense one, the best mixture)."""
    dense = [run for run in material.runs if not run.is_moe]
    moe = [run for run in material.runs if run.is_moe]
    if not dense or not moe:
        return None
    best = min(moe, key=lambda run: _or_infinity(bits_per_byte(run).last))
    return Comparison(dense[-1], best, *(pair(dense[-1], best, "all", axis) for axis in ("tokens", "flops")))


def pair(dense: Run, moe: Run, domain: str, axis: str) -> Pair | None:
    """Both runs' bits per byte on `domain` at the last point of `axis` ("tokens" or "flops") that both reach."""
    curves = bits_per_byte(dense, domain), bits_per_byte(moe, domain)
    xs = [curve.tokens_S if axis == "tokens" else curve.flops_S for curve in curves]
    end = common_end(*xs)
    values = [value_at(end, x_S, curve.value_S) for x_S, curve in zip(xs, curves, strict=True)]
    if values[0] is None or values[1] is None or values[0] <= 0:
        return None
    return Pair(end, values[0], values[1])


def headline(material: Material, comparison: Comparison | None) -> str:
    """The result in one sentence."""
    tokens = comparison.equal_tokens if comparison else None
    if tokens is None:
        return "Training report"
    change = tokens.change
    if abs(change) < 0.0005:
        return "On the same tokens, the mixture of experts and its dense parent are level"
    size = f"{abs(change):.1%}".replace("%", NARROW + "%")
    direction = "fewer" if change < 0 else "more"
    best = "The best" if sum(run.is_moe for run in material.runs) > 1 else "The"
    return f"{best} mixture of experts needs {size} {direction} bits per byte than the dense model"


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value


def percent(change: float | None) -> str:
    """A signed percentage with a real minus sign; a dash for nothing."""
    if change is None or not math.isfinite(change):
        return "\N{EN DASH}"
    sign = MINUS if change < -0.00005 else "+" if change > 0.00005 else "±"
    return f"{sign}{abs(change) * 100:.1f}{NARROW}%"


def count(value: object) -> str:
    """A count with a unit letter: 146.4B, 20.9M, 9.3k, 12; a dash for nothing."""
    x = number(value)
    if x is None:
        return "\N{EN DASH}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size * 0.9995:
            return f"{x / size:.3g}{letter}" if abs(x) < size * 99.95 else f"{x / size:.4g}{letter}"
    return f"{x:.4g}"


def scientific(value: object, digits: int = 2) -> str:
    """A power of ten in plain text: 4.8 x 10^-7 with real superscripts; 0 stays 0."""
    x = number(value)
    if x is None:
        return "\N{EN DASH}"
    if x == 0:
        return "0"
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa.replace('-', MINUS)}{NARROW}×{NARROW}10{raised}"


def fixed(value: object, digits: int = 3) -> str:
    """A plain decimal; a dash for nothing."""
    x = number(value)
    return "\N{EN DASH}" if x is None else f"{x:.{digits}f}".replace("-", MINUS)


def duration(value: object) -> str:
    """Seconds in words: 41 s, 3 min 20 s, 5 h 12 min."""
    x = number(value)
    if x is None or x < 0:
        return "\N{EN DASH}"
    if x < 99.5:
        return f"{x:.3g}{NARROW}s"
    minutes, seconds = divmod(round(x), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NARROW}h {minutes}{NARROW}min" if hours else f"{minutes}{NARROW}min {seconds}{NARROW}s"
