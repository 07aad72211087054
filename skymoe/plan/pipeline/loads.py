"""What each stage of a division takes and keeps: the formulas of problem.py, unit by unit.

This is the specification. The solver's tables (tables.py) hold the same sums for all intervals at once and are tested
against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from skymoe.plan.pipeline.problem import End, Problem, Unit
from skymoe.plan.pipeline.schedule import moments_of, ranks_of
from skymoe.spec.layout import stage_owner


@dataclass(frozen=True, kw_only=True)
class Load:
    """One stage.

    Attributes:
        forward, backward, weight: time of one micro-batch; the backward with what is run again, `weight` its part.
        static: memory for good.
        kept: memory per micro-batch alive.
        running: memory of the largest thing that runs.
    """

    forward: float
    backward: float
    weight: float
    static: float
    kept: float
    running: float


def layers_of(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units by layer."""
    return [list(group) for _, group in groupby(units, key=lambda unit: unit.layer)]


def stage_ends(problem: Problem, stage: int) -> tuple[End, ...]:
    """What a stage has beside its units."""
    last = problem.num_stages - 1
    head = problem.head
    if problem.tied_static and stage_owner(problem.schedule, problem.num_ranks, last) == 0:
        head = replace(head, static=head.static - problem.tied_static)
    ends = (problem.embedding,) if stage == 0 else ()
    return (*ends, *((head,) if stage == last else ()), problem.shared)


def stage_load(problem: Problem, stage: int, units: Sequence[Unit], again: int) -> Load:
    """The load of `stage` with `units`, of which the first `again` layers are run again."""
    ends, layers = stage_ends(problem, stage), layers_of(units)
    rerun, kept = layers[:again], [unit for layer in layers[again:] for unit in layer]
    parts: list[Unit | End] = [*units, *ends]
    second = sum((unit.forward if unit.again is None else unit.again) for layer in rerun for unit in layer)
    return Load(
        forward=sum(part.forward for part in parts),
        backward=sum(part.backward for part in parts) + second,
        weight=sum(part.weight for part in parts),
        static=sum(part.static for part in parts),
        kept=sum(unit.activation for unit in kept)
        + sum(end.activation for end in ends)
        + sum(layer[0].checkpoint for layer in rerun),
        running=max([part.transient for part in parts] + [_running(layer) for layer in rerun]),
    )


def _running(layer: Sequence[Unit]) -> float:
    return sum(unit.activation for unit in layer) + max(unit.transient for unit in layer)


def loads_of(problem: Problem, sizes: Sequence[int], recompute: Sequence[int]) -> list[Load]:
    """The loads of all stages."""
    loads, start = [], 0
    for stage, (size, again) in enumerate(zip(sizes, recompute, strict=True)):
        loads.append(stage_load(problem, stage, problem.units[start : start + size], again))
        start += size
    return loads


def peak_memory(problem: Problem, loads: Sequence[Load]) -> list[float]:
    """Peak of each rank: for good, the worst moment of what is kept, and what runs."""
    from_rank = []
    for stages, moments in zip(ranks_of(problem), moments_of(problem), strict=True):
        own = [loads[stage] for stage in stages]
        worst = max(sum(count * load.kept for count, load in zip(counts, own, strict=True)) for counts in moments)
        from_rank.append(sum(load.static for load in own) + worst + max(load.running for load in own))
    return from_rank
