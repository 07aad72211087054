"""The least memory with which a layout can be run, and of all layouts the one that needs least.

Nothing is priced or divided for it until it must be: weights, gradients and optimizer over the ranks of the pipeline
are a bound, and the fullest rank of equal stages tells which layouts to look at first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil

from skymoe.plan.memory.model import sizes
from skymoe.plan.pipeline.evaluate import uniform_peak
from skymoe.plan.pipeline.infeasible import smallest_memory
from skymoe.plan.pipeline.schedule import is_one_f_one_b
from skymoe.plan.train.asked import Asked
from skymoe.plan.train.priced import LEVELS, price, work_of
from skymoe.plan.train.search import GB, Found, divide
from skymoe.plan.train.space import Candidate, candidates
from skymoe.spec.layout import ScheduleKind

_SOLVED = 32


@dataclass(frozen=True)
class Lean:
    """A layout by memory, in bytes of the fullest rank.

    Attributes:
        candidate: the layout.
        bound: at least.
        likely: with equal stages, and everything run again that may be.
    """

    candidate: Candidate
    bound: float
    likely: float


def lean_layouts(asked: Asked) -> list[Lean]:
    """Of each division of the GPUs the smallest micro-batch, under 1F1B where that can run."""
    legal = candidates(asked.config, asked.spec, asked.cluster, asked.sequences)
    return [_lean(asked, one) for one in _leanest(legal)]


def _leanest(legal: Iterable[Candidate]) -> list[Candidate]:
    """A larger micro-batch keeps as much or more, and so do the other schedules, but for zbv at times."""
    chosen: dict[tuple[object, ...], Candidate] = {}
    plain = {_ranks(one) for one in legal if one.schedule is ScheduleKind.ONE_F_ONE_B}
    for one in legal:
        if one.schedule is not ScheduleKind.ONE_F_ONE_B and _ranks(one) in plain:
            continue
        key = (*_ranks(one), one.schedule, one.chunks)
        if key not in chosen or one.micro_batch < chosen[key].micro_batch:
            chosen[key] = one
    return list(chosen.values())


def _ranks(one: Candidate) -> tuple[object, ...]:
    return one.pp, one.dp, one.tp, one.expert, one.dispatch


def _lean(asked: Asked, candidate: Candidate) -> Lean:
    work = work_of(asked, candidate, LEVELS[asked.config.recompute])
    bytes_ = sizes(work)
    parts = (*bytes_.halves, bytes_.embedding, bytes_.head)
    static = sum(part.static for part in parts)
    again = asked.config.recompute not in ("none", "full")
    kept = sum(half.checkpoint if again else half.activation for half in bytes_.halves)
    alive = min(candidate.num_micro, candidate.pp)
    likely = (static + alive * kept) / candidate.pp + max(part.transient for part in parts)
    return Lean(candidate, static / candidate.pp + bytes_.reserve, likely + bytes_.reserve)


def needed_memory(asked: Asked, candidate: Candidate) -> float:
    """Bytes of a GPU with which the layout can be run: the least for 1F1B, for the others those of equal stages."""
    priced = price(asked, candidate)
    problem = replace(priced.problem, schedule=candidate.schedule, chunks=candidate.chunks)
    if is_one_f_one_b(problem):
        return smallest_memory(problem) + priced.sizes.reserve
    return uniform_peak(problem) + priced.sizes.reserve


def may_fit(asked: Asked) -> bool:
    """Whether the search can find anything, which it takes long over when it cannot.

    A larger micro-batch and interleaved stages never keep less than what is looked at here: under 1F1B the least of
    every layout, under zbv what the solver finds.
    """
    lean = sorted((one for one in lean_layouts(asked) if one.bound <= asked.memory), key=lambda one: one.likely)
    if any(needed_memory(asked, one.candidate) <= asked.memory for one in lean):
        return True
    legal = candidates(asked.config, asked.spec, asked.cluster, asked.sequences)
    ranks = {_ranks(one.candidate) for one in lean}
    zero_bubble = [one for one in legal if one.schedule is ScheduleKind.ZERO_BUBBLE and _ranks(one) in ranks]
    return any(isinstance(divide(price(asked, one)), Found) for one in _leanest(zero_bubble))


def least_found(asked: Asked) -> tuple[Candidate, float] | None:
    """The layout that needs least, and how much, tried out: with as much a division is found."""
    best: tuple[float, Candidate] | None = None
    # The likeliest first, so that the bounds of most others exceed it.
    for one in sorted(lean_layouts(asked), key=lambda one: (one.likely, one.candidate))[:_SOLVED]:
        if best is None or one.bound < best[0]:
            need = needed_memory(asked, one.candidate)
            best = (need, one.candidate) if best is None or need < best[0] else best
    if best is None:
        return None
    need, candidate = best
    there = replace(asked, memory=ceil(need / GB * 10) / 10 * GB)
    return (candidate, need) if isinstance(divide(price(there, candidate)), Found) else None
