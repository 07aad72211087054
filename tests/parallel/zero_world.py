"""A model's parameters without a model, divided by a layout, with gradients whose sums over ranks are known exactly.

Every contribution is a multiple of 1/64 below 1/8, so that all sums are exact in fp32 and in bf16, in any order.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from skymoe.parallel.adamw import AdamWSettings, GroupSettings
from skymoe.parallel.mesh import Mesh, build_mesh
from skymoe.parallel.zero import ZeroOptimizer
from skymoe.spec.layout import Coordinate, Layout, ScheduleKind
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm
from skymoe.spec.split import Split
from skymoe.weights.slices import Box, Slice, owned_slices

Stages = dict[int, dict[str, tuple[nn.Parameter, Slice]]]
SETTINGS = AdamWSettings(betas=(0.9, 0.95), eps=1e-8, clip=1.0)


def zero_spec(**changes: Any) -> ModelSpec:
    """Dense and MoE layers, biases on tp 0, per-head norms whose gradient is partial, widths that divide badly."""
    moe = MoESpec(num_experts=7, top_k=2, ffn_size=20, shared_ffn_size=12, gate_norm=GateNormSpec(), expert_bias=True)
    options: dict[str, Any] = {
        "architecture": Architecture.SKYMOE, "vocab_size": 37, "hidden_size": 20, "num_layers": 4, "ffn_size": 28,
        "num_heads": 6, "num_kv_heads": 3, "head_dim": 4, "o_bias": True, "qk_norm": QkNorm.HEAD, "moe": moe,
        "moe_layers": (1, 2), "tie_embeddings": True,
    }  # fmt: skip
    return ModelSpec(**{**options, **changes})


def zero_layout(pp: int, dp: int, tp: int, **changes: Any) -> Layout:
    per_rank = {ScheduleKind.ONE_F_ONE_B: 1, ScheduleKind.INTERLEAVED: 2, ScheduleKind.ZERO_BUBBLE: 2}
    stages = Split.remainder_first(8, pp * per_rank[changes.get("schedule", ScheduleKind.ONE_F_ONE_B)])
    return Layout(**{"pp": pp, "dp": dp, "tp": tp, "stages": stages, **changes})


def slices_of(spec: ModelSpec, layout: Layout, coordinate: Coordinate) -> dict[int, dict[str, Slice]]:
    return {stage: owned_slices(spec, layout, coordinate, stage) for stage in layout.stages_of(coordinate.pp)}


def tied_names(spec: ModelSpec) -> set[str]:
    return {"embed.weight"} if spec.tie_embeddings else set()


def drawn(shape: tuple[int, ...], *key: object) -> Tensor:
    """Whole multiples of 1/64 within 1/8, the same wherever the key is."""
    generator = torch.Generator().manual_seed(crc32(repr(key).encode()))
    return torch.randint(-7, 8, shape, generator=generator) / 64


def cut(whole: Tensor, item: Slice) -> Tensor:
    """The rank's part of a whole tensor."""
    local = torch.full(item.shape, float("nan"), dtype=whole.dtype)
    for piece in item.pieces:
        local[box_index(piece.local)] = whole[box_index(piece.whole)]
    return local


def box_index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def contribution(item: Slice, tied: bool, layout: Layout, coordinate: Coordinate, stage: int, step: int) -> Tensor:
    """What the passes of one rank through one stage add to a gradient, as a whole tensor."""
    dp = coordinate.dp if item.reduced else "all"
    tp = coordinate.tp if item.partial else "all"
    return drawn(item.whole_shape, item.name, stage if tied else "only", dp, tp, step)


def total(item: Slice, tied: bool, layout: Layout, step: int) -> Tensor:
    """The gradient that one process would have, as a whole tensor."""
    stages = sorted({0, layout.num_stages - 1}) if tied else [0]
    places = [
        Coordinate(0, dp, tp)
        for dp in range(layout.dp if item.reduced else 1)
        for tp in range(layout.tp if item.partial else 1)
    ]
    return sum(
        (contribution(item, tied, layout, place, stage, step) for stage in stages for place in places),
        torch.zeros(item.whole_shape),
    )


class World:
    """One rank: its parameters, and the optimizer over them."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        *,
        weights: torch.dtype = torch.float32,
        settings: AdamWSettings = SETTINGS,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.spec, self.layout, self.tied = spec, layout, tied_names(spec)
        self.mesh: Mesh = build_mesh(layout, torch.device("cpu"))
        self.stages: Stages = {}
        for stage, slices in slices_of(spec, layout, self.mesh.coordinate).items():
            self.stages[stage] = {}
            for name, item in slices.items():
                if item.is_buffer:
                    continue
                twin = self.stages.get(0, {}).get(name)
                values = cut(initial(item, seed), item).to(weights)
                self.stages[stage][name] = twin or (nn.Parameter(values), item)
        self.zero = ZeroOptimizer(self.stages, self.mesh, settings, group_of, tied=self.tied, **options)

    def items(self) -> dict[str, tuple[nn.Parameter, Slice]]:
        """Every parameter once."""
        return {name: found for stage in self.stages.values() for name, found in stage.items()}

    def backward(self, step: int, *, micros: int = 2, poison: float = 0.0) -> None:
        """Autograd adds this rank's contributions; stages end from the last to the first, as in a pipeline.

        `poison` is added to one element of the last parameter of each stage.
        """
        for stage in reversed(self.stages):
            self.zero.ready(stage)
            for _ in range(micros):
                loss = torch.zeros(())
                for name, (parameter, item) in self.stages[stage].items():
                    whole = contribution(item, name in self.tied, self.layout, self.mesh.coordinate, stage, step)
                    loss = loss + (parameter * cut(whole / micros, item).to(parameter.dtype)).sum().float()
                loss.backward()
            gradient = parameter.grad
            assert gradient is not None
            gradient.view(-1)[0] += poison
            self.zero.reduce(stage)

    def totals(self, step: int) -> dict[str, Tensor]:
        """This rank's part of the summed gradients."""
        return {n: cut(total(item, n in self.tied, self.layout, step), item) for n, (_, item) in self.items().items()}

    def whole_norm(self, step: int) -> Tensor:
        """Over the whole model, fp64."""
        every = {
            name: item
            for rank in range(self.layout.world_size)
            for slices in slices_of(self.spec, self.layout, self.layout.coordinate(rank)).values()
            for name, item in slices.items()
            if not item.is_buffer
        }
        found = [total(item, name in self.tied, self.layout, step).double() for name, item in every.items()]
        return torch.stack([values.square().sum() for values in found]).sum().sqrt()


def initial(item: Slice, seed: int = 0) -> Tensor:
    """Weights, as a whole tensor."""
    generator = torch.Generator().manual_seed(crc32(item.name.encode()) + seed)
    return torch.randn(item.whole_shape, generator=generator)


def group_of(name: str, parameter: nn.Parameter) -> GroupSettings:
    """Three groups, all different."""
    if name.endswith("router.weight"):
        return GroupSettings(weight_decay=0.0, lr_ratio=0.5)
    return GroupSettings(weight_decay=0.1 if parameter.ndim > 1 else 0.0)
