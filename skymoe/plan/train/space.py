"""The layouts that N GPUs allow: pp x tp x dp, expert axis, dispatch, micro-batch, schedule. Legal ones only.

What is legal is what `skymoe train` can run (`Layout.check`, `check_micro_batches`), and a tensor-parallel group that
stays within a node: its messages are on the critical path of every layer. Nothing needs to divide anything else, but
every replica takes the same number of sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.gpu import Cluster
from skymoe.plan.orders import check_micro_batches
from skymoe.plan.train.config import PlanTrainConfig
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.model import ModelSpec
from skymoe.spec.split import Split

USUAL_SEQUENCES = 1024
MICRO_BATCHES = (1, 2, 4)
CHUNKS = (2, 3, 4)


@dataclass(frozen=True, kw_only=True, order=True)
class Candidate:
    """One way to use the GPUs. `chunks` is stages per rank; `num_micro` micro-batches per step and replica."""

    pp: int
    dp: int
    tp: int
    expert: ExpertAxis
    dispatch: DispatchMode
    schedule: ScheduleKind
    chunks: int
    micro_batch: int
    num_micro: int

    @property
    def num_stages(self) -> int:
        """Over all ranks."""
        return self.pp * self.chunks

    def layout(self, stages: Split, recompute: tuple[int, ...] = ()) -> Layout:
        """With a division of the layers."""
        return Layout(
            pp=self.pp, dp=self.dp, tp=self.tp, expert=self.expert, dispatch=self.dispatch, schedule=self.schedule,
            stages=stages, recompute=recompute,
        )  # fmt: skip


def usual_sequences(num_gpus: int) -> int:
    """About 1024 sequences, with the odd factor of `num_gpus` in it: however the GPUs divide into replicas, the
    replicas divide the sequences.
    """
    odd = num_gpus
    while odd % 2 == 0:
        odd //= 2
    return odd << max(0, round(math.log2(USUAL_SEQUENCES / odd)))


def candidates(config: PlanTrainConfig, spec: ModelSpec, cluster: Cluster, sequences: int) -> list[Candidate]:
    """All legal ones, with every axis that `config` gives as it gives it.

    Args:
        config: what is asked.
        spec: the model.
        cluster: the machine.
        sequences: of a step.
    """
    return [
        candidate
        for pp, dp, tp in divisions(config, spec, cluster)
        for expert, dispatch in _expert_ways(config, spec, dp, tp)
        for schedule, chunks in _schedules(config, spec, pp)
        for candidate in _micro_batches(config, sequences, pp, dp, tp, expert, dispatch, schedule, chunks)
    ]


def units_of(config: PlanTrainConfig, spec: ModelSpec) -> int:
    """What a stage needs one of."""
    return spec.num_layers if config.whole_layers else 2 * spec.num_layers


def tp_fits(tp: int, spec: ModelSpec, cluster: Cluster) -> bool:
    """Whether every tensor-parallel rank has a head and every group is within one node."""
    in_node = cluster.gpus_per_node % tp == 0 or tp <= cluster.num_gpus <= cluster.gpus_per_node
    return tp <= spec.num_kv_heads and in_node


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def divisions(config: PlanTrainConfig, spec: ModelSpec, cluster: Cluster) -> Iterator[tuple[int, int, int]]:
    """pp, dp, tp."""
    for tp in divisors(config.gpus):
        if config.tp not in (None, tp) or not tp_fits(tp, spec, cluster):
            continue
        for pp in divisors(config.gpus // tp):
            dp = config.gpus // tp // pp
            if config.pp in (None, pp) and config.dp in (None, dp) and pp <= units_of(config, spec):
                yield pp, dp, tp


def _expert_ways(
    config: PlanTrainConfig, spec: ModelSpec, dp: int, tp: int
) -> Iterator[tuple[ExpertAxis, DispatchMode]]:
    """Expert axes that differ on these ranks, with the dispatch that is asked or usual."""
    if spec.moe is None:
        yield ExpertAxis.EDP, config.dispatch or (DispatchMode.GATHERED if tp > 1 else DispatchMode.REPLICATED)
        return
    seen = set()
    for axis in ExpertAxis if config.expert is None else (config.expert,):
        # (over how many ranks, cut into how many): with one rank on an axis, two names mean the same.
        ways = {ExpertAxis.EDP: (tp, 1), ExpertAxis.EP: (dp * tp, 1), ExpertAxis.ETP: (dp, tp)}[axis]
        if ways in seen or ways[0] > spec.moe.num_experts:
            continue
        seen.add(ways)
        alone = ways == (1, 1) and tp == 1
        yield axis, config.dispatch or (DispatchMode.REPLICATED if alone else DispatchMode.ALL_TO_ALL)


def _schedules(config: PlanTrainConfig, spec: ModelSpec, pp: int) -> Iterator[tuple[ScheduleKind, int]]:
    """Schedules with stages enough for everybody; one rank has nothing to schedule."""
    if pp == 1:
        yield ScheduleKind.ONE_F_ONE_B, 1
        return
    for schedule in ScheduleKind if config.schedule is None else (config.schedule,):
        asked = CHUNKS if config.chunks is None else (config.chunks,)
        chunks = {ScheduleKind.ONE_F_ONE_B: (1,), ScheduleKind.ZERO_BUBBLE: (2,)}.get(schedule, asked)
        yield from ((schedule, number) for number in chunks if pp * number <= units_of(config, spec))


def _micro_batches(
    config: PlanTrainConfig, sequences: int, pp: int, dp: int, tp: int, expert: ExpertAxis, dispatch: DispatchMode,
    schedule: ScheduleKind, chunks: int,
) -> Iterator[Candidate]:  # fmt: skip
    for micro_batch in MICRO_BATCHES if config.micro_batch is None else (config.micro_batch,):
        num_micro, rest = divmod(sequences, dp * micro_batch)
        if rest or not num_micro:
            continue
        candidate = Candidate(
            pp=pp, dp=dp, tp=tp, expert=expert, dispatch=dispatch, schedule=schedule, chunks=chunks,
            micro_batch=micro_batch, num_micro=num_micro,
        )  # fmt: skip
        try:
            check_micro_batches(candidate.layout(Split((1,) * candidate.num_stages)), num_micro)
        except ConfigError:
            continue
        yield candidate
