"""The division, the micro-batches, the stages and the schedule of a case; and what had to be assumed.

A layout is *fully known* when tensor, pipeline and data parallel ranks, the micro-batch, the number of micro-batches
and recomputation are all published. What is missing is assumed here, in one way for all groups, and said; such cases
are predicted too, and judged apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from skymoe.plan.hardware.gpu import Cluster
from skymoe.plan.memory.alive import vocabulary_alive
from skymoe.plan.validate.cases import Case, NotJudgedError
from skymoe.plan.validate.levels import Again, case_again
from skymoe.plan.validate.software import with_habits
from skymoe.plan.work import Division
from skymoe.spec.layout import DispatchMode, ScheduleKind


class Pipeline(StrEnum):
    """Schedules of published runs; more than this package's runtime has."""

    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZB_H1 = "zb-h1"
    ZB_H2 = "zb-h2"
    ZB_1P = "zb-1p"
    ZB_2P = "zb-2p"


ZERO_BUBBLE: Final = frozenset({Pipeline.ZB_H1, Pipeline.ZB_H2, Pipeline.ZB_1P, Pipeline.ZB_2P})


class Placement(StrEnum):
    """Which layers a stage has."""

    UNIFORM = "uniform"
    REDISTRIBUTED = "redistributed"  # fewer layers on the last stage, as Vocabulary Parallelism has it: "redis"
    VOCABULARY = "vocabulary"  # uniform, embedding and head divided over all stages
    ENDS_FEWER = "ends fewer"  # first and last stage one layer fewer
    WRITTEN = "written"


@dataclass(frozen=True, kw_only=True)
class CaseLayout:
    """How a case is run.

    Attributes:
        division: over ranks.
        micro_batch, num_micro: sequences, and micro-batches per step and replica.
        chunks: stages per pipeline rank.
        pipeline, placement: schedule and split.
        written: layers per stage where `placement` is WRITTEN.
        again: recomputation.
        fused_loss: the loss overwrites its logits; else it holds an fp32 copy and a gradient beside them.
        alive: micro-batches alive per stage, where these are more than the schedule's.
        unfused_passes: streams that experts' biases and clamps add (see software.py).
        known: fully known (see above).
        assumed: in words.
    """

    division: Division
    micro_batch: int
    num_micro: int
    chunks: int
    pipeline: Pipeline
    placement: Placement
    written: tuple[int, ...] = ()
    again: Again = field(default_factory=Again)
    fused_loss: bool = True
    alive: tuple[int, ...] | None = None
    unfused_passes: float = 0.0
    known: bool = True
    assumed: tuple[str, ...] = ()

    @property
    def schedule(self) -> ScheduleKind:
        """Which of ours places its stages so; zero-bubble ones of published runs have one stage per rank."""
        return ScheduleKind.INTERLEAVED if self.chunks > 1 else ScheduleKind.ONE_F_ONE_B


def case_layout(case: Case, cluster: Cluster, *, is_moe: bool) -> CaseLayout:
    """The layout of `case`. Raises NotJudgedError when it contradicts itself or cannot be guessed."""
    assumed: list[str] = []
    division = _division(case, cluster, is_moe=is_moe, assumed=assumed)
    micro_batch, num_micro = _batches(case, division, assumed)
    again = case_again(case)
    if not again.stated:
        assumed.append("recomputation not stated: the fewest whole layers that fit")
    pipeline, chunks = _pipeline(case, division.pp, assumed)
    placement, written = _placement(case, division.pp * chunks)
    published = all(case.has(f"parallel.{axis}") for axis in ("tp", "pp"))
    published = published and case.has("batch.micro_batch_size") and again.stated
    counted = case.has("batch.num_microbatches") or (case.has("batch.global_batch_size") and case.has("parallel.dp"))
    return CaseLayout(
        division=division, micro_batch=micro_batch, num_micro=num_micro, chunks=chunks, pipeline=pipeline,
        placement=placement, written=written, again=again, known=published and counted,
        fused_loss=case.text("framework").lower() != "torchtitan", assumed=tuple(assumed),
        alive=_alive(case, division.pp, num_micro) if placement is Placement.VOCABULARY else None,
    )  # fmt: skip


def _division(case: Case, cluster: Cluster, *, is_moe: bool, assumed: list[str]) -> Division:
    if not (case.has("parallel.tp") and case.has("parallel.pp")) and not case.has("parallel.dp"):
        raise NotJudgedError("the division over GPUs is not published")
    tp, pp, cp = (case.count(f"parallel.{axis}", 1, high=10**5) for axis in ("tp", "pp", "cp"))
    per_replica = tp * pp * cp
    replicas, rest = divmod(cluster.num_gpus, per_replica)
    dp = case.count("parallel.dp", replicas or None)
    if rest or dp * per_replica != cluster.num_gpus:
        raise NotJudgedError(f"tp {tp} x pp {pp} x cp {cp} x dp {dp} are not {cluster.num_gpus} GPUs")
    stage = tp * cp * dp
    ep = case.count("parallel.ep", 1) if is_moe else 1
    etp = case.count("parallel.etp", _expert_tp(case, tp, ep, stage, assumed)) if is_moe else 1
    if stage % (ep * etp):
        raise NotJudgedError(f"ep {ep} x etp {etp} do not divide the {stage} GPUs of a stage")
    zero_stage, shards = _zero(case)
    division = Division(
        pp=pp,
        dp=dp,
        tp=tp,
        cp=cp,
        ep=ep,
        etp=etp,
        expert_stride=etp,
        dispatch=DispatchMode.ALL_TO_ALL,
        sequence_parallel=case.flag("parallel.sequence_parallel", True) and tp > 1,
        zero_stage=zero_stage,
        zero_ranks=shards,
        expert_overlap=case.text("parallel.ep_overlap") == "on" or case.flag("parallel.ep_overlap", False),
    )
    return with_habits(case, division)


