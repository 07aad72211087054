"""`skymoe plan pipeline`: from a config to the planned division, the uniform one, and the other action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations
from typing import Any

from skymoe.base.errors import ConfigError
from skymoe.plan.pipeline.check import check
from skymoe.plan.pipeline.config import PipelineConfig
from skymoe.plan.pipeline.evaluate import fits, uniform
from skymoe.plan.pipeline.loads import Load, loads_of
from skymoe.plan.pipeline.problem import Answer, End, Problem, Unit
from skymoe.plan.pipeline.schedule import is_one_f_one_b, ranks_of
from skymoe.plan.pipeline.solve import solve
from skymoe.plan.pipeline.vocabulary import with_vocabulary_parallel
from skymoe.spec.layout import ScheduleKind

SCHEMA = "skymoe.plan.pipeline/1"
_FLAGS = {
    "units": "--forward", "stages": "--stages", "micro-batches": "--microbatches", "chunks": "--chunks",
    "memory": "--memory", "hop": "--hop", "parallel.schedule": "--schedule",
}  # fmt: skip
"""What the solver calls an input, and what the user typed."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """A division as it is shown.

    Attributes:
        answer: what it is and takes.
        loads: of its stages.
        period: from micro-batch to micro-batch in the middle of a long step (`period_of`).
        fits: whether all ranks stay within the memory.
    """

    answer: Answer
    loads: tuple[Load, ...]
    period: float
    fits: bool

    def as_json(self) -> dict[str, Any]:
        """The keys of the documented schema."""
        return {
            "split": self.answer.stages.sizes,
            "recompute": self.answer.recompute,
            "makespan": self.answer.makespan,
            "bubble_fraction": self.answer.bubble,
            "period": self.period,
            "memory": self.answer.memory,
            "fits": self.fits,
        }


@dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """The answer beside the uniform division.

    Attributes:
        problem: as it was solved.
        planned, uniform: divisions.
        vocabulary: the best division when head and embedding are divided over all ranks; None where there is neither.
    """

    problem: Problem
    planned: Division
    uniform: Division
    vocabulary: Division | None

    @property
    def gain(self) -> float:
        """How much faster than the uniform division: 0.1 is 10 % more per time."""
        return _gain(self.uniform, self.planned)

    def as_json(self) -> dict[str, Any]:
        """The documented schema (docs/pipeline_solver.md)."""
        problem, certificate = self.problem, self.planned.answer.certificate
        other = self.vocabulary
        return {
            "schema": SCHEMA,
            "units": len(problem.units),
            "stages": problem.num_ranks,
            "chunks": problem.chunks,
            "microbatches": problem.num_micro,
            "schedule": problem.schedule,
            **self.planned.as_json(),
            "stage_forward": [load.forward for load in self.planned.loads],
            "stage_backward": [load.backward for load in self.planned.loads],
            "busy": self.planned.answer.busy,
            "uniform": self.uniform.as_json(),
            "gain_vs_uniform": self.gain,
            "certificate": {
                "optimal": certificate.optimal,
                "lower_bound": certificate.lower_bound,
                "gap": certificate.gap,
                "method": certificate.method,
                "examined": certificate.examined,
            },
            "vocabulary_parallel": other and {**other.as_json(), "gain": _gain(self.planned, other)},
        }


def run(config: PipelineConfig) -> PipelineReport:
    """Divide the pipeline; print it with `skymoe.plan.pipeline.table.show`, or `report.as_json()`.

    Raises:
        ConfigError: impossible numbers, or nothing fits; it names the flag, and the hint says what would.
    """
    try:
        return _report(config)
    except ConfigError as error:
        flag = _FLAGS.get(error.where, error.where)
        raise ConfigError(error.what, where=flag, why=error.why, hint=error.hint) from error


def _report(config: PipelineConfig) -> PipelineReport:
    problem = problem_from(config)
    check(problem)
    other = with_vocabulary_parallel(problem)
    if config.vocabulary_parallel:
        problem = other
    planned = division(problem, solve(problem))
    has_ends = any(End() != replace(end, static=0.0) for end in (problem.embedding, problem.head))
    return PipelineReport(
        problem=problem,
        planned=planned,
        uniform=division(problem, uniform(problem)),
        vocabulary=_alternative(other) if has_ends and problem.num_ranks > 1 else None,
    )


def problem_from(config: PipelineConfig) -> Problem:
    """The config as data of the solver."""
    count = len(config.forward)
    columns = {
        name: _for_all(getattr(config, name), count, name)
        for name in ("forward", "backward", "weight", "static", "activation", "checkpoint", "transient")
    }
    again = None if config.again is None else _for_all(config.again, count, "again")
    units = tuple(
        Unit(
            layer=number // config.units_per_layer,
            again=None if again is None else again[number],
            **{name: values[number] for name, values in columns.items()},
        )
        for number in range(count)
    )
    default = {ScheduleKind.ONE_F_ONE_B: 1}.get(config.schedule, 2)
    return Problem(
        units=units,
        num_ranks=config.stages,
        num_micro=config.microbatches,
        embedding=End(
            forward=config.embedding_forward, backward=config.embedding_backward, static=config.embedding_static
        ),
        head=End(
            forward=config.head_forward, backward=config.head_backward, static=config.head_static,
            activation=config.head_activation, transient=config.head_transient,
        ),
        memory=config.memory,
        hop=config.hop,
        schedule=config.schedule,
        chunks=default if config.chunks is None else config.chunks,
        recompute=config.recompute,
        whole_layers=config.whole_layers,
    )  # fmt: skip


def _for_all(values: tuple[float, ...], count: int, name: str) -> tuple[float, ...]:
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise ConfigError(
            f"{len(values)} values for {count} units", where=f"--{name}", hint=f"one value for all of them, or {count}"
        )
    return values


def division(problem: Problem, answer: Answer) -> Division:
    """`answer` with what is shown of it."""
    loads = loads_of(problem, answer.stages.sizes, answer.recompute)
    period = period_of(problem, loads)
    return Division(answer=answer, loads=tuple(loads), period=period, fits=fits(problem, answer))


def period_of(problem: Problem, loads: Sequence[Load]) -> float:
    """Time from micro-batch to micro-batch once the pipeline is full.

    The busiest rank's; under 1F1B also, over n neighbouring stages, an n-th of the way down and back through them,
    which n micro-batches share. Under the other schedules the busiest rank's, which hops may exceed.
    """
    times = [load.forward + load.backward for load in loads]
    if not is_one_f_one_b(problem):
        return max(sum(times[stage] for stage in own) for own in ranks_of(problem))
    sums = [0.0, *accumulate(time + 2 * problem.hop for time in times)]
    ways = combinations(range(len(sums)), 2)
    return max((sums[end] - sums[start] - 2 * problem.hop) / (end - start) for start, end in ways)


def _alternative(problem: Problem) -> Division | None:
    """The division under vocabulary parallelism; None where that does not fit."""
    try:
        return division(problem, solve(problem))
    except ConfigError:
        return None


def _gain(slow: Division, fast: Division) -> float:
    return slow.answer.makespan / fast.answer.makespan - 1 if fast.answer.makespan else 0.0
