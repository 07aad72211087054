"""One optimizer step: forward and backward -> guard -> clip -> update -> balance.

The guard speaks before any weight is touched; a step it does not accept leaves no trace but its count. The balance
comes last: alpha (Eq. 7-9) and the loss-free bias follow what the gate did in this step and act on the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skymoe.ops.balance import drop_rate, real_drop_rate, update_expert_bias
from skymoe.train.batches import StepBatch
from skymoe.train.config import BalanceConfig
from skymoe.train.guard import Action, Verdict
from skymoe.train.objective import Objective, StepSums
from skymoe.train.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """What happened.

    Attributes:
        verdict: whether the update was made.
        loss: cross-entropy summed over the targets, nats.
        grad_norm: before clipping.
        drop_rate_L: d of each MoE layer.
        alpha_L: the coefficients this step used.
        sums: for the metrics of log steps.
    """

    verdict: Verdict
    loss: float
    grad_norm: float
    drop_rate_L: list[float]
    alpha_L: list[float]
    sums: StepSums


def train_step(
    state: TrainState, batch: StepBatch, *, lr: float, objective: Objective, balance: BalanceConfig
) -> StepResult:
    """Train on one global batch at the rate `lr`."""
    alpha_L = list(state.alpha.alpha_L)
    sums = state.engine.gradients(batch, objective, alpha_L)
    optimizer = state.engine.optimizer
    loss, grad_norm = float(sums.loss), float(optimizer.gradient_norm())
    verdict = state.guard.judge(loss / max(1, batch.num_targets), grad_norm)
    drop_rate_L: list[float] = []
    if verdict.action is Action.ACCEPT:
        optimizer.update(lr, grad_norm)
        drop_rate_L = rebalance(state, sums, batch.num_tokens, balance)
    else:
        optimizer.drop_gradients()
    return StepResult(verdict, loss, grad_norm, drop_rate_L, alpha_L, sums)


def rebalance(state: TrainState, sums: StepSums, num_tokens: int, balance: BalanceConfig) -> list[float]:
    """Measure each layer's drop rate over the whole step, move alpha and the experts' biases; returns d per layer."""
    moe = state.engine.spec.moe
    if moe is None or not sums.totals_L:
        return []
    counts_LE = torch.stack([totals.counts_E for totals in sums.totals_L])
    if balance.capacity == "real":
        drop_rate_L = [real_drop_rate(totals, top_k=moe.top_k) for totals in sums.totals_L]
    else:
        drop_rate_L = [
            drop_rate(counts_E, num_tokens=num_tokens, top_k=moe.top_k, capacity_factor=balance.capacity_factor)
            for counts_E in counts_LE.cpu()  # one transfer for all layers
        ]
    state.alpha.update(drop_rate_L)
    for index, bias_E in state.engine.expert_biases().items():
        update_expert_bias(bias_E, counts_LE[index], balance.expert_bias_rate)
    return drop_rate_L
