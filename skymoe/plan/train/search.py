"""The search over layouts: bound, divide exactly, rank.

Candidates are taken in the order of what they would do with equal stages. One that cannot matter is not divided
(`Ranking`); all others get the solver's division of their layers, and its simulated time: exactly under 1F1B, the best
of the proposed ones under the other schedules, and those that come into the list are then improved (`_improved`). So
the best layout is the best of all under 1F1B, whose bounds and divisions are exact; of the other schedules, of those
that would be among the best few with equal stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from skymoe.base.errors import ConfigError
from skymoe.plan.cost.model import step_end
from skymoe.plan.pipeline.descent import DESCENTS
from skymoe.plan.pipeline.evaluate import uniform_peak
from skymoe.plan.pipeline.infeasible import smallest_memory
from skymoe.plan.pipeline.problem import Answer
from skymoe.plan.pipeline.schedule import is_one_f_one_b
from skymoe.plan.pipeline.solve import solve
from skymoe.plan.train.asked import Asked
from skymoe.plan.train.priced import Priced, price_all
from skymoe.plan.train.space import Candidate, candidates
from skymoe.spec.layout import ScheduleKind

GB = 1e9
_LONG = 3
"""So many of the best divisions of the GPUs get the long search for a division of the layers."""
_NEAR = 1.03
"""Of one division of the GPUs, schedules and micro-batches that are within this of the best are searched for longer."""
_OTHERS = 4
"""Other schedules than 1F1B are divided where they could be among so many with equal stages."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A layout with its best division."""

    priced: Priced
    answer: Answer
    step_s: float

    @property
    def candidate(self) -> Candidate:
        """The layout."""
        return self.priced.candidate

    @property
    def memory_gb(self) -> float:
        """Of the fullest rank."""
        return (max(self.answer.memory) + self.priced.sizes.reserve) / GB


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A layout that was not taken.

    Attributes:
        priced: the layout.
        why: `memory`; `schedule` (the solver takes no such pipeline); `bound` (no division of it can matter);
            `estimate` (with equal stages it does not, which is no proof).
        reason: with numbers.
        need: bytes that a GPU would need, where memory is the reason.
        hint: what would do, where the solver says it.
        best_s: no division of it is faster, in seconds; under `estimate`, the step with equal stages.
    """

    priced: Priced
    why: str
    reason: str
    need: float = 0.0
    best_s: float = 0.0
    hint: str = ""

    @property
    def candidate(self) -> Candidate:
        """The layout."""
        return self.priced.candidate


@dataclass(frozen=True, kw_only=True)
class Searched:
    """All that was found, the fastest first, and all that was refused."""

    found: tuple[Found, ...]
    refused: tuple[Refused, ...]
    legal: int


def search(asked: Asked, *, top: int | None = None) -> Searched:
    """Look at every legal layout for the best `top`; default: those that the config lists, and one more."""
    top = asked.config.top + 1 if top is None else top
    legal = candidates(asked.config, asked.spec, asked.cluster, asked.sequences)
    priced = sorted(price_all(asked, legal), key=lambda one: (one.likely_s, one.candidate))
    ranking = Ranking(top)
    found: list[Found] = []
    refused: list[Refused] = []
    for one in priced:
        if (reason := ranking.against(one)) is not None:
            refused.append(reason)
            continue
        result = divide(one, descents=0)
        if isinstance(result, Refused):
            refused.append(result)
            continue
        found.append(result)
        ranking.add(result)
    return Searched(found=tuple(_improved(found, top)), refused=tuple(refused), legal=len(legal))


def _improved(found: Sequence[Found], top: int) -> list[Found]:
    """Sorted. Of what is listed, divisions that were proposed only are improved, the best layouts' longest."""
    best: dict[tuple[object, ...], float] = {}
    for one in sorted(found, key=order):
        best.setdefault(layout_key(one.candidate), one.step_s)
    places = {key: place for place, key in enumerate(list(best)[:top])}
    better = []
    for one in found:
        key = layout_key(one.candidate)
        result: Found | Refused = one
        if not is_one_f_one_b(one.priced.problem) and key in places and one.step_s < _NEAR * best[key]:
            result = divide(one.priced, descents=DESCENTS if places[key] < _LONG else 1)
        better.append(result if isinstance(result, Found) else one)
    return sorted(better, key=order)


def order(found: Found) -> tuple[object, ...]:
    """The fastest first; the same on every machine."""
    return found.step_s, found.candidate


