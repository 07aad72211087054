"""AdamW on parts of parameters: torch's fused kernel, moments and step of each part, a master copy of narrow weights.

An update is elementwise, so a rank needs the moments of no other element than those it updates. torch's own AdamW
holds state by parameter; here a parameter may lie on several ranks, and a rank has a *portion* of it. The step count
is kept per portion, as a parameter that is new in a resumed run begins at 0 while the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from skymoe.parallel.flat import Flat
from skymoe.parallel.shards import Bucket, Portion

_PART_CPU, _PART = 1 << 16, 1 << 24


@dataclass(frozen=True)
class AdamWSettings:
    """What all parameters share.

    Attributes:
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        clip: largest gradient norm over all parameters; 0 does not clip.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0


@dataclass(frozen=True)
class GroupSettings:
    """What differs between matrices, routers and vectors.

    Attributes:
        weight_decay: decoupled.
        lr_ratio: the learning rate of these parameters over that of the step.
    """

    weight_decay: float = 0.0
    lr_ratio: float = 1.0


class ShardState:
    """The optimizer of this rank's shards of one flat.

    Attributes:
        portions: what there is of which parameter.
        steps: updates so far, fp32 scalars, one per portion.
        exp_avg, exp_avg_sq: moments, flat.
        master: fp32 copy of weights that are narrower, flat; None where the weights are the master.
    """

    def __init__(self, flat: Flat, settings: AdamWSettings, groups: Sequence[GroupSettings]) -> None:
        self._flat, self._settings = flat, settings
        self.portions = flat.plan.portions()
        size, device = flat.plan.state_size, flat.weights.device
        is_narrow = flat.weights.dtype.itemsize < 4
        wide = torch.float32 if is_narrow else flat.weights.dtype
        self.steps = torch.zeros(len(self.portions), dtype=torch.float32, device=device)
        self.exp_avg = torch.zeros(size, dtype=wide, device=device)
        self.exp_avg_sq = torch.zeros(size, dtype=wide, device=device)
        self.master = torch.zeros(size, dtype=wide, device=device) if is_narrow else None
        self._calls = _calls(self.portions, groups)
        self._counted = flat.plan.counted()
        self.master_from_weights()

    def master_from_weights(self) -> None:
        """Fill the master copy, exactly."""
        if self.master is not None:
            for bucket in self._flat.plan.buckets:
                self.master[bucket.state] = self._flat.weights[bucket.own].to(self.master.dtype)

    def squares(self) -> Tensor:
        """Sum of squares, fp64, of the gradients that this rank counts."""
        gradients = self._flat.gradients
        total = torch.zeros((), dtype=torch.float64, device=gradients.device)
        for run in self._counted:
            total += _squares(gradients[run])
        return total

    def update(self, number: int, lr: float, scale: float | None) -> None:
        """Update this rank's shard of bucket `number`, its gradients first multiplied by `scale`."""
        bucket = self._flat.plan.buckets[number]
        weights = self._flat.weights[bucket.own] if self.master is None else self.master[bucket.state]
        gradients = self._flat.gradients[bucket.own].to(weights.dtype)
        if scale is not None:
            gradients.mul_(scale)
        for group, indices in self._calls.get(number, {}).items():
            self._adamw(group, indices, weights, gradients, bucket, lr)
        if self.master is not None:
            self._flat.weights[bucket.own] = weights.to(self._flat.weights.dtype)

    def _adamw(
        self, group: GroupSettings, indices: list[int], weights: Tensor, gradients: Tensor, bucket: Bucket, lr: float
    ) -> None:
        """One fused call."""
        ranges = [self.portions[index].state for index in indices]
        shifted = [slice(part.start - bucket.state.start, part.stop - bucket.state.start) for part in ranges]
        beta1, beta2 = self._settings.betas
        adamw(
            [weights[part] for part in shifted],
            [gradients[part] for part in shifted],
            [self.exp_avg[part] for part in ranges],
            [self.exp_avg_sq[part] for part in ranges],
            [],
            [self.steps[index] for index in indices],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr * group.lr_ratio,
            weight_decay=group.weight_decay,
            eps=self._settings.eps,
            maximize=False,
        )


def _calls(portions: Sequence[Portion], groups: Sequence[GroupSettings]) -> dict[int, dict[GroupSettings, list[int]]]:
    """Which portions go into one call, by bucket and group. `groups` is by parameter of the flat."""
    found: dict[int, dict[GroupSettings, list[int]]] = {}
    for number, portion in enumerate(portions):
        found.setdefault(portion.bucket, {}).setdefault(groups[portion.parameter], []).append(number)
    return found


def _squares(values: Tensor) -> Tensor:
    """Sum of squares, fp64, in parts whose fp64 copy stays in the cache of a CPU."""
    parts = values.split(_PART_CPU if values.device.type == "cpu" else _PART)
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts]).sum()
