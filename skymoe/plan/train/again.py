"""FLOPs that a step computes twice, per token: the difference between MFU and HFU.

Conventions of `spec/utilisation.py`: a second run stops at the last tensor that the backward pass needs, so the
projection that ends a dense layer (or, in a stage that ends with an attention, the output projection) is not run
again; the experts' last one is, because the gradient of the gate needs what they put out. Base levels: `selective`
runs the attention core again where scores are not fused away, `moe_act` no matrix product, `full` every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from skymoe.plan.cost.flops import ShapeFlops, core_flops
from skymoe.plan.shape import ModelShape
from skymoe.plan.train.stages import again_halves
from skymoe.plan.work import Recompute, Work
from skymoe.spec.split import Split


def again_flops(work: Work, forward: ShapeFlops, stages: Split, recompute: Sequence[int]) -> float:
    """Forward FLOPs per token that are run a second time.

    Args:
        work: with its base level of recomputation.
        forward: of one forward pass, by half.
        stages: halves per stage.
        recompute: layers per stage that are run again whole.
    """
    if work.recompute is Recompute.FULL:
        again: tuple[tuple[int, ...], ...] = tuple(tuple(part) for part in stages)
    else:
        again = again_halves(stages, recompute)
    whole = sum(forward.halves[unit] - _last(work.shape, units, unit) for units in again for unit in units)
    if work.recompute is not Recompute.SELECTIVE or work.flash:
        return whole
    others = set(range(2 * work.shape.num_layers)) - {unit for units in again for unit in units}
    return whole + sum(core_flops(work.shape, unit // 2, work.sequence_length) for unit in others if unit % 2 == 0)


def _last(shape: ModelShape, units: Sequence[int], unit: int) -> float:
    """The projection at the end of what is run again as one, which the backward pass does not need."""
    layer = shape.layers[unit // 2]
    if unit % 2 == 0:
        ends = unit + 1 not in units
        return 2.0 * layer.attention.num_heads * layer.attention.value_dim * shape.hidden_size if ends else 0.0
    return 0.0 if layer.ffn.is_moe else 2.0 * layer.ffn.inner * shape.hidden_size
