"""Prices: what the cost model answers. Seconds on one rank, for one micro-batch unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Price:
    """One part of the model.

    Attributes:
        forward_s, backward_s: of one micro-batch; communication that is not hidden included; backward is both its
            halves (towards the input and of the weights) and what the base level of recomputation runs again.
        weight_s: the part of `backward_s` that is gradients of weights (what zero-bubble schedules move).
        again_s: added to the backward when the part is run again whole (its forward, a little more than `forward_s`
            where that hides communication).
        parts: seconds of forward and backward together by cause: "gemm", "attention", "memory" (norms, activations,
            softmax), "tp", "cp", "expert" (dispatch and combine), "wait" (imbalance), "weights" (FSDP),
            "host" (waiting for kernels to be started). They sum to forward_s + backward_s.
    """

    forward_s: float
    backward_s: float
    weight_s: float = 0.0
    again_s: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """All parts.

    Attributes:
        halves: 2 L, attention and feed-forward of each layer in turn. Equal layers share one object.
        embedding, head: ends of the model; the head with the last norm and the loss.
        hop_s: from stage to stage, exposed, one way.
    """

    halves: tuple[Price, ...]
    embedding: Price
    head: Price
    hop_s: float


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """What a step costs beside its micro-batches, on the slowest rank. Seconds.

    Attributes:
        reduce_s, gather_s: gradients to their owners, weights back: all of it.
        exposed_s: the part of both that nothing hides.
        update_s: clipping and the optimizer.
    """

    reduce_s: float
    gather_s: float
    exposed_s: float
    update_s: float

    @property
    def total_s(self) -> float:
        """Added to the pipeline's time."""
        return self.exposed_s + self.update_s