class Ranking:
    """The best step of each division of the GPUs, and what a candidate must be below to matter."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._best_s: dict[tuple[object, ...], float] = {}

    def add(self, found: Found) -> None:
        """Note a result."""
        key = layout_key(found.candidate)
        self._best_s[key] = min(found.step_s, self._best_s.get(key, inf))

    def against(self, priced: Priced) -> Refused | None:
        """Why nobody asks for `priced`; None when it may matter.

        1F1B must, by its bound, be able to come into the list of the best `top`, and to be better than the same ranks
        already do. Other schedules take the solver longer and are of interest only where they could be among the best
        few, which is judged by what they do with equal stages.
        """
        own = self._best_s.get(layout_key(priced.candidate), inf)
        if priced.candidate.schedule is not ScheduleKind.ONE_F_ONE_B:
            if priced.likely_s < min(own, self._place(min(_OTHERS, self._top))):
                return None
            reason = f"{priced.likely_s:.3g} s a step with equal stages: {_lost(priced)}"
            return Refused(priced=priced, why="estimate", reason=reason, best_s=priced.likely_s)
        if priced.bound_s < min(own, self._place(self._top)):
            return None
        reason = f"at least {priced.bound_s:.3g} s a step, however the layers are divided: {_lost(priced)}"
        return Refused(priced=priced, why="bound", reason=reason, best_s=priced.bound_s)

    def _place(self, place: int) -> float:
        """The best step but for `place - 1` better ones."""
        return sorted(self._best_s.values())[place - 1] if len(self._best_s) >= place else inf


def _lost(priced: Priced) -> str:
    """To what a layout loses most, with equal stages and nothing hidden: idle ranks or communication."""
    parts = [dict(price.parts) for price in (*priced.prices.halves, priced.prices.embedding, priced.prices.head)]
    scale = priced.work.num_micro / priced.candidate.pp
    talk_s = scale * sum(part.get(name, 0.0) for part in parts for name in ("tp", "expert", "wait"))
    idle_s = max(0.0, priced.likely_pipeline_s - scale * priced.once_s)
    end_s = priced.likely_s - priced.likely_pipeline_s
    most = max((idle_s, "the bubble and unequal stages"), (talk_s, "communication of ranks within a replica"),
               (end_s, "gradients between replicas and the optimizer"))  # fmt: skip
    return f"most is lost to {most[1]}, {most[0]:.3g} s"


def layout_key(candidate: Candidate) -> tuple[object, ...]:
    """Divisions of the GPUs: what differs in more than schedule and micro-batch."""
    return candidate.pp, candidate.dp, candidate.tp, candidate.expert


def divide(priced: Priced, *, descents: int = DESCENTS) -> Found | Refused:
    """The best division of one candidate, or why there is none; `descents` as for `solve`."""
    memory = priced.problem.memory
    assert memory is not None, "a GPU has a memory"
    if priced.static_share > memory:
        return _too_large(priced, priced.static_share, "weights, gradients and optimizer alone")
    plain = uniform_peak(priced.problem)
    if plain > memory and is_one_f_one_b(priced.problem):
        # Asked for before the solver is, which tells at length what else would do.
        least = smallest_memory(priced.problem)
        if least > memory:
            return _too_large(priced, least, f"the leanest split, {_again(priced)},")
    try:
        answer = solve(priced.problem, descents)
    except ConfigError as error:
        if error.where == "memory":
            return _too_large(priced, plain, f"the uniform split, {_again(priced)},")
        return Refused(priced=priced, why="schedule", reason=error.what, best_s=priced.bound_s, hint=error.hint)
    return found_of(priced, answer)


def _again(priced: Priced) -> str:
    return "layers run again where that helps" if priced.problem.recompute else "nothing run again"


def found_of(priced: Priced, answer: Answer) -> Found:
    """With the end of the step."""
    end = step_end(
        priced.work, answer.stages, pipeline_s=answer.makespan, schedule=priced.problem.schedule,
        update_s=priced.update_s,
    )  # fmt: skip
    return Found(priced=priced, answer=answer, step_s=answer.makespan + end.total_s)


def _too_large(priced: Priced, need: float, what: str) -> Refused:
    memory = priced.problem.memory or 0.0
    need, there = need + priced.sizes.reserve, memory + priced.sizes.reserve
    reason = f"memory short by {(need - there) / GB:.1f} GB: {what} needs {need / GB:.1f} GB of {there / GB:.1f}"
    return Refused(priced=priced, why="memory", reason=reason, need=need)
