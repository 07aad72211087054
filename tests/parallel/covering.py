"""The axes of the equivalence matrix, all their legal combinations, and a small subset that still meets every pair.

The matrix compares a distributed step with one process. Its 1620 cases on up to 8 ranks are the slow command; what CI
runs is a *covering* subset: for any two axes, every two of their values that can be had together occur together in
some case. Bugs of such systems come from one value or from two that meet, rarely from more (pairwise testing).

A pair counts only where it makes a difference. On one tensor-parallel rank the three ways of dispatch are one, so
`A` with `ep` there would tick a box and test nothing; such a pair has to occur on ranks where both values are *live*,
if there is a legal case like that. And the three expert axes are three different things only on a plane of dp 2 x
tp 2, so each of them meets each way of dispatch there.

    python tests/parallel/covering.py [strength]      prints the subset
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from skymoe.spec.layout import DispatchMode, ExpertAxis, ScheduleKind

MAX_WORLD = 8
AXES: dict[str, tuple[Any, ...]] = {
    "pp": (1, 2, 3),
    "tp": (1, 2, 3),
    "dp": (1, 2),
    "expert": tuple(ExpertAxis),
    "dispatch": tuple(DispatchMode),
    "schedule": tuple(ScheduleKind),
    "recompute": ("none", "some", "all"),
    "capacity": ("dropless", "capacity"),
}
_RESTARTS = 24

Goal = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, order=True)
class Case:
    """One combination: what is compared with one process.

    Attributes:
        pp, tp, dp: ranks per axis.
        expert, dispatch, schedule: as in a layout.
        recompute: `none`, `some` (a different number of layers in each stage) or `all`.
        capacity: `dropless`, or `capacity`: experts drop above it.
    """

    pp: int
    tp: int
    dp: int
    expert: ExpertAxis
    dispatch: DispatchMode
    schedule: ScheduleKind
    recompute: str
    capacity: str

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pp * self.tp * self.dp

    @property
    def is_legal(self) -> bool:
        """Few enough ranks, and a schedule that has something to schedule."""
        return self.world_size <= MAX_WORLD and (self.pp > 1 or self.schedule is ScheduleKind.ONE_F_ONE_B)

    def is_live(self, axis: str) -> bool:
        """Whether the value of `axis` makes a difference on these ranks."""
        match axis:
            case "expert":
                ranks = {ExpertAxis.EDP: self.tp, ExpertAxis.EP: self.dp, ExpertAxis.ETP: self.dp * self.tp}
                return ranks[self.expert] > 1
            case "dispatch":
                return self.tp > 1 or (self.dp > 1 and self.expert is not ExpertAxis.EDP)
            case "schedule":
                return self.pp > 1
            case _:
                return True

    def __str__(self) -> str:
        ranks = f"pp{self.pp}-tp{self.tp}-dp{self.dp}"
        return f"{ranks}-{self.expert}-{self.dispatch}-{self.schedule}-{self.recompute}-{self.capacity}"


def all_cases() -> list[Case]:
    """Every legal combination, small worlds first."""
    cases = [Case(*values) for values in product(*AXES.values())]
    return sorted((case for case in cases if case.is_legal), key=lambda case: (case.world_size, case))


def goals(cases: Sequence[Case], strength: int = 2) -> dict[Goal, list[Case]]:
    """What a subset has to contain: for each combination of `strength` values the cases that count for it."""
    found: dict[Goal, list[Case]] = {}
    for axes in combinations(AXES, strength):
        for case in cases:
            found.setdefault(tuple((axis, getattr(case, axis)) for axis in axes), []).append(case)
    found = {goal: _live(goal, having) for goal, having in found.items()}
    for case in cases:
        if (case.dp, case.tp) == (2, 2):
            crossing = ("dp", "tp", "expert", "dispatch")
            found.setdefault(tuple((axis, getattr(case, axis)) for axis in crossing), []).append(case)
    return found


def covering_subset(strength: int = 2, seed: int = 0) -> list[Case]:
    """A few cases that meet every goal, on few ranks. The same arguments give the same cases.

    Greedy: the case that meets most open goals for its number of ranks comes next, and at the end what has become
    superfluous goes, largest worlds first. Of several random orders among equals the one with the fewest ranks in all
    is taken.
    """
    cases = all_cases()
    masks = dict.fromkeys(cases, 0)
    wanted = goals(cases, strength)
    for bit, having in enumerate(wanted.values()):
        for case in having:
            masks[case] |= 1 << bit
    everything = (1 << len(wanted)) - 1
    tries = []
    for attempt in range(_RESTARTS):
        order = list(cases)
        random.Random(f"{seed} {attempt}").shuffle(order)
        tries.append(_prune(_greedy(order, masks, everything, weight=(0.0, 0.25, 0.5, 1.0)[attempt % 4]), masks))
    best = min(tries, key=lambda subset: (sum(case.world_size for case in subset), len(subset)))
    return sorted(best, key=lambda case: (case.world_size, case))


def _live(goal: Goal, having: list[Case]) -> list[Case]:
    live = [case for case in having if all(case.is_live(axis) for axis, _ in goal)]
    return live or having


def _greedy(order: Sequence[Case], masks: dict[Case, int], everything: int, *, weight: float) -> list[Case]:
    covered, chosen = 0, []
    while covered != everything:
        gained = covered
        best = max(order, key=lambda case: (masks[case] & ~gained).bit_count() / case.world_size**weight)
        chosen.append(best)
        covered |= masks[best]
    return chosen


def _prune(chosen: list[Case], masks: dict[Case, int]) -> list[Case]:
    kept = sorted(chosen, key=lambda case: -case.world_size)
    for case in list(kept):
        others = 0
        for other in kept:
            others |= masks[other] if other != case else 0
        if not masks[case] & ~others:
            kept.remove(case)
    return kept


if __name__ == "__main__":
    subset = covering_subset(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    print(*subset, sep="\n")
    print(f"{len(subset)} of {len(all_cases())} cases on {sum(case.world_size for case in subset)} ranks in all")