def _expert_tp(case: Case, tp: int, ep: int, stage: int, assumed: list[str]) -> int:
    """Megatron divides each expert by tp unless told otherwise; with folding or many small experts it does not."""
    method = case.text("parallel.method").lower()
    if method.endswith("folding") or tp == 1:
        return 1
    if method and stage % (ep * tp) == 0:
        return tp  # the tables of MoE Parallel Folding: without it, experts are cut as attention is
    experts, inner = case.count("model.moe.num_experts", 1), case.count("model.moe.moe_ffn_hidden_size", 1)
    if stage % (ep * tp) == 0 and experts <= 16 and inner >= 8192:
        assumed.append(f"each expert cut by tp = {tp}")
        return tp
    assumed.append("experts are not cut")
    return 1


def _zero(case: Case) -> tuple[int, int | None]:
    """ZeRO stage and over how many ranks, from whichever field the table has."""
    sharding = case.get("parallel.fsdp")
    method = f"{case.text('parallel.method')} {case.text('parallel.technique')}"
    if isinstance(sharding, str):
        return (2 if "GRAD" in sharding.upper() else 3), None
    if sharding is True or re.search(r"\bfsdp", method, re.IGNORECASE):
        return 3, None
    if isinstance(sharding, int) and sharding > 1:
        return 3, min(sharding, 10**6)
    group = re.fullmatch(r"\d{1,6}", str(case.get("parallel.zero1_group")))
    old = re.fullmatch(r"megatron-lm", case.text("framework").lower()) is not None  # 2021, 2022
    stage = case.count("parallel.zero_stage", 0 if old else 1, low=0, high=3)
    return stage, int(group[0]) if group and int(group[0]) else None


def _batches(case: Case, division: Division, assumed: list[str]) -> tuple[int, int]:
    """Sequences of a micro-batch and micro-batches of a step; the global batch decides where the three disagree."""
    micro = case.count("batch.micro_batch_size", 0, low=0)
    sequences = case.count("batch.global_batch_size", 0, low=0)
    number = case.count("batch.num_microbatches", 0, low=0)
    if not micro and sequences and number and sequences % (number * division.dp) == 0:
        micro = sequences // (number * division.dp)
    if not micro:
        micro = 1
        assumed.append("micro-batch of 1 sequence")
    if sequences >= micro * division.dp:
        number = round(sequences / (micro * division.dp))
    if not number:
        number = 8 * division.pp
        assumed.append(f"{number} micro-batches")
    if number > 100_000:
        raise NotJudgedError(f"{number} micro-batches")
    return micro, number


def _pipeline(case: Case, pp: int, assumed: list[str]) -> tuple[Pipeline, int]:
    words = case.text("parallel.schedule").lower()
    chunks = case.count("parallel.vp", 1, high=512) if pp > 1 else 1
    zero_bubble = re.search(r"zb-?(1p|2p|h1|h2)\b", words)
    if zero_bubble:
        return Pipeline(f"zb-{zero_bubble[1]}"), 1
    if re.search(r"interleav|1f1b-i\b", words) and chunks == 1 and pp > 1:
        assumed.append("2 chunks per rank")
        return Pipeline.INTERLEAVED, 2
    if words and not re.search(r"1f1b|interleav", words):
        raise NotJudgedError(f"schedule {words!r}")
    return (Pipeline.INTERLEAVED if chunks > 1 else Pipeline.ONE_F_ONE_B), chunks


def _placement(case: Case, num_stages: int) -> tuple[Placement, tuple[int, ...]]:
    if isinstance(case.get("parallel.layer_split"), list):
        sizes = case.numbers("parallel.layer_split")
        if len(sizes) != num_stages or any(size != int(size) for size in sizes):
            raise NotJudgedError("the layer split does not fit the stages")
        return Placement.WRITTEN, tuple(int(size) for size in sizes)
    words = case.text("parallel.layer_split").lower()
    if "vocabulary layers" in words or "vocab" in words and "all stages" in words:
        return Placement.VOCABULARY, ()
    if "redis" in words:
        return Placement.REDISTRIBUTED, ()
    if "one layer fewer" in case.text("parallel.layer_split_rule"):
        return Placement.ENDS_FEWER, ()
    return Placement.UNIFORM, ()


def _alive(case: Case, pp: int, num_micro: int) -> tuple[int, ...]:
    """With a divided vocabulary; interlaced pipelines keep half as much again as 1F1B (Yeung et al. 2025)."""
    words = f"{case.id} {case.text('parallel.schedule')}".lower()
    if "interlaced" in words:
        return tuple(min(-(-3 * (pp - rank) // 2), num_micro) for rank in range(pp))
    return vocabulary_alive(pp, num_micro, barriers=2 if re.search(r"vocab-?1\b", words) else 1)
