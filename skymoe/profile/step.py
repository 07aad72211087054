"""What a training step of the runtime holds on a rank, counted while it runs: parts, pipeline and ZeRO as in training.

Left out beside a run of `skymoe train`: balance losses (a few numbers per token and expert) and their statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skymoe.model.batch import BatchInfo
from skymoe.ops.deferred import DeferredWeights
from skymoe.parallel.adamw import AdamWSettings, GroupSettings
from skymoe.parallel.deferred import defer_weights
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.options import PartOptions
from skymoe.parallel.part import Part
from skymoe.parallel.pipeline import Pipeline
from skymoe.parallel.spread import build_parts, initialize_parts
from skymoe.parallel.zero import ZeroOptimizer
from skymoe.profile.live import LiveBytes
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.model import ModelSpec
from skymoe.weights.slices import Slice

Micro = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepBytes:
    """Of one rank.

    Attributes:
        weights, gradients, optimizer: the optimizer's buffers, padding included (a master copy is the optimizer's).
        passes: the most that tensors of the passes took beside these.
    """

    weights: int
    gradients: int
    optimizer: int
    passes: int

    @property
    def total(self) -> int:
        """At the worst moment of the passes."""
        return self.weights + self.gradients + self.optimizer + self.passes


class Trainer:
    """A rank that trains a model of random weights on random tokens.

    Args:
        spec: the model.
        mesh: of this rank.
        sequence_length, micro_batch, num_micro: the batch of a replica.
        precision: of matrix products; weights are fp32.
        seed: of weights and tokens.
    """

    def __init__(
        self, spec: ModelSpec, mesh: Mesh, *, sequence_length: int, micro_batch: int, num_micro: int,
        precision: torch.dtype = torch.float32, seed: int = 0,
    ) -> None:  # fmt: skip
        self._device, self._precision = mesh.device, precision
        self._targets = num_micro * micro_batch * sequence_length
        options = PartOptions(num_tokens=micro_batch * sequence_length)
        self.parts = build_parts(spec, mesh, options, dtype=torch.float32)
        initialize_parts(self.parts, seed)
        tied = ("embed.weight",) if spec.tie_embeddings else ()
        self.optimizer = ZeroOptimizer(
            {stage: _owned(part) for stage, part in self.parts.items()}, mesh, AdamWSettings(),
            lambda name, parameter: GroupSettings(), tied=tied,
        )  # fmt: skip
        apart = mesh.layout.schedule is ScheduleKind.ZERO_BUBBLE
        deferred = {n: defer_weights(part, DeferredWeights()) for n, part in self.parts.items()} if apart else None
        self.pipeline: Pipeline[Micro] = Pipeline(
            tuple(self.parts), mesh, num_micro=num_micro, rows=next(iter(self.parts.values())).tokens.num_rows,
            hidden_size=spec.hidden_size, dtype=torch.float32, before_stage=self.optimizer.ready,
            after_stage=self.optimizer.reduce, deferred=deferred,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed + mesh.coordinate.dp)
        shape = num_micro, 2, micro_batch, sequence_length
        drawn = torch.randint(0, spec.vocab_size, shape, generator=generator).to(self._device)
        self._micros: list[Micro] = [(tokens_BT, targets_BT) for tokens_BT, targets_BT in drawn]

    def passes(self) -> None:
        """Forward and backward of a step; gradients are reduced."""
        self.pipeline.train(self._micros, self._forward, self._loss)

    def update(self) -> None:
        """The end of the step."""
        self.optimizer.update(1e-4, float(self.optimizer.gradient_norm()))
        self.optimizer.settle()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision is torch.bfloat16)

    def _forward(self, stage: int, x_ND: Tensor | None, micro: Micro) -> Tensor:
        with self._autocast():
            return self.parts[stage](x_ND, micro[0], BatchInfo())

    def _loss(self, x_ND: Tensor, micro: Micro) -> Tensor:
        with self._autocast():
            return self.parts[max(self.parts)].loss(x_ND, micro[1]) / self._targets


def step_bytes(trainer: Trainer) -> StepBytes:
    """Of the second step; the first one makes what stays. A collective act of the world."""
    trainer.passes()
    trainer.update()
    with LiveBytes() as live:
        trainer.passes()
        passes = live.peak
    trainer.update()
    held = trainer.optimizer.allocated()
    return StepBytes(held.weights, held.gradients, held.optimizer + held.master, passes)


def _owned(part: Part) -> Mapping[str, tuple[nn.Parameter, Slice]]:
    return {name: (parameter, part.slices[name]) for name, parameter in part.named_parameters()}
