"""Sizes: what the memory model answers. Bytes on one rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Size:
    """One part of the model.

    Attributes:
        weights, gradients, optimizer: for good.
        activation: kept from a micro-batch's forward to its backward, at the base level of recomputation.
        checkpoint: kept instead when the part is run again whole (its input). A layer that is not cut keeps one input
            for both its halves.
        transient: alive only while the part runs (scores, dispatch buffers beyond what is kept, logits).
    """

    weights: float
    gradients: float
    optimizer: float
    activation: float
    checkpoint: float
    transient: float = 0.0

    @property
    def static(self) -> float:
        """What stays between steps."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All parts.

    Attributes:
        halves: 2 L, attention and feed-forward of each layer in turn. Equal layers share one object.
        embedding, head: ends of the model; the head's transient is logits and their gradient.
        reserve: context, communication buffers, workspace, fragmentation.
        boundary: what a stage gives to the next one, where the runtime keeps it until the backward.
    """

    halves: tuple[Size, ...]
    embedding: Size
    head: Size
    reserve: float
    boundary: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Peak of one pipeline rank, by cause. Bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    reserve: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.allocated + self.reserve

    @property
    def allocated(self) -> float:
        """What tensors take: what frameworks print as peak memory (`torch.cuda.max_memory_allocated`)."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient
