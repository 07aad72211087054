"""The end of a step: bytes over links, what hides them, the optimizer; FSDP layer by layer."""

from dataclasses import replace

import pytest

from skymoe.plan.cost.model import prices, step_end
from skymoe.plan.hardware.catalogue import cluster_of
from skymoe.plan.shape import shape_of
from skymoe.plan.work import Division, Work
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.presets import preset
from skymoe.spec.split import Split

LAYERS = 32


def dense(**changes):
    division = Division(**{"pp": 1, "dp": 64, "tp": 1, "sequence_parallel": False, **changes})
    return Work(
        shape=shape_of(preset("llama-3-8b")), division=division, sequence_length=8192, micro_batch=1, num_micro=4,
        cluster=cluster_of("h100-80g", division.world_size),
    )  # fmt: skip


def end_of(work, pipeline_s=1.0, **options):
    return step_end(
        work, Split.remainder_first(2 * LAYERS, work.division.pp * work.chunks), pipeline_s=pipeline_s, **options
    )


def test_gradients_and_weights_travel_once():
    """8.03 B parameters: 4 bytes each out, 2 back; 7/8 of a node's bytes come in through its eight cards."""
    work = dense()
    end, gpu = end_of(work), work.cluster.gpu
    bandwidth = min(gpu.node.bandwidth * 64 / 63, 8 * gpu.network.bandwidth * 64 / 56)
    assert end.reduce_s == pytest.approx(8.03e9 * 4 / bandwidth, rel=0.02)
    assert end.gather_s == pytest.approx(end.reduce_s / 2, rel=0.02)


def test_only_the_last_micro_batch_hides():
    end = end_of(dense(), pipeline_s=0.0)
    assert end.exposed_s == pytest.approx(end.reduce_s + end.gather_s)
    assert end_of(dense(overlap=False), pipeline_s=100.0).exposed_s == pytest.approx(end.exposed_s)
    assert end_of(dense(), pipeline_s=100.0).exposed_s < 0.2 * end.exposed_s
    few, many = (end_of(replace(dense(), num_micro=number)).exposed_s for number in (2, 64))
    assert few < many


def test_chunks_hide_more():
    work = dense(pp=4, dp=16)
    assert end_of(replace(work, chunks=2), 0.05).exposed_s < end_of(work, 0.05).exposed_s


def test_zero_inside_a_node_gathers_inside():
    """The memory of few shards, the speed of the node's link for weights; gradients still cross (InternEvo)."""
    far, near = end_of(dense(dp=512)), end_of(dense(dp=512, zero_ranks=8))
    assert near.gather_s < far.gather_s
    assert near.update_s > 1.5 * far.update_s


def test_without_zero_every_rank_updates_all():
    assert end_of(dense(zero_stage=0)).gather_s == 0
    # An all-reduce is a reduce-scatter and an all-gather of 4 bytes each.
    assert end_of(dense(zero_stage=0)).reduce_s == pytest.approx(2 * end_of(dense()).reduce_s, rel=0.02)
    assert end_of(dense(zero_stage=0)).update_s > 5 * end_of(dense()).update_s


def test_a_measured_optimizer_replaces_the_stream():
    assert end_of(dense(), update_s=1e-9).update_s == pytest.approx(8.03 / 64, rel=0.01)


def test_the_slowest_pipeline_rank_counts():
    """The head's rank under 1F1B; under zbv embedding and head are on one rank."""
    work = dense(pp=4, dp=16)
    lopsided = step_end(work, Split((40, 8, 8, 8)), pipeline_s=0.0)
    assert lopsided.reduce_s > 1.5 * end_of(work, 0.0).reduce_s
    zbv, folded = replace(work, chunks=2), Split.remainder_first(64, 8)
    assert (
        step_end(zbv, folded, pipeline_s=0.0, schedule=ScheduleKind.ZERO_BUBBLE).reduce_s
        > step_end(zbv, folded, pipeline_s=0.0, schedule=ScheduleKind.INTERLEAVED).reduce_s
    )


def test_expert_replicas_are_fewer():
    """EDP: experts reduce over dp like all else. EP over all ranks: not at all."""
    shape = shape_of(preset("skywork-moe"))
    stages = Split((2 * shape.num_layers,))
    work = Work(
        shape=shape, division=Division(pp=1, dp=4, tp=4, ep=4), cluster=cluster_of("a800-80g", 16),
        sequence_length=8192, micro_batch=1, num_micro=4,
    )  # fmt: skip
    everywhere = replace(work, division=replace(work.division, ep=16))
    assert step_end(everywhere, stages, pipeline_s=0.0).reduce_s < 0.1 * step_end(work, stages, pipeline_s=0.0).reduce_s


def test_fsdp_travels_layer_by_layer_behind_computation():
    plain, sharded, bare = (
        prices(dense(**changes)) for changes in ({}, {"zero_stage": 3}, {"zero_stage": 3, "overlap": False})
    )
    assert end_of(dense(zero_stage=3)).exposed_s == 0
    half, hidden, seen = plain.halves[1], sharded.halves[1], bare.halves[1]
    assert half.forward_s < hidden.forward_s < seen.forward_s
    assert sum(hidden.parts.values()) == pytest.approx(hidden.forward_s + hidden.backward_s)
    # 2 bytes forward, 2 + 4 backward.
    assert seen.backward_s - half.backward_s == pytest.approx(
        4 / 1 * (seen.forward_s - half.forward_s) * 3 / 4, rel=0.05
    )


def test_fsdp_with_little_to_compute_is_bound_by_the_network():
    work = replace(dense(zero_stage=3, dp=512), sequence_length=512)
    half = prices(work).halves[1]
    assert half.parts["weights"] > half.parts["gemm"]


def test_a_tied_table_of_a_pipeline_is_summed_between_its_ends():
    work = dense(pp=4, dp=16)
    tied = replace(work, shape=replace(work.shape, tied=True))
    assert end_of(tied, 0.0).exposed_s > end_of(work, 0.0).exposed_s
