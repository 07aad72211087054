"""A tied table under zbv: the rank that has the first and the last stage keeps, reduces and updates it once."""

from dataclasses import replace

import pytest
from plan.pipeline_cases import plain

from skymoe.plan.cost.bill import Frame
from skymoe.plan.cost.model import prices, step_end
from skymoe.plan.cost.sharding import Sharding
from skymoe.plan.hardware.catalogue import cluster_of
from skymoe.plan.memory.model import rank_memory, sizes
from skymoe.plan.pipeline.problem import End
from skymoe.plan.pipeline.solve import evaluate, with_vocabulary_parallel
from skymoe.plan.shape import shape_of
from skymoe.plan.train.problem_of import problem_of
from skymoe.plan.work import Division, Work
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.presets import preset
from skymoe.spec.split import Split

ZBV, FLAT = ScheduleKind.ZERO_BUBBLE, ScheduleKind.ONE_F_ONE_B


def work(tied: bool) -> Work:
    shape = replace(shape_of(preset("llama-3-8b")), tied=tied)
    division = Division(pp=2, dp=8, tp=1, sequence_parallel=False)
    return Work(
        shape=shape, division=division, sequence_length=4096, micro_batch=1, num_micro=8, chunks=2,
        cluster=cluster_of("h100-80g", division.world_size),
    )  # fmt: skip


def test_one_table_in_the_memory_of_the_solver():
    table = End(forward=1.0, backward=1.0, static=5.0)
    problem = plain(8, 2, 8, embedding=table, head=table, tied_static=5.0)
    folded = replace(problem, schedule=ZBV, chunks=2)
    twice = replace(folded, tied_static=0.0)
    once, both = (evaluate(one, Split((2,) * 4), (0,) * 4).memory for one in (folded, twice))
    assert both[0] - once[0] == 5 and both[1] == once[1]
    apart = evaluate(problem, Split((4, 4)), (0, 0)).memory
    assert apart == evaluate(replace(problem, tied_static=0.0), Split((4, 4)), (0, 0)).memory
    assert with_vocabulary_parallel(folded).shared.static == 5 / 4


@pytest.mark.parametrize(("schedule", "chunks"), [(ZBV, 2), (FLAT, 1)])
def test_the_solver_has_the_static_memory_of_the_memory_model(schedule, chunks):
    of = replace(work(True), chunks=chunks)
    stages, bytes_ = Split.remainder_first(64, 2 * chunks), sizes(of)
    problem = problem_of(of, prices(of), bytes_, schedule=schedule, chunks=chunks)
    kept_nothing = replace(
        problem, units=tuple(replace(unit, activation=0.0, transient=0.0) for unit in problem.units),
        embedding=replace(problem.embedding, activation=0.0, transient=0.0),
        head=replace(problem.head, activation=0.0, transient=0.0),
    )  # fmt: skip
    memory = rank_memory(of, bytes_, stages, (0,) * stages.num_ranks, schedule=schedule)
    expected = [rank.weights + rank.gradients + rank.optimizer for rank in memory]
    assert evaluate(kept_nothing, stages, (0,) * stages.num_ranks).memory == pytest.approx(expected)


def test_the_end_of_a_step_has_one_table_and_no_exchange():
    stages, table = Split((16,) * 4), 128256 * 4096
    own, loose = (Sharding(Frame(work(tied))).per_rank(stages, ZBV) for tied in (True, False))
    assert loose[0].dense - own[0].dense == table and own[1] == loose[1]
    tied, untied = (step_end(work(one), stages, pipeline_s=1.0, schedule=ZBV) for one in (True, False))
    assert tied.exposed_s < untied.exposed_s and tied.update_s < untied.update_s
    flat = Split((32, 32))
    tied, untied = (step_end(replace(work(one), chunks=1), flat, pipeline_s=1.0) for one in (True, False))
    assert tied.exposed_s > untied.exposed_s, "two ranks have the table and add up its gradients"
