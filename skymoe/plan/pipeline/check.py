"""What cannot be a pipeline is refused before anything is computed."""

from __future__ import annotations

import math

from skymoe.base.errors import ConfigError
from skymoe.plan.pipeline.problem import End, Problem, Unit
from skymoe.plan.pipeline.schedule import check_schedule
from skymoe.spec.layout import ScheduleKind

MAX_UNITS = 4096
MAX_RANKS = 1024
MAX_PASSES = 2**20
"""Stages times micro-batches: what one simulated step may have."""
MAX_NUMBER = 1e30
"""Of one unit; sums and products of such numbers stay far from overflow."""


def check(problem: Problem) -> None:
    """Raises ConfigError when `problem` is none: counts, negative numbers, more stages than units."""
    _check_counts(problem)
    check_schedule(problem)
    numbers = [(f"unit {number}", unit) for number, unit in enumerate(problem.units)]
    parts: list[tuple[str, Unit | End]] = [*numbers, ("embedding", problem.embedding), ("head", problem.head)]
    for where, part in (*parts, ("shared", problem.shared)):
        for name in ("forward", "backward", "weight", "static", "activation", "transient"):
            _check_number(getattr(part, name), f"{where}: {name}")
        if part.weight > part.backward:
            raise ConfigError(f"weight {part.weight:g} is a part of backward {part.backward:g}", where=where)
        if isinstance(part, Unit):
            _check_number(part.checkpoint, f"{where}: checkpoint")
            _check_number(part.forward if part.again is None else part.again, f"{where}: again")
    _check_number(problem.hop, "hop")
    if problem.memory is not None and not math.isfinite(problem.memory):
        raise ConfigError(f"memory must be a number, got {problem.memory:g}", where="memory")
    layers = [unit.layer for unit in problem.units]
    if any(after < before for before, after in zip(layers, layers[1:], strict=False)):
        raise ConfigError("units of one layer must stand together, layers in ascending order", where="units")
    _check_stages(problem, len(set(layers)))


def _check_counts(problem: Problem) -> None:
    for name, value, most in (
        ("units", len(problem.units), MAX_UNITS),
        ("stages", problem.num_stages, MAX_RANKS),
        ("micro-batches", problem.num_micro, MAX_PASSES),
    ):
        if not 1 <= value <= most:
            raise ConfigError(f"1 to {most} {name}, got {value}", where=name)
    passes = problem.num_stages * problem.num_micro
    if passes > MAX_PASSES:
        raise ConfigError(
            f"{problem.num_stages} stages times {problem.num_micro} micro-batches are more passes than are simulated",
            where="micro-batches",
            hint=f"at most {MAX_PASSES // problem.num_stages} micro-batches; the bubble beyond hardly changes",
        )


def _check_number(value: float, where: str) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError(f"must be a number, 0 or more, got {value:g}", where=where)
    if value > MAX_NUMBER:
        raise ConfigError(
            f"must be at most {MAX_NUMBER:g}, got {value:g}", where=where, hint="a larger unit of measure"
        )


def _check_stages(problem: Problem, num_layers: int) -> None:
    pieces, what = (num_layers, "layers") if problem.whole_layers else (len(problem.units), "units")
    last = problem.num_stages - 1
    most = pieces + (problem.may_be_empty(0) + problem.may_be_empty(last) if last else 0)
    if problem.num_stages > most:
        ends = [
            name
            for name, end in (
                ("the first, with the embedding,", problem.embedding),
                ("the last, with the head,", problem.head),
            )
            if end != End()
        ]
        idle = problem.num_stages - most
        raise ConfigError(
            f"{problem.num_stages} stages for {pieces} {what}: {idle} of them would have nothing to do",
            where="stages",
            why="only a stage with an embedding or a head may be without layers"
            + (f": here {' and '.join(ends)} may" if ends else ", and here there is neither"),
            hint=_fewer(problem, most, pieces),
        )


def _fewer(problem: Problem, most: int, pieces: int) -> str:
    """The largest number of ranks, and where there is a better way, that."""
    ranks = most // problem.chunks
    ways = [f"at most {ranks} {'stages' if problem.chunks == 1 else 'ranks'}"] if ranks else []
    if problem.schedule is ScheduleKind.INTERLEAVED and most // problem.num_ranks >= 2:
        ways.append(f"{most // problem.num_ranks} chunks")
    if problem.whole_layers and len(problem.units) > pieces:
        ways.append("stages that may cut layers (no --whole-layers)")
    return ", or ".join(ways) or "schedule 1f1b, which has one stage per rank"
