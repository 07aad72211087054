"""The loss of a step and its gradient, accumulated over micro-batches.

    L = L_ce + sum_l alpha_l L_aux_l + zeta sum_l L_z_l                     Eq. 5, and the router z-loss as an option

Cross-entropy is a sum over targets divided by the targets of the whole step. The balance loss is no sum over
tokens: its gradient on any token depends on means over all of them. With statistics of the global batch (the
default) and several micro-batches, those means must be known before the first backward pass, so a *statistics pass*
runs every micro-batch forward once without gradient and adds up the `GateTotals`. It costs one more forward per
step; `balance.scope: micro`, or one micro-batch per step, does without. So the gradient does not depend on how the
step is cut into micro-batches.

What is counted (tokens per expert, hence drop rate and alpha) comes from the routings that the gradient pass
returns, once per token: neither the statistics pass nor recomputed layers reach it.

Under data parallelism every figure in `StepSums` and the totals are sums to be added over ranks; nothing is divided
before. Shapes: L MoE layers, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from skymoe.model.batch import BatchInfo
from skymoe.model.moe import MoE
from skymoe.model.transformer import HiddenOutput, Transformer
from skymoe.ops.balance import AuxLoss, GateTotals, aux_loss, capacity, gate_totals, loss_value, z_loss
from skymoe.ops.loss import linear_cross_entropy
from skymoe.ops.routing import Routing
from skymoe.spec.model import MoESpec
from skymoe.train.batches import MicroBatch, StepBatch


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised, and in which number format.

    Attributes:
        aux: form of the balance loss; NONE in a dense model.
        global_statistics: balance over the whole step rather than each micro-batch.
        z_coefficient: zeta.
        real_capacity: CF when experts drop above capacity, None when they never do.
        compute: dtype of the matmuls; None means that of the weights.
        recompute: layers whose activations are recomputed.
    """

    aux: AuxLoss = AuxLoss.NONE
    global_statistics: bool = True
    z_coefficient: float = 0.0
    real_capacity: float | None = None
    compute: torch.dtype | None = None
    recompute: Collection[int] = ()


@dataclass
class StepSums:
    """What a step saw, summed over its micro-batches and divided by nothing.

    Attributes:
        loss: cross-entropy in nats over all targets, a scalar tensor.
        z: router z-loss times its coefficient, already a mean over the step's tokens.
        totals_L: gate totals of each MoE layer.
        routings: of the last micro-batch, for the gate's figures on log steps.
        last: the last micro-batch.
    """

    loss: Tensor
    z: Tensor
    totals_L: list[GateTotals]
    routings: tuple[Routing, ...]
    last: MicroBatch


def accumulate_gradients(
    model: Transformer, batch: StepBatch, objective: Objective, alpha_L: Sequence[float]
) -> StepSums:
    """Add the gradient of the step's loss to `.grad` of every parameter."""
    global_L = _statistics_pass(model, batch, objective) if _needs_statistics(batch, objective) else None
    loss = torch.zeros((), dtype=torch.float64, device=batch.micros[0].tokens_BT.device)
    z = torch.zeros_like(loss)
    sums: list[GateTotals] = []
    for micro in batch.micros:
        with autocast(objective.compute, micro.tokens_BT.device):
            out = forward(model, micro, objective)
            loss_sum, _ = linear_cross_entropy(out.hidden_BTD, model.head_weight, micro.targets_BT)
        totals_L = [gate_totals(routing, micro.valid_T) for routing in out.routings]
        aux = _aux_term(micro, batch, objective, alpha_L, out.routings, totals_L, global_L)
        z_term = _z_term(micro, batch, objective, out.routings)
        (loss_sum / max(1, batch.num_targets) + aux + z_term).backward()
        loss += loss_sum.detach()
        z += z_term.detach() if isinstance(z_term, Tensor) else z_term
        sums = [a.plus(b) for a, b in zip(sums, totals_L, strict=True)] if sums else totals_L
    return StepSums(loss=loss, z=z, totals_L=sums, routings=out.routings, last=micro)


def moe_modules(model: Transformer) -> list[MoE]:
    """The MoE of each MoE layer, in layer order."""
    return [module for module in model.layers.modules() if isinstance(module, MoE)]


def forward(model: Transformer, micro: MicroBatch, objective: Objective) -> HiddenOutput:
    """One micro-batch up to the final norm."""
    info = batch_info(micro, model.spec.moe, objective)
    return model.hidden(micro.tokens_BT, info, recompute=objective.recompute)


def batch_info(micro: MicroBatch, moe: MoESpec | None, objective: Objective) -> BatchInfo:
    """What the model is told of a micro-batch: with the capacity that its valid tokens allow, when capacity is real."""
    if moe is None or objective.real_capacity is None:
        return micro.info
    limit = capacity(
        micro.num_tokens, num_experts=moe.num_experts, top_k=moe.top_k, capacity_factor=objective.real_capacity
    )
    return micro.info._replace(capacity=limit)


def autocast(compute: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Matmuls in `compute`; nothing when it is None."""
    return torch.autocast(device.type, dtype=compute or torch.bfloat16, enabled=compute is not None)


def balance_value(objective: Objective, alpha_L: Sequence[float], totals_L: Sequence[GateTotals], top_k: int) -> float:
    """sum_l alpha_l L_aux_l over the whole step: the figure to log."""
    pairs = zip(alpha_L, totals_L, strict=True)
    return sum(alpha * float(loss_value(objective.aux, totals, top_k=top_k)) for alpha, totals in pairs)


def _needs_statistics(batch: StepBatch, objective: Objective) -> bool:
    return len(batch.micros) > 1 and objective.global_statistics and objective.aux is not AuxLoss.NONE


@torch.no_grad()
def _statistics_pass(model: Transformer, batch: StepBatch, objective: Objective) -> list[GateTotals]:
    sums: list[GateTotals] = []
    for micro in batch.micros:
        with autocast(objective.compute, micro.tokens_BT.device):
            routings = forward(model, micro, objective).routings
        totals_L = [gate_totals(routing, micro.valid_T) for routing in routings]
        sums = [a.plus(b) for a, b in zip(sums, totals_L, strict=True)] if sums else totals_L
    return sums


def _aux_term(
    micro: MicroBatch,
    batch: StepBatch,
    objective: Objective,
    alpha_L: Sequence[float],
    routings: Sequence[Routing],
    own_L: Sequence[GateTotals],
    global_L: Sequence[GateTotals] | None,
) -> Tensor | float:
    """This micro-batch's part of sum_l alpha_l L_aux_l. A micro-batch's own loss counts by its share of the tokens."""
    if objective.aux is AuxLoss.NONE or not micro.num_tokens:
        return 0.0
    totals_L = own_L if global_L is None else global_L
    share = 1.0 if global_L is not None else micro.num_tokens / batch.num_tokens
    terms = zip(alpha_L, routings, totals_L, strict=True)
    return sum(
        alpha * share * aux_loss(objective.aux, routing, totals, micro.valid_T)
        for alpha, routing, totals in terms
        if alpha
    )


def _z_term(micro: MicroBatch, batch: StepBatch, objective: Objective, routings: Sequence[Routing]) -> Tensor | float:
    if not objective.z_coefficient:
        return 0.0
    return sum(objective.z_coefficient * z_loss(routing, batch.num_tokens, micro.valid_T) for routing in routings)
