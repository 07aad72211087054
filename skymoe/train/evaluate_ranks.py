"""Evaluation of a model that is divided over ranks: the same windows, the same figures.

The windows of a domain are dealt out to the replicas in micro-batches of the training's size; what is missing in the
last round is filled with pads, which are neither routed nor scored.

Shapes: B sequences, T tokens each, L MoE layers, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from skymoe.data.evaluation import EvaluationWindows
from skymoe.data.packing import IGNORE, Batch
from skymoe.parallel.collectives import sum_forward
from skymoe.parallel.figures import expert_similarity
from skymoe.parallel.pipeline import Pipeline
from skymoe.train.batches import MicroBatch, StepBatch, micro_batch
from skymoe.train.division import Division
from skymoe.train.evaluate import DomainSums, Held, figures
from skymoe.train.objective import Objective
from skymoe.train.passes import Pass


@torch.no_grad()
def evaluate_on_ranks(
    division: Division, pipeline: Pipeline[MicroBatch], held: Held, compute: torch.dtype | None
) -> dict[str, Any]:
    """The fields of an `eval` line, the same on every rank. Every rank calls it, its weights settled."""
    found = {
        domain: _evaluate_domain(division, pipeline, windows, held, compute) for domain, windows in held.domains.items()
    }
    return figures(found, _similarities(division))


def _evaluate_domain(
    division: Division,
    pipeline: Pipeline[MicroBatch],
    windows: EvaluationWindows,
    held: Held,
    compute: torch.dtype | None,
) -> tuple[DomainSums, list[Tensor]]:
    mesh, sums = division.mesh, DomainSums()
    size = next(iter(division.parts.values())).tokens.num_all // windows.sequence_length
    micros = []
    for number, first in enumerate(range(0, _round_up(len(windows), size * mesh.layout.dp), size)):
        rows = windows.batch(first, size)
        sums.targets += int(np.count_nonzero(rows.targets_BT != IGNORE))
        sums.bytes += held.bytes_of(rows)
        if number % mesh.layout.dp == mesh.coordinate.dp:
            micros.append(micro_batch(_filled(rows, size), held.isolate_documents, mesh.device, keep_mask=True))
    batch = StepBatch(tuple(micros), sums.targets, 0, len(windows))
    seen = Pass(division, batch, Objective(compute=compute))
    pipeline.evaluate(micros, seen.forward, seen.loss_of)
    loss, _, totals_L = division.sum_over_world(seen.loss, seen.z, seen.totals)
    sums.loss = float(loss)
    return sums, [totals.counts_E for totals in totals_L]


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _filled(rows: Batch, size: int) -> Batch:
    """`rows`, and pads up to `size` sequences."""
    missing = size - len(rows.tokens_BT)
    if not missing:
        return rows
    length = rows.tokens_BT.shape[1]
    pads = Batch(
        tokens_BT=np.zeros((missing, length), rows.tokens_BT.dtype),
        targets_BT=np.full((missing, length), IGNORE, rows.targets_BT.dtype),
        document_ids_BT=np.zeros((missing, length), rows.document_ids_BT.dtype),
        positions_BT=np.broadcast_to(np.arange(length, dtype=rows.positions_BT.dtype), (missing, length)),
        valid_BT=np.zeros((missing, length), rows.valid_BT.dtype),
        source_B=np.zeros(missing, rows.source_B.dtype),
    )
    return Batch._make(np.concatenate(pair) for pair in zip(rows, pads, strict=True))


def _similarities(division: Division) -> list[float]:
    """Mean pairwise cosine between the experts of every MoE layer: each plane of ranks forms those of its stages."""
    if division.spec.moe is None:
        return []
    index, mesh = division.moe_index, division.mesh
    message = torch.zeros(len(index), dtype=torch.float64, device=mesh.device)
    for part in division.parts.values():
        for layer, experts in part.experts().items():
            value = expert_similarity(
                experts.gate_up, experts.down, num_experts=division.spec.moe.num_experts, mesh=mesh
            )
            if mesh.coordinate.dp == 0 and mesh.coordinate.tp == 0:
                message[index[layer]] = value
    return sum_forward(message, mesh.world).tolist()
