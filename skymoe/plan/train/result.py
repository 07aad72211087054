"""What `skymoe plan train` answers, as plain data. Field names are the keys of `--json`; docs/plan.md describes them.

Seconds, GB of 10^9 bytes, shares of one. Stages are in the order of the model; memory is per pipeline rank (the same
where a rank has one stage).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from skymoe.plan.timeline import Timeline
from skymoe.plan.train.lost import Limit

SCHEMA = 1
_NO_TIMELINE = Timeline((), 0.0)


@dataclass(frozen=True, kw_only=True)
class LayoutFacts:
    """A division of the GPUs.

    Attributes:
        pp, dp, tp: ranks per axis.
        expert, dispatch, schedule: as in a plan file.
        chunks: stages per pipeline rank.
        micro_batch: sequences.
        num_micro: micro-batches per step and replica.
        recompute: what all layers run again: the base level, beside whole layers.
    """

    pp: int
    dp: int
    tp: int
    expert: str
    dispatch: str
    schedule: str
    chunks: int
    micro_batch: int
    num_micro: int
    recompute: str

    @property
    def words(self) -> str:
        """On one line."""
        ranks = f"pp {self.pp} x dp {self.dp} x tp {self.tp}"
        return f"{ranks}, {self.expert}/{self.dispatch}, micro-batch {self.micro_batch}, {self.schedule_words}"

    @property
    def schedule_words(self) -> str:
        """With the stages per rank, where they are a choice."""
        return self.schedule if self.schedule != "interleaved" else f"{self.schedule} x{self.chunks}"


@dataclass(frozen=True, kw_only=True)
class MemoryGB:
    """Peak of one pipeline rank, by cause."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    reserve: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A step of one division.

    Attributes:
        split: layers per stage; x.5 is cut between attention and feed-forward.
        recompute: per stage, how many of its layers (the first ones) are run again.
        step_time_s, tokens_per_s_per_gpu, mfu_causal, mfu_full, hfu, bubble_fraction: see docs/plan.md.
        memory_gb: per pipeline rank.
        memory: the same by cause.
        stage_forward_s, stage_backward_s: of one micro-batch.
        stage_again_s: the part of the backward in which layers are run again.
        fits: within the memory that may be used.
    """

    split: tuple[float, ...]
    recompute: tuple[int, ...]
    step_time_s: float
    tokens_per_s_per_gpu: float
    mfu_causal: float
    mfu_full: float
    hfu: float
    bubble_fraction: float
    memory_gb: tuple[float, ...]
    memory: tuple[MemoryGB, ...]
    stage_forward_s: tuple[float, ...]
    stage_backward_s: tuple[float, ...]
    stage_again_s: tuple[float, ...]
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Proof:
    """How good the division of the layers is, among all divisions for this layout (see pipeline/problem.py).

    The bound is of the pipeline alone: `step_time_s` has the end of the step too.
    """

    optimal: bool
    pipeline_lower_bound_s: float
    gap: float
    method: str
    examined: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """A layout that was divided and timed.

    Attributes:
        layout, split, recompute: what.
        step_time_s, tokens_per_s_per_gpu, bubble_fraction: how fast.
        memory_gb: of the fullest rank.
        reason: against the best: by how much it is slower, and of which causes.
    """

    layout: LayoutFacts
    split: tuple[float, ...]
    recompute: tuple[int, ...]
    step_time_s: float
    tokens_per_s_per_gpu: float
    bubble_fraction: float
    memory_gb: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A layout that was not divided or does not fit, and why, with numbers."""

    layout: LayoutFacts
    why: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Something beside the layouts that `skymoe train` runs, on the chosen layout."""

    what: str
    step_time_s: float
    tokens_per_s_per_gpu: float
    gain: float
    memory_gb: tuple[float, ...]
    note: str


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """The answer.

    Attributes:
        schema: version of these fields.
        model, gpu, gpus, nodes_of, sequence_length, global_batch_tokens, precision: the question.
        layout: of the GPUs.
        best: its figures; their fields stand at the top of the JSON.
        uniform: the same for as many whole layers on every stage as it goes, in the same layout.
        gain_vs_uniform: tokens/s over those of `uniform`, less one.
        certificate: of the division of the layers.
        emit: files and flags for other programs.
        limits: what the time is lost to, the largest first.
        candidates: the runners-up.
        rejected: what was left out, and why.
        pareto: memory against speed, among everything that was timed.
        portable: the best layout with whole layers under 1F1B, which other programs run too; None where that is the
            answer, or nothing of the kind fits.
        vocabulary_parallel, alternatives: what would change beyond that.
        examined: how many layouts there are, and what was done with them.
        assumptions: what nobody said.
        accuracy: how far such figures can be trusted.
        timeline, uniform_timeline: for drawing; not in the JSON.
    """

    schema: int = SCHEMA
    model: str
    gpu: str
    gpus: int
    nodes_of: int
    memory_limit_gb: float
    sequence_length: int
    global_batch_tokens: int
    precision: str
    layout: LayoutFacts
    best: Figures
    uniform: Figures
    gain_vs_uniform: float
    certificate: Proof
    emit: Mapping[str, Any]
    limits: tuple[Limit, ...]
    time_by_cause_s: Mapping[str, float]
    candidates: tuple[Row, ...]
    rejected: tuple[Rejected, ...]
    pareto: tuple[Row, ...]
    portable: Row | None
    vocabulary_parallel: Alternative | None
    alternatives: tuple[Alternative, ...]
    examined: Mapping[str, int]
    assumptions: tuple[str, ...]
    accuracy: tuple[str, ...]
    timeline: Timeline
    uniform_timeline: Timeline

    def with_emit(self, emitted: Mapping[str, Any]) -> TrainPlan:
        """The same with files and flags for other programs, which need the rest of it."""
        return replace(self, emit=emitted)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`: the figures of the best division at the top, timelines left out."""
        data = asdict(replace(self, timeline=_NO_TIMELINE, uniform_timeline=_NO_TIMELINE))
        best = data.pop("best")
        del data["timeline"], data["uniform_timeline"]
        return {**best, **data}
