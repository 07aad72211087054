"""Dispatch over ranks: tokens go to the experts of other ranks, and come back.

The contract is that of `model/dispatch.py` (dispatch gives rows and a receipt, combine takes the receipt; no state
between). `routing` is of this rank's tokens and names experts by their number in the whole layer; the rows received
are for this rank's experts only. What comes back is complete: for every token in mode R, for this rank's rows in G
and A. So are the gradients of tokens and of router weights: in mode R each tp rank gets those of all tokens, alike,
and a router's weight must not be summed over tp; in G and A each has those of its rows.

    mode         experts over     there                                      and back
    R  edp       tp               (every rank has all tokens)                all-reduce over tp
       ep, etp   dp x tp; dp      all-gather over dp                         reduce-scatter over dp, all-reduce: tp
    G            tp; dp x tp      all-gather over the same ranks             reduce-scatter
    A  edp, ep   tp; dp x tp      all-to-all                                 all-to-all
       etp       dp               all-to-all over dp, all-gather over tp     reduce-scatter over tp, all-to-all: dp

Under etp a rank has a part of each expert's inner width, so that its outputs are partial sums over tp.

Replicas must have equally many tokens in a micro-batch (their shapes are static); the ranks of one need not. A token
whose choices share a rank is sent there once per choice: one row per rank and token would save a tenth at top-2 over
four ranks (research: 1.80 distinct ranks), and is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skymoe.ops.routing import Routing
from skymoe.parallel.dispatch_assignments import AllToAllDispatcher
from skymoe.parallel.dispatch_tokens import GatheredDispatcher, ReplicatedDispatcher
from skymoe.parallel.dispatcher import ReceiptT, ShardedDispatcher
from skymoe.parallel.local_rows import assignments
from skymoe.parallel.mesh import Group, Mesh
from skymoe.parallel.steps import Steps, interleave, run
from skymoe.parallel.traffic import Traffic
from skymoe.spec.layout import DispatchMode, ExpertAxis
from skymoe.spec.split import Split

Experts = Callable[[Tensor, Tensor], Tensor]


def build_dispatcher(
    mesh: Mesh,
    num_experts: int,
    num_tokens: int,
    *,
    overlap: bool = True,
    chunks: int = 1,
    traffic: Traffic | None = None,
) -> ShardedDispatcher[Any]:
    """The dispatcher that the mesh's layout asks for.

    Args:
        mesh: where this rank stands.
        num_experts: of the whole layer.
        num_tokens: of a replica in each micro-batch.
        overlap: let metadata and chunks travel beside other work. False: one thing after the other.
        chunks: parts of the tokens in `routed_experts`.
        traffic: counts what is sent.
    """
    layout, alone = mesh.layout, Group((mesh.rank,), 0, None)
    experts = layout.experts(num_experts)
    local = experts.part(layout.expert_rank(mesh.coordinate))
    is_edp, is_etp = layout.expert is ExpertAxis.EDP, layout.expert is ExpertAxis.ETP
    if layout.dispatch is DispatchMode.REPLICATED:
        replicas = alone if is_edp else mesh.dp
        rows = Split((num_tokens,) * replicas.size)
        return ReplicatedDispatcher(mesh.tp, replicas, local, rows, overlap=overlap, chunks=chunks, traffic=traffic)
    sizes = layout.tokens(num_tokens).sizes
    if layout.dispatch is DispatchMode.GATHERED:
        group = mesh.tp if is_edp else mesh.dp_tp
        rows = Split(sizes * (group.size // mesh.tp.size))
        return GatheredDispatcher(group, local, rows, overlap=overlap, chunks=chunks, traffic=traffic)
    own = (sizes[mesh.coordinate.tp],) * mesh.dp.size
    rows = Split({ExpertAxis.EDP: sizes, ExpertAxis.EP: sizes * mesh.dp.size, ExpertAxis.ETP: own}[layout.expert])
    cut = mesh.tp if is_etp else alone
    return AllToAllDispatcher(mesh.expert, cut, experts, rows, overlap=overlap, chunks=chunks, traffic=traffic)


def routed_experts(dispatcher: ShardedDispatcher[ReceiptT], experts: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
    """Dispatch, experts, combine, in as many parts of the tokens as the dispatcher says, one beside another.

    Args:
        dispatcher: from `build_dispatcher`.
        experts: (rows, offsets) -> outputs, for this rank's experts.
        x_TD: this rank's tokens (mode R: all of the replica).
        routing: of these tokens.

    Returns:
        (T, D), complete. The same values for any number of chunks, but for rounding.
    """
    if dispatcher.chunks == 1:
        return run(_journey(dispatcher, experts, x_TD, routing, dispatcher.rows))
    parts = [Split.remainder_first(size, dispatcher.chunks) for size in dispatcher.rows.sizes]
    journeys = []
    for chunk in range(dispatcher.chunks):
        own = parts[dispatcher.rank].part(chunk)
        tokens = slice(own.start, own.stop)
        rows = Split(tuple(part.sizes[chunk] for part in parts))
        journeys.append(_journey(dispatcher, experts, x_TD[tokens], _of_tokens(routing, tokens), rows))
    done = interleave(journeys) if dispatcher.overlap else [run(journey) for journey in journeys]
    return torch.cat(done)


def _journey(
    dispatcher: ShardedDispatcher[ReceiptT], experts: Experts, x_TD: Tensor, routing: Routing, rows: Split
) -> Steps[Tensor]:
    received, receipt = yield from dispatcher.dispatch_steps(x_TD, routing, rows)
    y_RD = experts(received.x_RD, received.offsets_E)
    out_TD = yield from dispatcher.combine_steps(y_RD, receipt)
    return out_TD


def _of_tokens(routing: Routing, tokens: slice) -> Routing:
    """The choices of some of the tokens."""
    ids_TK, weights_TK = routing.expert_ids_TK[tokens], routing.weights_TK[tokens]
    return assignments(ids_TK, weights_TK, routing.counts_E.numel(), is_full=routing.is_full)
