"""One step on many ranks: its passes over the micro-batches, and what they count.

A step here is the step of `train/objective.py`: the same sums, the same divisors. What differs is where terms arise:

- the cross-entropy on the last stage, balance and z-losses on the stage of their layer, hung onto the hidden states
  (`parallel.attach`), for the loss at the end cannot see them;
- the means of the balance loss run over all replicas, and over all rows of a replica where routers see only their own:
  the totals are summed over these ranks before a gradient is formed from them;
- everything that is counted is summed over the world once per step, in one message, so that every rank moves alpha,
  judges the step and logs alike.

Shapes: L MoE layers of the model, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from skymoe.ops.balance import AuxLoss, GateTotals, RouterMetrics, aux_loss, gate_totals, router_metrics, z_loss
from skymoe.ops.routing import Routing
from skymoe.parallel.attach import attach
from skymoe.parallel.collectives import sum_forward
from skymoe.parallel.pipeline import Pipeline
from skymoe.train.batches import MicroBatch, StepBatch
from skymoe.train.division import Division
from skymoe.train.objective import Objective, StepSums, autocast, batch_info


@dataclass
class Pass:
    """One pass of a rank over its micro-batches, and what it counts on the way.

    Attributes:
        totals: gate totals of each MoE layer here (by its place among all), of this rank's tokens, over all micros.
        z: sum of the z-loss terms of this rank's tokens, with their coefficient.
        loss: cross-entropy in nats over this replica's targets; 0 where the last stage is not.
        gates: routing and mask of each layer's last micro-batch.
    """

    division: Division
    batch: StepBatch
    objective: Objective
    alpha_L: Sequence[float] = ()
    global_totals: Mapping[int, GateTotals] | None = None
    totals: dict[int, GateTotals] = field(default_factory=dict)
    z: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    gates: dict[int, tuple[Routing, Tensor | None]] = field(default_factory=dict)

    def forward(self, stage: int, x_ND: Tensor | None, micro: MicroBatch) -> Tensor:
        """One micro-batch through one stage."""
        part = self.division.parts[stage]
        info = batch_info(micro, part.spec.moe, self.objective)
        with autocast(self.objective.compute, micro.tokens_BT.device):
            return part(x_ND, micro.tokens_BT, info, on_routing=partial(self._on_routing, micro))

    def loss_of(self, hidden_ND: Tensor, micro: MicroBatch) -> Tensor:
        """The cross-entropy of one micro-batch as its part of the global mean; on the last stage."""
        with autocast(self.objective.compute, micro.tokens_BT.device):
            nats = self.division.last_part.loss(hidden_ND, micro.targets_BT)
        self.loss = self.loss + nats.detach().double()
        return nats / max(1, self.batch.num_targets)

    def _on_routing(self, micro: MicroBatch, layer: int, x_ND: Tensor, routing: Routing) -> Tensor:
        division = self.division
        index = division.moe_index[layer]
        valid_N = division.tokens_here(micro.valid_T)
        own = gate_totals(routing, valid_N)
        self.totals[index] = self.totals[index].plus(own) if index in self.totals else own
        if micro is self.batch.micros[-1]:
            self.gates[index] = (routing, valid_N)
        if not torch.is_grad_enabled():
            return x_ND
        term = self._balance(micro, index, routing, own, valid_N) + self._z(routing, valid_N)
        return attach(x_ND, term) if isinstance(term, Tensor) else x_ND

    def _balance(
        self, micro: MicroBatch, index: int, routing: Routing, own: GateTotals, valid_N: Tensor | None
    ) -> Tensor | float:
        objective, division = self.objective, self.division
        if objective.aux is AuxLoss.NONE or not self.batch.num_tokens:
            return 0.0
        share = 1.0
        if self.global_totals is not None:
            totals = self.global_totals[index]
        elif objective.global_statistics:  # one micro-batch: what the replicas have now is the whole batch
            totals = division.sum_totals({0: own}, division.everybody)[0]
        else:
            totals = division.sum_totals({0: own}, division.replica)[0]
            share = micro.num_tokens / self.batch.num_tokens
        alpha = self.alpha_L[index]
        # Every rank takes part in the sum above, whatever its alpha; the same alpha stands on all of them.
        return alpha * share * aux_loss(objective.aux, routing, totals, valid_N) if alpha else 0.0

    def _z(self, routing: Routing, valid_N: Tensor | None) -> Tensor | float:
        if not self.objective.z_coefficient:
            return 0.0
        term = self.objective.z_coefficient * z_loss(routing, max(1, self.batch.num_tokens), valid_N)
        self.z = self.z + term.detach().double()
        return term


def gradients(
    division: Division,
    pipeline: Pipeline[MicroBatch],
    batch: StepBatch,
    objective: Objective,
    alpha_L: Sequence[float],
    ready: Callable[[int], None],
) -> tuple[StepSums, Pass]:
    """Add the gradient of the step's loss to the parameters here; returns the global sums, and this rank's pass.

    `ready` waits for the weights of a stage that still travel. Whichever pass comes first must ask: the statistics
    pass does so here, the training pass through `Pipeline.before_stage`.
    """
    global_totals = None
    if objective.aux is not AuxLoss.NONE and objective.global_statistics and len(batch.micros) > 1:
        first = Pass(division, batch, objective)

        def forward(stage: int, x_ND: Tensor | None, micro: MicroBatch) -> Tensor:
            ready(stage)
            return first.forward(stage, x_ND, micro)

        pipeline.clock.tell("statistics pass", True)
        pipeline.evaluate(batch.micros, forward, _no_loss)
        global_totals = division.sum_totals(dict(sorted(first.totals.items())), division.everybody)
    learned = Pass(division, batch, objective, alpha_L, global_totals)
    pipeline.train(batch.micros, learned.forward, learned.loss_of)
    loss, z, totals_L = division.sum_over_world(learned.loss, learned.z, learned.totals)
    sums = StepSums(loss=loss, z=z, totals_L=totals_L, routings=(), last=batch.micros[-1])
    return sums, learned


def gate_figures(division: Division, done: Pass) -> list[RouterMetrics]:
    """Every layer's gate in the last micro-batch of all replicas: means over their tokens."""
    count, width = len(division.moe_index), len(RouterMetrics._fields)
    if not count:
        return []
    message = torch.zeros(count, width + 1, dtype=torch.float64, device=division.mesh.device)
    if division.counts_here:
        for index, (routing, valid_N) in done.gates.items():
            tokens = routing.probs_TE.shape[0] if valid_N is None else int(valid_N.sum())
            message[index, :-1] = torch.tensor(router_metrics(routing, valid_N), dtype=torch.float64) * tokens
            message[index, -1] = tokens
    summed = sum_forward(message, division.mesh.world)
    means = (summed[:, :-1] / summed[:, -1:].clamp_min(1)).tolist()
    names: Sequence[str] = RouterMetrics._fields
    return [_metrics(dict(zip(names, row, strict=True))) for row in means]


def _metrics(figures: Mapping[str, float]) -> RouterMetrics:
    return RouterMetrics(
        max1_max2=figures["max1_max2"],
        max2_max3=figures["max2_max3"],
        load_cov=figures["load_cov"],
        dead_experts=round(figures["dead_experts"]),
        gate_entropy=figures["gate_entropy"],
    )


def _no_loss(hidden_ND: Tensor, micro: MicroBatch) -> Tensor:
    return hidden_ND.new_zeros(())
