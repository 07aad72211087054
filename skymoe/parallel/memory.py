"""Bytes that ZeRO holds on a rank, without building anything: the same plan that lays out the buffers is asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from skymoe.parallel.shards import SHARD_BYTES, plan_flats
from skymoe.spec.layout import Coordinate, Layout
from skymoe.weights.slices import Slice


@dataclass(frozen=True)
class ZeroBytes:
    """What stays allocated between steps, padding included.

    Attributes:
        weights, gradients: whole stages.
        optimizer: moments of this rank's shards, and a step count (4 bytes) per portion.
        master: fp32 copy of the shards; 0 where the weights are fp32 or wider.
    """

    weights: int
    gradients: int
    optimizer: int
    master: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.master


def zero_bytes(
    stages: Mapping[int, Mapping[str, Slice]],
    layout: Layout,
    coordinate: Coordinate,
    *,
    tied: Collection[str],
    weight_bytes: int,
    gradient_bytes: int,
    shard_bytes: int = SHARD_BYTES,
) -> ZeroBytes:
    """Bytes on the rank at `coordinate`.

    Args:
        stages: `owned_slices` of each of its stages (buffers are left out).
        layout: the division.
        coordinate: of the rank.
        tied: names that the first and the last stage share.
        weight_bytes, gradient_bytes: per element.
        shard_bytes: as the optimizer gets it.
    """
    plans = plan_flats(stages, layout, coordinate, tied=tied, shard_elements=shard_bytes // gradient_bytes)
    whole, shards = sum(plan.size for plan in plans), sum(plan.state_size for plan in plans)
    return ZeroBytes(
        weights=whole * weight_bytes,
        gradients=whole * gradient_bytes,
        optimizer=2 * shards * max(weight_bytes, 4) + 4 * sum(len(plan.portions()) for plan in plans),
        master=shards * 4 if weight_bytes < 4 else 0,
    )
