"""The export as data: every target tensor is a tensor of the source under another name, or zero. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from skymoe.base.dtype import DType
from skymoe.convert.plan import ConversionPlan, Copy, Operation, Source, Step, Target, Zeros, plan_of
from skymoe.spec.model import ModelSpec
from skymoe.weights.names import Place, tensor_table


@dataclass(frozen=True)
class FoldedRouter(Operation):
    """A router without its normalization: `factor` times (the weights minus the mean of their rows).

    The mean is what the normalization subtracts; `factor` stands for the deviation that it divides by (None in
    a dry run, which does not fit it).
    """

    source: Source
    factor: float | None

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)

    @property
    def working_bytes(self) -> int:
        return 2 * 4 * math.prod(self.source.shape)  # fp32

    def __str__(self) -> str:
        return "minus the mean of its rows, times " + ("a fit" if self.factor is None else f"{self.factor:.4g}")


def plan_export(
    sources: Mapping[Place, Source],
    target: ModelSpec,
    *,
    dtype: DType | None,
    factors: Mapping[int, float | None] | None,
) -> ConversionPlan:
    """Plan the tensors of `target`.

    Args:
        sources: where the values of each place are (`Parent.sources`).
        target: the source in the terms of its new architecture (`convert.forms`).
        dtype: of every tensor; None keeps the source's, and takes that of the embedding for new zeros.
        factors: layer to temperature where gate normalization is folded. Folded routers are written in fp32: rounded,
            they would choose other experts now and then, and some tools (llama.cpp) keep them in fp32.
    """
    table = tensor_table(target)
    main = dtype or next(source.dtype for place, source in sources.items() if place.parameter == "embed.weight")
    steps = []
    for name, place in table.items():
        source = sources.get(place)
        layer = _router_layer(place)
        operation: Operation
        if source is None:
            operation, kept = Zeros(), main
        elif factors is not None and layer is not None:
            operation, kept = FoldedRouter(source, factors[layer]), DType.FLOAT32
        else:
            operation, kept = Copy(source), dtype or source.dtype
        if place.parameter.endswith(".expert_bias"):
            kept = DType.FLOAT32  # added to scores, never multiplied
        steps.append(Step(operation, (Target(name, kept, place.shape),)))
    return plan_of(steps, tuple(table))


def _router_layer(place: Place) -> int | None:
    return int(place.parameter.split(".")[1]) if place.parameter.endswith(".router.weight") else None
