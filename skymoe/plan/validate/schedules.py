"""Cases without a clock: bubbles that a paper calculated, periods of a drawn schedule; and pipelines whose stages were
timed, from which the simulator alone must give the time of the step.

These test the simulator and the orders, not the prices: abstract units, or the measured times of the stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.orders import one_f_one_b
from skymoe.plan.simulator import simulate
from skymoe.plan.timeline import Timeline
from skymoe.plan.validate.cases import Case, NotJudgedError
from skymoe.plan.validate.conventions import convention_of, counted_flops
from skymoe.plan.validate.layouts import ZERO_BUBBLE
from skymoe.plan.validate.machines import case_gpu
from skymoe.plan.validate.models import case_model
from skymoe.plan.validate.predict import predict
from skymoe.plan.validate.result import Comparison

_MOST_RANKS, _MOST_MICRO, _MOST_TASKS = 512, 4096, 400_000
_MANY: Final = 64  # micro-batches per rank until a period is steady


def compare_schedule(case: Case) -> tuple[Comparison, ...]:
    """A drawn or calculated schedule. Raises NotJudgedError."""
    if case.has("measured.bubble_rate_calculated"):
        return (_bubble(case),)
    if case.has("measured.layer_fwd_units"):
        return tuple(_figure(case))
    raise NotJudgedError("no figure of this schedule is predicted")


def bubble_of_training(case: Case) -> tuple[Comparison, ...]:
    """A training case that also prints a calculated bubble."""
    return (_bubble(case),) if case.has("measured.bubble_rate_calculated") else ()


def _bubble(case: Case) -> Comparison:
    """The paper calculates from profiled passes; ours are predicted."""
    prediction = predict(case)
    timeline = prediction.estimate.timeline
    free = prediction.layout.pipeline in ZERO_BUBBLE
    return Comparison(
        case=case.id, group=case.group, quantity="bubble", unit="share of time",
        predicted=timeline.bubble_of_longest_rank if free else timeline.bubble,
        measured=case.number("measured.bubble_rate_calculated", high=1.0), known=True,
        assumed=prediction.assumed,
    )  # fmt: skip


def _figure(case: Case) -> Iterator[Comparison]:
    """Skywork-MoE, figure 6: layers of 1 forward and 2 backward, a loss block on the last stage."""
    sizes = [int(size) for size in case.numbers("parallel.layer_split", most=_MOST_RANKS)]
    forward, backward = (case.number(f"measured.layer_{kind}_units", low=1e-3, high=1e6) for kind in ("fwd", "bwd"))
    loss = case.number("measured.loss_block_units", 0.0, high=1e6)
    forwards = [size * forward for size in sizes]
    backwards = [size * backward for size in sizes]
    forwards[-1] += loss
    last = sizes[-1] * (forward + backward) + loss
    pairs = {
        "measured.last_stage_period_units": last,
        "measured.other_stage_busy_units": max(sizes[:-1]) * (forward + backward) if len(sizes) > 1 else last,
    }
    for path, busy in pairs.items():
        if case.has(path):
            yield _comparison(case, "period", "units", busy, case.number(path, low=1e-6))
    period = steady_period(forwards, backwards)
    idle = {
        "measured.steady_idle_fraction_non_last": 1 - (forwards[0] + backwards[0]) / period,
        "measured.steady_idle_fraction_last": 1 - last / period,
    }
    for path, share in idle.items():
        if case.has(path):
            yield _comparison(case, "bubble", "share of time", share, case.number(path, high=1.0))


def steady_period(forward_s: list[float], backward_s: list[float]) -> float:
    """Time per micro-batch under 1F1B once warm-up is over, simulated. Raises NotJudgedError."""
    pp = len(forward_s)
    if not 0 < 2 * (8 + _MANY // 4) * pp * pp <= _MOST_TASKS or not max(*forward_s, *backward_s) > 0:
        raise NotJudgedError(f"{pp} stages: nothing to simulate, or too much")
    short, long = ((rounds * pp, _run(forward_s, backward_s, rounds * pp)) for rounds in (8, 8 + _MANY // 4))
    return (long[1].span_s - short[1].span_s) / (long[0] - short[0])


def _run(forward_s: list[float], backward_s: list[float], num_micro: int) -> Timeline:
    return simulate(one_f_one_b(len(forward_s), num_micro), forward_s, backward_s)


def compare_stages(case: Case) -> tuple[Comparison, ...]:
    """Measured passes of the stages: ours beside them, and the step that the simulator makes of the measured ones."""
    forward = [us * 1e-6 for us in case.numbers("measured.stage_fwd_us", most=_MOST_RANKS)]
    backward = [us * 1e-6 for us in case.numbers("measured.stage_bwd_us", most=_MOST_RANKS)]
    if len(forward) != len(backward) or not min(*forward, *backward) > 0:
        raise NotJudgedError("passes of stages are missing")
    found = list(_simulated_step(case, forward, backward))
    told = _with_split(case, len(forward))
    prediction = predict(told)
    pairs = zip(
        (*prediction.estimate.stage_forward_s, *prediction.estimate.stage_backward_s),
        (*forward, *backward),
        strict=True,
    )
    predicted, measured = (sum(values) for values in zip(*pairs, strict=True))
    found.append(_comparison(case, "all_stages", "s", predicted, measured))
    last = prediction.estimate.stage_forward_s[-1] + prediction.estimate.stage_backward_s[-1]
    found.append(_comparison(case, "last_stage", "s", last, forward[-1] + backward[-1]))
    return tuple(found)


def _with_split(case: Case, num_stages: int) -> Case:
    """The split in words, from the number of layers in the last stage."""
    layers = case.count("model.num_layers", high=2000)
    last = case.count("parallel.layers_in_last_stage", low=0, high=layers)
    words = "uniform" if last * num_stages == layers else "redis"
    parallel = case.get("parallel")
    fields = {**case.fields, "parallel": {**(parallel if isinstance(parallel, dict) else {}), "layer_split": words}}
    return replace(case, fields=fields)


def _simulated_step(case: Case, forward: list[float], backward: list[float]) -> Iterator[Comparison]:
    number = case.count("batch.num_microbatches", high=_MOST_MICRO)
    sequence_length, sequences = case.count("batch.seq_len"), case.count("batch.micro_batch_size")
    if not case.has("measured.mfu"):
        return
    if 2 * number * len(forward) > _MOST_TASKS:
        raise NotJudgedError(f"{number} micro-batches over {len(forward)} stages are too many to simulate")
    convention, _ = convention_of(case)
    per_token = counted_flops(case_model(case).shape, sequence_length, convention)
    rate = case.number("measured.mfu", low=1e-3, high=1.0) * case_gpu(case).peak[Precision.BF16] * len(forward)
    measured = per_token * sequence_length * sequences * number / rate
    yield _comparison(case, "step_from_stages", "s", _run(forward, backward, number).span_s, measured)


def _comparison(case: Case, quantity: str, unit: str, predicted: float, measured: float) -> Comparison:
    return Comparison(
        case=case.id, group=case.group, quantity=quantity, unit=unit, predicted=predicted, measured=measured
    )
