"""One division, evaluated: what a step takes and what every rank keeps; and the uniform one, always shown beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from skymoe.base.errors import ConfigError
from skymoe.plan.pipeline.loads import layers_of, loads_of, peak_memory
from skymoe.plan.pipeline.makespan import makespan_of
from skymoe.plan.pipeline.problem import SLACK, Answer, Certificate, Problem
from skymoe.plan.pipeline.schedule import check_schedule, ranks_of
from skymoe.spec.split import Split

NO_CLAIM = Certificate(optimal=False, lower_bound=0.0, gap=0.0, method="evaluated, not searched", examined=1)


def evaluate(problem: Problem, stages: Split, recompute: Sequence[int], certificate: Certificate = NO_CLAIM) -> Answer:
    """Simulate one division. It need not fit the memory: `fits` says so.

    Raises:
        ConfigError: a division of other units or stages than the problem's.
    """
    check_schedule(problem)
    if stages.num_ranks != problem.num_stages or stages.num_units != len(problem.units):
        raise ConfigError(
            f"{stages.num_units} units in {stages.num_ranks} stages, the problem has {len(problem.units)} units and "
            f"{problem.num_stages} stages"
        )
    if len(recompute) != stages.num_ranks or any(count < 0 for count in recompute):
        raise ConfigError(f"recompute needs a count for each of the {stages.num_ranks} stages, got {list(recompute)}")
    loads = loads_of(problem, stages.sizes, recompute)
    busy = [problem.num_micro * (load.forward + load.backward) for load in loads]
    return Answer(
        stages=stages,
        recompute=tuple(recompute),
        makespan=makespan_of(problem, loads),
        memory=tuple(peak_memory(problem, loads)),
        busy=tuple(sum(busy[stage] for stage in own) for own in ranks_of(problem)),
        certificate=certificate,
    )


def fits(problem: Problem, answer: Answer) -> bool:
    """Whether every rank's peak is within the problem's memory."""
    return problem.memory is None or max(answer.memory) <= problem.memory * (1 + SLACK)


def uniform(problem: Problem) -> Answer:
    """What a user without a planner has: equal numbers of whole layers, the remainder first, and on every stage the
    same number of layers run again, the smallest that fits (all of them where none does; see `fits`).

    With fewer layers than stages, units are divided instead of layers where the problem allows it. With fewer of those,
    the last stage has none, then the first, as far as they may.
    """
    sizes = uniform_sizes(problem)
    return evaluate(problem, Split(sizes), _uniform_again(problem, sizes)[0])


def uniform_peak(problem: Problem) -> float:
    """Memory of the fullest rank of `uniform`, without simulating it."""
    return _uniform_again(problem, uniform_sizes(problem))[1]


def uniform_sizes(problem: Problem) -> tuple[int, ...]:
    """Units per stage of `uniform`."""
    layers = layers_of(problem.units)
    whole = problem.whole_layers or len(layers) >= problem.num_stages
    pieces = [len(layer) for layer in layers] if whole else [1] * len(problem.units)
    return tuple(sum(pieces[part.start : part.stop]) for part in _dealt(problem, len(pieces)))


def _uniform_again(problem: Problem, sizes: Sequence[int]) -> tuple[list[int], float]:
    """Layers run again per stage, and the fullest rank's memory with that."""
    counts = _num_layers(problem, sizes)
    limit = math.inf if problem.memory is None else problem.memory * (1 + SLACK)
    for again in range(max(counts) + 1 if problem.recompute else 1):
        recompute = [min(again, count) for count in counts]
        peak = max(peak_memory(problem, loads_of(problem, sizes, recompute)))
        if peak <= limit:
            break
    return recompute, peak


def _dealt(problem: Problem, pieces: int) -> Split:
    """`pieces` over the stages; where there are too few, one each but for the last stage and then the first."""
    missing, last = problem.num_stages - pieces, problem.num_stages - 1
    if missing <= 0 or not last:
        return Split.remainder_first(pieces, problem.num_stages)
    empty = [stage for stage in (last, 0) if problem.may_be_empty(stage)][:missing]
    sizes = iter([1] * pieces + [0] * problem.num_stages)
    return Split(tuple(0 if stage in empty else next(sizes) for stage in range(problem.num_stages)))


def _num_layers(problem: Problem, sizes: Sequence[int]) -> list[int]:
    return [len({problem.units[unit].layer for unit in part}) for part in Split(tuple(sizes))]
