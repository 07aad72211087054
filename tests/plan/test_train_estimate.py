"""The estimate of a step against sums done by hand, and against what the pieces say one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skymoe.base.errors import ConfigError
from skymoe.plan.cost.flops import flops
from skymoe.plan.cost.model import prices
from skymoe.plan.cost.prices import Price, Prices
from skymoe.plan.hardware.catalogue import cluster_of
from skymoe.plan.memory.model import rank_memory, sizes
from skymoe.plan.pipeline.solve import evaluate, solve
from skymoe.plan.shape import shape_of
from skymoe.plan.train.estimate import estimate
from skymoe.plan.train.lost import time_by_cause
from skymoe.plan.train.problem_of import problem_of
from skymoe.plan.train.stages import again_halves, stage_times
from skymoe.plan.work import Division, Recompute, Work
from skymoe.spec.flops import flops_per_token
from skymoe.spec.layout import DispatchMode, Layout, ScheduleKind
from skymoe.spec.presets import preset
from skymoe.spec.split import Split
from skymoe.spec.utilisation import recomputed_parts, training_flops

SPEC = preset("skywork-moe")
UNEVEN = Split((9, 9, 9, 9, 9, 8, 9, 9, 9, 8, 8, 8))
AGAIN = (2, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0)


def skywork(**changes: object) -> Work:
    layout = Layout(pp=12, dp=32, tp=4, dispatch=DispatchMode.ALL_TO_ALL, stages=UNEVEN)
    work = Work(
        shape=shape_of(SPEC, "skywork-moe"), division=Division.of(layout), cluster=cluster_of("a800-80g", 1536),
        sequence_length=8192, micro_batch=1, num_micro=24,
    )  # fmt: skip
    return replace(work, **changes)  # type: ignore[arg-type]


def test_speed_and_utilisation_are_those_of_the_training_log() -> None:
    """MFU and HFU by `spec/utilisation.py`, which the training log uses, from the same speed."""
    work = skywork()
    result = estimate(work, UNEVEN, AGAIN)
    tokens = 8192 * 24 * 32
    assert result.step_s == pytest.approx(result.pipeline_s + result.end.total_s)
    assert result.tokens_per_s_per_gpu == pytest.approx(tokens / result.step_s / 1536)
    layout = Layout(pp=12, dp=32, tp=4, stages=UNEVEN, recompute=AGAIN)
    counted = training_flops(SPEC, 8192, recomputed_parts(layout))
    rate = result.tokens_per_s_per_gpu / 312e12
    assert result.mfu_causal == pytest.approx(counted.model_causal * rate)
    assert result.mfu_full == pytest.approx(counted.model_full * rate)
    assert result.hfu == pytest.approx(counted.hardware_causal * rate, rel=1e-3)
    assert result.hfu > 1.02 * result.mfu_causal


def test_a_dense_model_is_counted_alike() -> None:
    """A dense layer that is run again stops before its last projection (spec/utilisation.py)."""
    spec = preset("llama-3-8b")
    layout = Layout(pp=2, dp=1, tp=1, stages=Split((31, 33)), recompute=(16, 3))
    work = Work(
        shape=shape_of(spec), division=Division.of(layout), cluster=cluster_of("h100-80g", 2), sequence_length=4096,
        micro_batch=1, num_micro=8,
    )  # fmt: skip
    result = estimate(work, layout.stages, layout.recompute)
    counted = training_flops(spec, 4096, recomputed_parts(layout))
    assert result.hfu / result.mfu_causal == pytest.approx(counted.hardware_causal / counted.model_causal, rel=1e-3)


def test_base_levels_are_in_hfu() -> None:
    """`full` is every layer; `moe_act` runs no matrix product twice."""
    nothing = (0,) * 12
    full = estimate(skywork(recompute=Recompute.FULL), UNEVEN, nothing)
    every = flops_per_token(SPEC, 8192)
    assert full.hfu / full.mfu_causal == pytest.approx(1 + sum(every.layers) / (3 * every.total), rel=5e-3)
    activations = estimate(skywork(recompute=Recompute.MOE_ACT), UNEVEN, nothing)
    assert activations.hfu == pytest.approx(activations.mfu_causal)
    unfused = estimate(skywork(recompute=Recompute.SELECTIVE, flash=False), UNEVEN, nothing)
    scores = every.attention_scores / (3 * every.total)
    assert unfused.hfu / unfused.mfu_causal == pytest.approx(1 + scores)


def test_passes_of_stages_are_sums_of_prices() -> None:
    work = skywork()
    listed = prices(work)
    times = stage_times(listed, UNEVEN, AGAIN)
    first = listed.halves[:9]
    assert times.forward_s[0] == pytest.approx(sum(p.forward_s for p in first) + listed.embedding.forward_s)
    again = sum(price.again_s for price in listed.halves[:4])
    assert times.backward_s[0] == pytest.approx(
        sum(price.backward_s for price in first) + listed.embedding.backward_s + again
    )
    last = listed.halves[-8:]
    assert times.forward_s[-1] == pytest.approx(sum(p.forward_s for p in last) + listed.head.forward_s)
    assert again_halves(Split((3, 5)), (2, 1)) == ((0, 1, 2), (3,))  # a cut layer counts in both its stages


@pytest.mark.parametrize(
    ("schedule", "num_stages"),
    [(ScheduleKind.ONE_F_ONE_B, 12), (ScheduleKind.INTERLEAVED, 24), (ScheduleKind.ZERO_BUBBLE, 24)],
)
def test_the_solver_and_the_estimate_see_the_same_pipeline(schedule: ScheduleKind, num_stages: int) -> None:
    """The problem that is solved has the makespan, and the memory, that the estimate then reports."""
    work = skywork()
    listed, bytes_ = prices(work), sizes(work)
    stages = UNEVEN if num_stages == 12 else Split.remainder_first(104, num_stages)
    again = AGAIN if num_stages == 12 else (1,) * num_stages
    problem = problem_of(work, listed, bytes_, schedule=schedule, chunks=num_stages // 12)
    answer = evaluate(problem, stages, again)
    result = estimate(work, stages, again, schedule=schedule)
    assert result.pipeline_s == pytest.approx(answer.makespan)
    assert result.bubble_fraction == pytest.approx(answer.bubble)
    totals = [rank.total - bytes_.reserve for rank in result.memory]
    for total, solved in zip(totals, answer.memory, strict=True):
        assert total <= solved * (1 + 1e-9)  # what the solver lets pass fits
        assert solved <= 1.04 * total


@pytest.mark.parametrize("recompute", [(0,) * 12, AGAIN])
def test_causes_sum_to_the_step(recompute: tuple[int, ...]) -> None:
    work = skywork(imbalance=1.3)
    result = estimate(work, UNEVEN, recompute)
    layout = Layout(pp=12, dp=32, tp=4, stages=UNEVEN, recompute=recompute)
    causes = time_by_cause(work, prices(work), layout, UNEVEN, recompute, result)
    assert sum(causes.values()) == pytest.approx(result.step_s)
    assert min(causes.values()) >= 0
    assert causes["wait"] > 0
    assert (causes["recompute"] > 0) == any(recompute)


def test_fewer_micro_batches_than_ranks_are_simulated() -> None:
    """Not what `skymoe train` runs, but what published runs at the limit of strong scaling did."""
    few = estimate(skywork(num_micro=4), UNEVEN, (0,) * 12)
    assert few.bubble_fraction > 0.7


def test_stages_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="halves"):
        estimate(skywork(), Split((50, 50)), (0, 0))
    with pytest.raises(ConfigError, match="interleaved"):
        estimate(skywork(), Split((104,)), (0,), schedule=ScheduleKind.INTERLEAVED)


STEADY = {4: (0.964, 56.3), 6: (0.975, 39.5), 8: (0.940, 31.1), 12: (0.878, 22.8), 16: (0.823, 18.7)}


@pytest.mark.parametrize("pp", STEADY)
def test_skywork_moe_over_pipelines_of_whole_layers(pp: int) -> None:
    """Research, section 2.4: the share of a steady period in which ranks work, and bytes that stay on the first one.

    There times are FLOPs, stages are whole layers, and GB are without the reserve.
    """
    efficiency, static_gb = STEADY[pp]
    layout = Layout(pp=pp, dp=1536 // 4 // pp, tp=4, stages=Split.remainder_first(104, pp))
    work = replace(skywork(), division=Division.of(layout), num_micro=128)
    counted = flops(work.shape, 8192, causal=True)
    halves = tuple(Price(forward_s=each, backward_s=2 * each) for each in counted.halves)
    head = Price(forward_s=counted.head, backward_s=2 * counted.head)
    listed = Prices(halves=halves, embedding=Price(forward_s=0, backward_s=0), head=head, hop_s=0.0)
    answer = solve(problem_of(work, listed, sizes(work), memory=1e12, whole_layers=True))
    assert sum(answer.busy) / pp / max(answer.busy) == pytest.approx(efficiency, abs=2e-3)
    assert max(answer.stages.sizes) == 2 * -(-52 // pp)
    first = rank_memory(work, sizes(work), answer.stages, answer.recompute, schedule=ScheduleKind.ONE_F_ONE_B)[0]
    layers = answer.stages.sizes[0] / 2
    static = (first.weights + first.gradients + first.optimizer) / 1e9
    assert static * -(-52 // pp) / layers == pytest.approx(static_gb, rel=0.02)
