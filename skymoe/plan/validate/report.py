"""What `skymoe plan validate` answers, and its JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skymoe.plan.validate.cases import NotJudged
from skymoe.plan.validate.result import Comparison, Gate, GroupResult

SCHEMA = "skymoe.plan.validate/1"


@dataclass(frozen=True, kw_only=True)
class ValidateReport:
    """What came out.

    Attributes:
        cases: the file's name.
        num_cases: rows in it, of the groups that were asked for.
        groups: by group and quantity.
        gates: the promises.
    """

    cases: str
    num_cases: int
    groups: tuple[GroupResult, ...]
    gates: tuple[Gate, ...]

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """All of them."""
        return tuple(comparison for group in self.groups for comparison in group.comparisons)

    @property
    def not_judged(self) -> tuple[NotJudged, ...]:
        """All that is set aside."""
        return tuple(case for group in self.groups for case in group.not_judged)

    def worst(self, number: int) -> tuple[Comparison, ...]:
        """The comparisons with the largest errors."""
        return tuple(sorted(self.comparisons, key=lambda c: -abs(c.error))[:number])

    def as_json(self, *, worst: int = 10) -> dict[str, Any]:
        """As documented in docs/plan_accuracy.md."""
        return {
            "schema": SCHEMA,
            "cases": self.cases,
            "num_cases": self.num_cases,
            "num_comparisons": len(self.comparisons),
            "gates": [
                {"name": g.name, "limit": g.limit, "value": g.value, "num_cases": g.num_cases, "holds": g.holds}
                for g in self.gates
            ],
            "groups": [_group_json(group) for group in self.groups],
            "worst": [_comparison_json(comparison) for comparison in self.worst(worst)],
        }


def _group_json(group: GroupResult) -> dict[str, Any]:
    found = bool(group.comparisons)
    return {
        "group": group.group,
        "quantity": group.quantity,
        "num_comparisons": len(group.comparisons),
        "mape": group.mape if found else None,
        "bias": group.bias if found else None,
        "worst": group.worst.case if group.worst else None,
        "convention": group.convention,
        "comparisons": [_comparison_json(comparison) for comparison in group.comparisons],
        "not_judged": [{"case": case.case, "reason": case.reason} for case in group.not_judged],
    }


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "case": comparison.case,
        "group": comparison.group,
        "quantity": comparison.quantity,
        "unit": comparison.unit,
        "predicted": comparison.predicted,
        "measured": comparison.measured,
        "error": comparison.error,
        "fully_known": comparison.known,
        "moe": comparison.moe,
        "assumed": list(comparison.assumed),
    }
