"""What `skymoe plan serve` answers. Every time and rate is predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from skymoe.spec.serving_plan import ServingPlan

SCHEMA = "skymoe-plan-serve/1"


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """One GPU, GB.

    Attributes:
        gpu: its name.
        weights, reserve: what is held for good.
        context: keys and values of one sequence of the longest kind.
        needed: the three together.
        kv_room: what is left beside weights and reserve, for keys and values.
        memory: what the GPU has.
    """

    gpu: str
    weights: float
    reserve: float
    context: float
    needed: float
    kv_room: float
    memory: float


@dataclass(frozen=True, kw_only=True)
class BatchPoint:
    """One batch.

    Attributes:
        batch: sequences at a time.
        fits: whether so many finished requests have room; if not, the figures are what they would give with more.
        sequence_tokens: mean length at which they are decoded.
        step_s: of decoding alone: the time between two tokens of a sequence.
        tokens_per_s: batch / step_s.
        mixed_tokens_per_s: output tokens when prompts of new requests share the steps.
        inter_token_s: between tokens then.
        ttft_s: from a prompt to its first token, waiting for the step that runs.
        parts: shares of `step_s` by cause.
    """

    batch: int
    fits: bool
    sequence_tokens: float
    step_s: float
    tokens_per_s: float
    mixed_tokens_per_s: float
    inter_token_s: float
    ttft_s: float
    parts: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PipelineChoice:
    """Layers over GPUs instead.

    Attributes:
        layers: per GPU.
        kv_tokens: that have room.
        best_batch, mixed_tokens_per_s: as in the sweep; None when no batch fits.
        vllm: what vLLM is told.
    """

    layers: tuple[int, ...]
    kv_tokens: int
    best_batch: int | None
    mixed_tokens_per_s: float | None
    vllm: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a million output tokens at the best batch, prompts included."""

    gpu_hours: float
    money: float | None


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another model on the same GPUs.

    Attributes:
        model: its name.
        fits: whether it does.
        why: why not.
        active_parameters, active_ratio: a token's, and over those of the model that is planned.
        best_batch, mixed_tokens_per_s: at its own best batch among those tried.
        same_batch, same_batch_tokens_per_s: decoding alone at the planned model's best batch.
        times_cheaper: tokens per second of the planned model over its own, each at its best batch.
        times_cheaper_same_batch: the same, decoding alone, at one batch.
    """

    model: str
    active_parameters: float
    active_ratio: float
    fits: bool = False
    why: str = ""
    best_batch: int | None = None
    mixed_tokens_per_s: float | None = None
    same_batch: int | None = None
    same_batch_tokens_per_s: float | None = None
    times_cheaper: float | None = None
    times_cheaper_same_batch: float | None = None


@dataclass(frozen=True, kw_only=True)
class ServeReport:
    """The answer.

    Attributes:
        model, gpus, weights, kv, context, engine, objective: as asked.
        splits: units per GPU in layer 0: heads, kv_groups, ffn_blocks, experts, vocabulary.
        ffn_block: columns of a block.
        rotated: whether the remainder goes round by layer; `replicas`: GPUs per key/value head.
        memory_gb: what each GPU needs: weights, reserve, one longest sequence.
        memory: the same in parts.
        kv_tokens: tokens that have room; max_sequences: sequences of the longest kind.
        kv_tokens_rotated, kv_tokens_not_rotated: both ways; None where that does not fit.
        sweep: by batch; tokens_per_s: the same, batch to decoding tokens per second.
        best_batch: the batch that fits and gives most; None if none fits.
        limits: what bounds it, in words.
        pipeline, cost, rival: alternatives and prices.
        plan: for `skymoe serve --plan`.
        notes: what was assumed.
    """

    schema: str
    model: str
    gpus: tuple[str, ...]
    weights: str
    kv: str
    context: int
    engine: str
    objective: str
    splits: Mapping[str, tuple[int, ...]]
    ffn_block: int
    rotated: bool
    replicas: int
    fits: bool
    memory_gb: tuple[float, ...]
    memory: tuple[GpuMemory, ...]
    kv_tokens: int
    max_sequences: int
    kv_tokens_rotated: int | None
    kv_tokens_not_rotated: int | None
    sweep: tuple[BatchPoint, ...]
    tokens_per_s: Mapping[int, float]
    best_batch: int | None
    limits: tuple[str, ...]
    pipeline: PipelineChoice | None
    cost: Cost | None
    rival: Rival | None
    plan: ServingPlan
    notes: tuple[str, ...]
