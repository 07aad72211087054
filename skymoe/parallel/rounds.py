"""Forward only, through all stages of a pipeline: for evaluation.

In rounds of one micro-batch per rank: stage by stage, every stage works through the round before the next one on the
same rank starts. With several stages per rank the pipeline is as full as it can be, and no more than a round of
boundary tensors is waiting anywhere. Any number of micro-batches goes.

All ranks post their transfers in the same order (round, then boundary), receives of a boundary before the work that
needs them, so that a transport that keeps to the order of posting cannot lock up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from skymoe.parallel.mesh import Mesh

M = TypeVar("M")


def forward_rounds(
    mesh: Mesh,
    micros: Sequence[M],
    forward: Callable[[int, Tensor | None, M], Tensor],
    loss: Callable[[Tensor, M], Tensor],
    boundary: Tensor,
) -> list[Tensor]:
    """The losses of all micro-batches where the last stage is; nothing on the other ranks.

    Args:
        mesh: the pipeline is its group `pp`.
        micros: any objects.
        forward: (stage, input or None, micro-batch) -> output.
        loss: of the last output.
        boundary: a meta tensor like those between stages.
    """
    losses: list[Tensor] = []
    stages, last = mesh.layout.stages_of(mesh.coordinate.pp), mesh.layout.num_stages - 1
    for start in range(0, len(micros), mesh.layout.pp):
        part = micros[start : start + mesh.layout.pp]
        sent: list[tuple[dist.Work, Tensor]] = []
        outputs: list[Tensor] = []
        for stage in stages:
            # The stage before is here (at the turn of a V, or all of them), or another rank sends its outputs.
            is_here = stage - 1 in stages
            received = [] if stage == 0 or is_here else [_receive(mesh, stage, boundary) for _ in part]
            inputs, outputs = outputs, []
            for number, micro in enumerate(part):
                y_ND = forward(stage, _input(stage, number, inputs, received), micro)
                if stage == last:
                    losses.append(loss(y_ND, micro))
                elif stage + 1 in stages:
                    outputs.append(y_ND)
                else:
                    sent.append(_send(mesh, stage, y_ND.contiguous()))
        for work, _ in sent:
            work.wait()
    return losses


def _input(stage: int, number: int, here: list[Tensor], received: list[tuple[dist.Work, Tensor]]) -> Tensor | None:
    if stage == 0:
        return None
    if not received:
        return here[number]
    work, x_ND = received[number]
    work.wait()
    return x_ND


def _receive(mesh: Mesh, stage: int, boundary: Tensor) -> tuple[dist.Work, Tensor]:
    x_ND = torch.empty(boundary.shape, dtype=boundary.dtype, device=mesh.device)
    source = mesh.pp.ranks[mesh.layout.stage_owner(stage - 1)]
    work = dist.irecv(x_ND, source, group=mesh.pp.handle)
    assert work is not None
    return work, x_ND


def _send(mesh: Mesh, stage: int, y_ND: Tensor) -> tuple[dist.Work, Tensor]:
    """The tensor is returned too: it must live until it has left."""
    work = dist.isend(y_ND, mesh.pp.ranks[mesh.layout.stage_owner(stage + 1)], group=mesh.pp.handle)
    assert work is not None
    return work, y_ND
