"""A candidate as a pipeline to be divided, and how fast it could be at best.

The bound is valid for every division of the layers, so what cannot win need not be divided. Of the pipeline's time:

    any schedule    each rank works through its share:            T >= m t / P       (t: all layers and ends, once)
                    some rank has r = ceil(L / P) feed-forwards, and between those of one stage the attentions:
                                                                  T >= m (r f + (r - v) a)   (v stages per rank)
    1F1B            rank s starts after all before it have done one forward, and ends before they do their last
                    backward: T >= sum_{i<s} t_i + m t_s for every s. Stages that make all of these equal are
                    t_s = t_{s-1} (1 - 1/m), whence               T >= t / (1 - (1 - 1/m)^P)

Of the end of the step: that of a rank with L / P layers, rounded down, for some rank has as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from skymoe.plan.cost.model import prices, step_end
from skymoe.plan.cost.prices import Prices
from skymoe.plan.memory.model import sizes
from skymoe.plan.memory.sizes import Sizes
from skymoe.plan.pipeline.problem import End, Problem, Unit
from skymoe.plan.train.asked import Asked
from skymoe.plan.train.problem_of import problem_of
from skymoe.plan.train.space import Candidate
from skymoe.plan.work import Division, Recompute, Work
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.split import Split

LEVELS = {
    "auto": Recompute.NONE, "none": Recompute.NONE, "full": Recompute.FULL, "selective": Recompute.SELECTIVE,
    "moe_act": Recompute.MOE_ACT,
}  # fmt: skip
"""What every layer runs again, beside the layers that a stage runs again whole."""


@dataclass(frozen=True, kw_only=True)
class Priced:
    """A candidate with its prices.

    Attributes:
        candidate: the layout.
        work: one micro-batch of it.
        prices, sizes: seconds and bytes.
        problem: the pipeline that is to be divided.
        bound_s: no division of it is faster.
        likely_s: a step with equal stages, which schedules are compared by before anything is divided.
        update_s: of the optimizer per parameter, where it was measured.
    """

    candidate: Candidate
    work: Work
    prices: Prices
    sizes: Sizes
    problem: Problem
    bound_s: float
    likely_s: float
    update_s: float | None = None

    @property
    def once_s(self) -> float:
        """One micro-batch through everything and back."""
        return _once(self.problem)

    @property
    def likely_pipeline_s(self) -> float:
        """Of `likely_s`, without the end of the step."""
        return _likely_pipeline_s(self.problem)

    @property
    def static_share(self) -> float:
        """Bytes of weights, gradients and optimizer that the fullest rank has at least."""
        parts = (*self.sizes.halves, self.sizes.embedding, self.sizes.head)
        return sum(part.static for part in parts) / self.candidate.pp


def work_of(asked: Asked, candidate: Candidate, level: Recompute) -> Work:
    """One micro-batch of `candidate`, with `level` in every layer."""
    weight_bytes = 4.0 if asked.precision == "fp32" else 2.0
    layout = candidate.layout(Split.remainder_first(2 * asked.shape.num_layers, candidate.num_stages))
    return Work(
        shape=asked.shape,
        division=Division.of(layout, weight_bytes=weight_bytes),
        cluster=asked.cluster,
        sequence_length=asked.sequence_length,
        micro_batch=candidate.micro_batch,
        num_micro=candidate.num_micro,
        precision=asked.precision,
        recompute=level,
        imbalance=asked.config.imbalance,
        capacity=asked.config.capacity,
        chunks=candidate.chunks,
    )


def price(asked: Asked, candidate: Candidate, *, level: Recompute | None = None) -> Priced:
    """`candidate` as a pipeline; `level` in place of what the config says."""
    work = work_of(asked, candidate, LEVELS[asked.config.recompute] if level is None else level)
    seconds, bytes_ = prices(work, asked.profile), sizes(work)
    problem = problem_of(
        work, seconds, bytes_, schedule=candidate.schedule, chunks=candidate.chunks, memory=asked.memory,
        whole_layers=asked.config.whole_layers, recompute=asked.config.recompute not in ("none", "full"),
    )  # fmt: skip
    update_s = None if asked.profile is None else asked.profile.update_s
    return Priced(
        candidate=candidate, work=work, prices=seconds, sizes=bytes_, problem=problem,
        bound_s=bound_s(work, problem, update_s), likely_s=likely_s(work, problem, update_s), update_s=update_s,
    )  # fmt: skip


def price_all(asked: Asked, candidates: Sequence[Candidate]) -> list[Priced]:
    """All of them. Prices and sizes do not depend on the schedule, so those of equal ranks and tokens are shared."""
    known: dict[Candidate, Priced] = {}
    priced = []
    for candidate in candidates:
        alike = replace(candidate, schedule=ScheduleKind.ONE_F_ONE_B, chunks=1)
        if alike not in known:
            known[alike] = price(asked, alike)
        priced.append(_with_schedule(known[alike], candidate))
    return priced


def _with_schedule(priced: Priced, candidate: Candidate) -> Priced:
    problem = replace(priced.problem, schedule=candidate.schedule, chunks=candidate.chunks)
    work = replace(priced.work, chunks=candidate.chunks)
    bound, likely = bound_s(work, problem, priced.update_s), likely_s(work, problem, priced.update_s)
    return replace(priced, candidate=candidate, work=work, problem=problem, bound_s=bound, likely_s=likely)


def bound_s(work: Work, problem: Problem, update_s: float | None = None) -> float:
    """No division of `problem` makes a faster step."""
    return _with_end(work, pipeline_bound_s(problem), update_s)


def likely_s(work: Work, problem: Problem, update_s: float | None = None) -> float:
    """With stages as equal as can be."""
    return _with_end(work, _likely_pipeline_s(problem), update_s)


def _likely_pipeline_s(problem: Problem) -> float:
    """With stages as equal as can be.

    The bubble is P - 1 micro-batches under 1F1B, (P - 1) / v under interleaved. Under zbv it is (P - 1) / 6 where a
    forward is as long as each half of a backward; they are not, and (P - 1) / 4 is nearer to what is simulated.
    """
    fill = {ScheduleKind.ONE_F_ONE_B: 1, ScheduleKind.ZERO_BUBBLE: 4}.get(problem.schedule, problem.chunks)
    ranks, share = problem.num_ranks, _once(problem) / problem.num_ranks
    return problem.num_micro * max(share, _fullest(problem)) + (ranks - 1) / fill * share


def pipeline_bound_s(problem: Problem) -> float:
    """No division of `problem` is faster."""
    once, ranks, num_micro = _once(problem), problem.num_ranks, problem.num_micro
    bound = max(once, num_micro * once / ranks, num_micro * _fullest(problem))
    if ranks > 1 and problem.schedule is ScheduleKind.ONE_F_ONE_B:
        return max(bound, once / (1.0 - (1.0 - 1.0 / num_micro) ** ranks))
    return bound


def _fullest(problem: Problem) -> float:
    """A micro-batch on the rank that has most of the heavier halves, at least."""
    first, second = problem.units[::2], problem.units[1::2]
    least = sorted(min(unit.forward + unit.backward for unit in half) for half in (first, second))
    number = -(-len(first) // problem.num_ranks)
    others = number if problem.whole_layers else max(0, number - problem.chunks)
    return number * least[1] + others * least[0]


def _once(problem: Problem) -> float:
    """One micro-batch through everything and back."""
    parts: list[Unit | End] = [*problem.units, problem.embedding, problem.head]
    return sum(part.forward + part.backward for part in parts)


def _with_end(work: Work, pipeline_s: float, update_s: float | None) -> float:
    ranks, layers = work.division.pp, work.shape.num_layers // work.division.pp
    inner = (2 * layers,) * max(1, ranks - 2)
    stages = Split(inner if ranks == 1 else (0, *inner, 0)[:ranks])
    # What hides communication grows with the pipeline's time; twice of it is more than any candidate of use takes.
    return pipeline_s + step_end(work, stages, pipeline_s=2 * pipeline_s, update_s=update_s).total_s
