"""DryRunReport: what a recipe means on many ranks, as plain data. No torch.

`--json` prints these fields; counts are whole numbers, bytes are bytes, shares are fractions of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GroupFigures:
    """Ranks that exchange tensors with this one; `kind` says along which axis."""

    kind: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class RankFigures:
    """What stays allocated on the asked rank between steps, padding of the buffers included.

    Attributes:
        rank, pp, dp, tp: which one.
        stages: of the pipeline.
        parameters: of its modules.
        weights, gradients: bytes.
        moments, master: bytes of the optimizer's share: Adam's moments, and the fp32 copy of narrower weights.
        groups: this rank's.
    """

    rank: int
    pp: int
    dp: int
    tp: int
    stages: tuple[int, ...]
    parameters: int
    weights: int
    gradients: int
    moments: int
    master: int
    groups: tuple[GroupFigures, ...]

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.gradients + self.moments + self.master


@dataclass(frozen=True)
class StageFigures:
    """A stage of the pipeline.

    Attributes:
        stage: its number in the order of the model.
        owner: the pipeline rank that has it.
        layers: how many, in halves.
        holds: which ones, in words.
        recompute: layers that are run again in the backward pass.
        parameters: of the whole stage, over all its ranks once.
        flops_share: of the forward FLOPs of a token, the head included.
    """

    stage: int
    owner: int
    layers: float
    holds: str
    recompute: int
    parameters: int
    flops_share: float


@dataclass(frozen=True)
class DryRunReport:
    """What the recipe means on `world_size` ranks.

    Attributes:
        world_size: ranks.
        layout: how they are used (`spec.timeline.layout_fields`).
        weights, gradients: number formats.
        sequences, sequence_length: of a step; tokens of one sequence.
        micro_sequences, num_micro: sequences of a micro-batch; micro-batches of a replica in a step.
        bubble: idle share of the pipeline if all stages take the same time; None where the schedule gives no formula.
        parameters: of the model, found by adding up what every rank has, each element once.
        mean_parameters, most_parameters: of one rank, replicas included.
        rank: the asked rank.
        stages: the stage table.
    """

    world_size: int
    layout: dict[str, Any]
    weights: str
    gradients: str
    sequences: int
    sequence_length: int
    micro_sequences: int
    num_micro: int
    bubble: float | None
    parameters: int
    mean_parameters: float
    most_parameters: int
    rank: RankFigures
    stages: tuple[StageFigures, ...]
