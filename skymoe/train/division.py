"""Who has which part of the model and of the tokens, as sums over ranks need to know it.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from skymoe.ops.balance import GateTotals
from skymoe.parallel.collectives import sum_forward
from skymoe.parallel.mesh import Group, Mesh
from skymoe.parallel.part import Part
from skymoe.spec.model import ModelSpec


@dataclass(frozen=True)
class Division:
    """This rank's parts, and over whom sums run.

    Attributes:
        spec: of the whole model.
        mesh: of this rank.
        parts: its stages.
    """

    spec: ModelSpec
    mesh: Mesh
    parts: Mapping[int, Part]

    @cached_property
    def moe_index(self) -> dict[int, int]:
        """Global layer id -> place among the MoE layers."""
        return {layer: index for index, layer in enumerate(self.spec.moe_layer_ids)}

    @property
    def last_part(self) -> Part:
        """The part with the head."""
        return self.parts[self.mesh.layout.num_stages - 1]

    @property
    def replica(self) -> Group | None:
        """The ranks whose tokens together are a micro-batch; None where this rank has all of them."""
        return self.mesh.tp if self.mesh.layout.sequence_parallel else None

    @property
    def everybody(self) -> Group:
        """The ranks whose tokens together are the global batch."""
        return self.mesh.dp_tp if self.mesh.layout.sequence_parallel else self.mesh.dp

    @property
    def counts_here(self) -> bool:
        """Whether what this rank counts is not counted by another: in mode R all tensor-parallel ranks see the same."""
        return self.mesh.layout.sequence_parallel or self.mesh.coordinate.tp == 0

    def tokens_here(self, values_N: Tensor | None) -> Tensor | None:
        """This rank's rows of something known for all tokens of a micro-batch."""
        return next(iter(self.parts.values())).tokens.own(values_N)

    def sum_totals(self, totals: Mapping[int, GateTotals], group: Group | None) -> dict[int, GateTotals]:
        """Totals by layer, summed over `group` in one message."""
        if group is None or group.handle is None or not totals:
            return dict(totals)
        summed = sum_forward(torch.stack([_flat(one) for one in totals.values()]), group)
        dtype = next(iter(totals.values())).prob_sum_E.dtype
        return {layer: _from_flat(row, dtype) for layer, row in zip(totals, summed, strict=True)}

    def sum_over_world(
        self, loss: Tensor, z: Tensor, totals_here: Mapping[int, GateTotals]
    ) -> tuple[Tensor, Tensor, list[GateTotals]]:
        """Loss, z and the totals of all layers, summed over all ranks; the same bits on each."""
        count, experts = len(self.moe_index), self.spec.moe.num_experts if self.spec.moe else 0
        message = torch.zeros(2 + count * (3 * experts + 1), dtype=torch.float64, device=self.mesh.device)
        if self.mesh.coordinate.tp == 0:
            message[0] = loss
        if self.counts_here:
            message[1] = z
            rows = message[2:].view(count, 3 * experts + 1)
            for index, totals in totals_here.items():
                rows[index] = _flat(totals)
        summed = sum_forward(message, self.mesh.world)
        return summed[0], summed[1], [_from_flat(row, torch.float64) for row in summed[2:].view(count, 3 * experts + 1)]


def _flat(totals: GateTotals) -> Tensor:
    """One row of numbers, fp64: exact for every count below 2^53."""
    parts = (totals.prob_sum_E, totals.counts_E, totals.dropped_E, totals.num_tokens[None])
    return torch.cat([part.double() for part in parts])


def _from_flat(row: Tensor, dtype: torch.dtype) -> GateTotals:
    experts = (row.numel() - 1) // 3
    probs, counts, dropped, tokens = row.split((experts, experts, experts, 1))
    return GateTotals(
        prob_sum_E=probs.to(dtype), counts_E=counts.long(), num_tokens=tokens[0].long(), dropped_E=dropped.long()
    )
