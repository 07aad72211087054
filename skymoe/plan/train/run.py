"""`skymoe plan train`: search, estimate, and say why."""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.plan.emit.emit import emit
from skymoe.plan.pipeline.problem import Answer
from skymoe.plan.pipeline.solve import uniform
from skymoe.plan.train.accuracy import accuracy_of
from skymoe.plan.train.advice import no_layout, nothing_runs
from skymoe.plan.train.alternatives import (
    other_dispatch,
    other_recompute,
    portable,
    vocabulary_parallel,
    ways_of_tokens,
)  # fmt: skip
from skymoe.plan.train.asked import Asked, read_asked
from skymoe.plan.train.config import PlanTrainConfig
from skymoe.plan.train.estimate import Estimate
from skymoe.plan.train.expected import expected_of, layout_of
from skymoe.plan.train.figures import causes_of, estimate_of, figures, layers, layout_facts, proof
from skymoe.plan.train.least import may_fit
from skymoe.plan.train.lost import limits_of, why_slower
from skymoe.plan.train.pareto import pareto
from skymoe.plan.train.priced import Priced
from skymoe.plan.train.result import Rejected, Row, TrainPlan
from skymoe.plan.train.search import GB, Found, Searched, layout_key, order, search
from skymoe.plan.train.space import candidates
from skymoe.plan.work import Recompute

MOST_REJECTED = 200


@dataclass(frozen=True)
class Timed:
    """A division with its step."""

    priced: Priced
    answer: Answer
    result: Estimate
    causes: dict[str, float]


def run(config: PlanTrainConfig) -> TrainPlan:
    """The best layout for what is asked; print it with `table.show`, or `as_json()`. Writes nothing.

    Raises:
        ConfigError, FormatError: nothing can be read, is legal or fits; the hint says what would be.
    """
    asked = read_asked(config)
    if not candidates(config, asked.spec, asked.cluster, asked.sequences):
        raise no_layout(asked)
    searched = search(asked) if may_fit(asked) else None
    if searched is None or not searched.found:
        raise nothing_runs(asked, searched.refused if searched else ())
    others = other_dispatch(asked, searched.found[0])
    found = sorted([*searched.found, *others], key=order)
    return _report(asked, searched, found, others)


def timed(priced: Priced, answer: Answer, *, drawn: bool = True) -> Timed:
    """With a simulated step and where its time goes."""
    result = estimate_of(priced, answer, drawn=drawn)
    return Timed(priced, answer, result, causes_of(priced, answer, result))


def _report(asked: Asked, searched: Searched, found: list[Found], others: list[Found]) -> TrainPlan:
    best, config = found[0], asked.config
    planned = timed(best.priced, best.answer)
    plain = timed(best.priced, uniform(best.priced.problem))
    own = figures(asked, best.priced, best.answer, planned.result)
    report = TrainPlan(
        model=config.model,
        gpu=asked.cluster.gpu.name,
        gpus=config.gpus,
        nodes_of=asked.cluster.gpus_per_node,
        memory_limit_gb=asked.memory / GB,
        sequence_length=asked.sequence_length,
        global_batch_tokens=asked.sequences * asked.sequence_length,
        precision=str(asked.precision),
        layout=layout_facts(best),
        best=own,
        uniform=figures(asked, best.priced, plain.answer, plain.result),
        gain_vs_uniform=plain.result.step_s / planned.result.step_s - 1,
        certificate=proof(best.answer.certificate),
        emit={},
        limits=limits_of(planned.causes, planned.result.step_s),
        time_by_cause_s=planned.causes,
        candidates=_runners_up(found, planned, config.top),
        rejected=_rejected(searched),
        pareto=tuple(row(one, planned) for one in pareto(found)),
        portable=None if (other := portable(asked, best)) is None else row(other, planned),
        vocabulary_parallel=vocabulary_parallel(best) if config.vocabulary_parallel else None,
        alternatives=(*ways_of_tokens(best, (searched.found[0], *others)), *other_recompute(asked, best)),
        examined={
            "legal": searched.legal,
            "divided": len(searched.found),
            "too_large": sum(one.why == "memory" for one in searched.refused),
            "impossible": sum(one.why == "schedule" for one in searched.refused),
            "bounded": sum(one.why == "bound" for one in searched.refused),
            "estimated": sum(one.why == "estimate" for one in searched.refused),
        },
        assumptions=asked.assumed,
        accuracy=accuracy_of(asked),
        timeline=planned.result.timeline,
        uniform_timeline=plain.result.timeline,
    )
    return _with_emit(asked, report, best)


def _with_emit(asked: Asked, report: TrainPlan, best: Found) -> TrainPlan:
    level = best.priced.work.recompute
    words = emit(
        layout_of(report), asked.shape, recompute=Recompute.NONE if level is Recompute.FULL else level,
        micro_batch=best.candidate.micro_batch, num_micro=best.candidate.num_micro, precision=asked.precision,
        expected=expected_of(report),
    )  # fmt: skip
    return report.with_emit(words)


def row(found: Found, best: Timed) -> Row:
    """One line of a table of layouts."""
    own = timed(found.priced, found.answer, drawn=False)
    slower = own.result.step_s / best.result.step_s - 1
    reason = "the best" if abs(slower) < 1e-9 else f"{slower:+.1%}: {why_slower(own.causes, best.causes)}"
    return Row(
        layout=layout_facts(found), split=layers(found.answer.stages), recompute=found.answer.recompute,
        step_time_s=own.result.step_s, tokens_per_s_per_gpu=own.result.tokens_per_s_per_gpu,
        bubble_fraction=own.result.bubble_fraction, memory_gb=max(one.total for one in own.result.memory) / GB,
        reason=reason,
    )  # fmt: skip


def _runners_up(found: list[Found], best: Timed, top: int) -> tuple[Row, ...]:
    """The best of every other division of the GPUs."""
    first: dict[tuple[object, ...], Found] = {}
    for one in found:
        first.setdefault(layout_key(one.candidate), one)
    return tuple(row(one, best) for one in list(first.values())[1 : top + 1])


def _rejected(searched: Searched) -> tuple[Rejected, ...]:
    """Those that came nearest, for each of the three reasons."""
    nearest = sorted(searched.refused, key=lambda one: (one.why, one.need, one.best_s, one.candidate))
    return tuple(
        Rejected(layout=layout_facts(one.priced), why=one.why, reason=one.reason) for one in nearest[:MOST_REJECTED]
    )
