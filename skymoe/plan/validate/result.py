"""What a validation says: comparisons, gathered by group and quantity, and the gates that they must hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from skymoe.plan.validate.cases import NotJudged


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure, predicted and measured.

    Attributes:
        case, group: whose figure.
        quantity: "step_time", "memory", "gain", "bubble", "period", "stage_time", "gemm", "collective", "decode", ..
        unit: of both figures.
        predicted, measured: the figures; neither is 0.
        known: tensor, pipeline and data parallel ranks, micro-batch, their number and recomputation are all published;
            else what is missing was assumed.
        moe: a mixture of experts.
        assumed: what was.
    """

    case: str
    group: str
    quantity: str
    unit: str
    predicted: float
    measured: float
    known: bool = True
    moe: bool = False
    assumed: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """predicted / measured - 1; for bubbles, which may be nearly 0, and gains: the difference."""
        if self.quantity == "bubble":
            return self.predicted - self.measured
        return self.predicted / self.measured - 1.0


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """The comparisons of one quantity in one group.

    Attributes:
        group, quantity: which.
        comparisons: at least one, unless everything is set aside.
        not_judged: what is set aside.
        convention: how the source counts FLOPs, where its figures are FLOP/s or MFU.
    """

    group: str
    quantity: str
    comparisons: tuple[Comparison, ...]
    not_judged: tuple[NotJudged, ...] = ()
    convention: str = ""

    @property
    def mape(self) -> float:
        """Mean absolute error, relative (bubbles: absolute)."""
        return mape(self.comparisons)

    @property
    def bias(self) -> float:
        """Mean error: positive when predictions are too large."""
        return fmean(c.error for c in self.comparisons) if self.comparisons else float("nan")

    @property
    def worst(self) -> Comparison | None:
        """The comparison with the largest error."""
        return max(self.comparisons, key=lambda c: abs(c.error), default=None)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A promise.

    Attributes:
        name: what is promised.
        limit: the largest value that holds it.
        value: the value found; None without a comparison.
        num_cases: over how many comparisons.
    """

    name: str
    limit: float
    value: float | None
    num_cases: int

    @property
    def holds(self) -> bool | None:
        """None without a comparison."""
        return None if self.value is None else self.value <= self.limit


def mape(comparisons: Iterable[Comparison]) -> float:
    """Mean absolute error; NaN without a comparison."""
    errors = [abs(c.error) for c in comparisons]
    return fmean(errors) if errors else float("nan")


def grouped(
    comparisons: Sequence[Comparison], not_judged: Sequence[NotJudged], conventions: dict[str, str]
) -> list[GroupResult]:
    """By group and quantity, in the order of the names. What is set aside stands with its group's first quantity."""
    found: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        found[comparison.group, comparison.quantity].append(comparison)
    aside: dict[str, list[NotJudged]] = defaultdict(list)
    for case in not_judged:
        aside[case.group].append(case)
    for group in aside:
        if not any(key[0] == group for key in found):
            found[group, ""] = []
    return [
        GroupResult(
            group=group, quantity=quantity, comparisons=tuple(found[group, quantity]),
            not_judged=tuple(aside.pop(group, ())), convention=conventions.get(group, ""),
        )
        for group, quantity in sorted(found)
    ]  # fmt: skip
