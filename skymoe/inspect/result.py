"""InspectReport: the answer of `skymoe inspect`. `as_json()` is a stable schema, number 1.

Keys may be added within a schema number; a key that is removed or changes its meaning raises the number. Counts are
whole numbers, bytes are bytes, FLOPs count a multiply-add as two.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class FlopsTable:
    """FLOPs per token at one sequence length, by attention convention (see spec/flops.py).

    Attributes:
        sequence_length: tokens of context that the average is over.
        forward_causal, forward_full: of a forward pass.
        training_causal, training_full: of a training step, 3 times as many.
        parts: forward, causal, by part of the model.
    """

    sequence_length: int
    forward_causal: float
    forward_full: float
    training_causal: float
    training_full: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Bytes:
    """Sizes.

    Attributes:
        on_disk: of the weight files, headers included; None for a preset.
        files: how many weight files there are; 0 for a preset.
        by_dtype: bytes of the tensors on disk by element type; empty for a preset.
        weights: what all weights take in a number format: "float32", "bfloat16", "float8_e4m3fn".
        kv_cache_per_token: keys and values of one token in all layers, by number format.
    """

    on_disk: int | None
    files: int
    by_dtype: dict[str, int]
    weights: dict[str, int]
    kv_cache_per_token: dict[str, int]


@dataclass(frozen=True)
class Spread:
    """Mean, minimum and maximum of some figures."""

    mean: float
    min: float
    max: float


@dataclass(frozen=True)
class RouterFigures:
    """The router weight (E, D) of one layer.

    Attributes:
        layer: global layer id.
        row_norm: Euclidean norms of its rows, one row per expert.
        row_cosine: cosines between its rows; near 1 means that it can hardly tell the experts apart.
    """

    layer: int
    row_norm: Spread
    row_cosine: Spread


@dataclass(frozen=True)
class ExpertFigures:
    """Pairwise cosines between the experts of one layer, for each matrix and for whole experts."""

    layer: int
    gate: Spread
    up: Spread
    down: Spread
    all: Spread


@dataclass(frozen=True)
class InspectReport:
    """Everything `skymoe inspect` found.

    Attributes:
        schema: version of this layout.
        model: the name or directory that was asked for.
        source: "preset" or "directory".
        architecture: the family on disk.
        parameters, active_parameters: all of them; those that take part in one token.
        parameters_by_part: embedding, head, attention, dense_ffn, experts, shared, router, norms.
        shape: the facts of the architecture, by the field names of ModelSpec.
        flops_per_token: see FlopsTable.
        bytes: see Bytes.
        routers, experts: one entry per MoE layer; empty without weights.
        expert_similarity: mean over layers of the experts' mean pairwise cosine; None without weights.
    """

    schema: int
    model: str
    source: str
    architecture: str
    parameters: int
    active_parameters: int
    parameters_by_part: dict[str, int]
    shape: dict[str, Any]
    flops_per_token: FlopsTable
    bytes: Bytes
    routers: tuple[RouterFigures, ...] = ()
    experts: tuple[ExpertFigures, ...] = ()
    expert_similarity: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)
