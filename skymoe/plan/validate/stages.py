"""Which layers the stages of a published run had: as its table says, as its program places them, or assumed even."""

from __future__ import annotations

import math
from collections.abc import Sequence

from skymoe.plan.cost.model import flops
from skymoe.plan.shape import ModelShape
from skymoe.plan.validate.cases import NotJudgedError
from skymoe.plan.validate.layouts import CaseLayout, Placement
from skymoe.spec.split import Split


def case_stages(shape: ModelShape, layout: CaseLayout, sequence_length: int, predicts_two: bool = False) -> Split:
    """Halves per stage; with multi-token prediction the last stage counts two heads and one more layer.

    Raises:
        NotJudgedError: more stages than layers can fill.
    """
    num_stages, layers = layout.division.pp * layout.chunks, shape.num_layers
    if num_stages > layers + 2:
        raise NotJudgedError(f"{num_stages} stages for {layers} layers")
    if layout.placement is Placement.WRITTEN:
        if sum(layout.written) != layers:
            raise NotJudgedError("the layer split does not have the model's layers")
        return Split(layout.written).scaled(2)
    if layout.placement is Placement.REDISTRIBUTED and num_stages > 1:
        return redistributed(shape, num_stages, sequence_length).scaled(2)
    if layers % num_stages == 0 and layout.placement is not Placement.ENDS_FEWER:
        return Split.even(layers, num_stages).scaled(2)
    if num_stages > 1 and (layers + 2) % num_stages == 0:  # Megatron: embedding and loss each count as a layer
        each = (layers + 2) // num_stages
        return Split((each - 1, *(each,) * (num_stages - 2), each - 1)).scaled(2)
    return balanced(shape, num_stages, sequence_length, predicts_two).scaled(2)


def redistributed(shape: ModelShape, num_stages: int, sequence_length: int) -> Split:
    """Equal layers as Yeung et al. 2025 (Vocabulary Parallelism) redistributed them, by FLOPs.

    Their program (get_num_layers_to_build) takes the layers of the last stage as an argument and divides the others
    evenly, the remainder to the stages before the last. The argument is published for eight settings (artifact/
    exp_one_host.csv): each time the number with which the last stage, head included, is nearest to the longest other.
    "The fewest with which it is no shorter than the mean" gives these eight numbers too and differs for the GPT of 10B
    with 128,000 entries, whose number is not published: one layer on the last stage, and two by this rule. The measured
    speed with 2048 tokens is that of two, with 4096 tokens it lies between both. So the choice of the rule rests on
    measured rows.
    """
    count = flops(shape, sequence_length, causal=False)
    layer, layers = count.halves[0] + count.halves[1], shape.num_layers
    head = count.head / layer

    def uneven(last: int) -> float:
        return abs(last + head - math.ceil((layers - last) / (num_stages - 1)))

    last = min(range(layers + 1), key=uneven)
    each, rest = divmod(layers - last, num_stages - 1)
    return Split((*(each + (stage >= num_stages - 1 - rest) for stage in range(num_stages - 1)), last))


def balanced(shape: ModelShape, num_stages: int, sequence_length: int, predicts_two: bool = False) -> Split:
    """Whole layers so that the longest stage is shortest by FLOPs, the head counted.

    Of the splits with that longest stage it takes the one that fills stages from the first to the last.
    """
    count = flops(shape, sequence_length, causal=False)
    costs = [count.halves[2 * layer] + count.halves[2 * layer + 1] for layer in range(shape.num_layers)]
    head = 2 * count.head + costs[-1] if predicts_two else count.head
    candidates = sorted({value for start in range(len(costs)) for value in _sums(costs, start, head)})
    low, high = 0, len(candidates) - 1
    while low < high:  # the smallest longest stage with which everything finds a place
        middle = (low + high) // 2
        low, high = (low, middle) if _filled(costs, head, candidates[middle], num_stages) else (middle + 1, high)
    sizes = _filled(costs, head, candidates[low], num_stages)
    if sizes is None:
        raise NotJudgedError(f"{num_stages} stages for {shape.num_layers} layers")
    return Split(tuple(sizes))


def _sums(costs: Sequence[float], start: int, head: float) -> list[float]:
    """Of the layers from `start` on, one more each time; to the end also with the head."""
    total, sums = 0.0, [head]
    for cost in costs[start:]:
        total += cost
        sums.append(total)
    return [*sums, total + head]


def _filled(costs: Sequence[float], head: float, longest: float, num_stages: int) -> list[int] | None:
    """Layers per stage when every stage takes at most `longest`, as even as that allows; None when it does not go."""
    room = longest * (1 + 1e-9)
    sizes, layer = [0] * num_stages, len(costs)
    used = head
    for stage in reversed(range(num_stages)):
        share = -(-layer // (stage + 1))  # what is left, evenly over the stages that are left
        while layer and sizes[stage] < share and used + costs[layer - 1] <= room:
            layer -= 1
            used += costs[layer]
            sizes[stage] += 1
        used = 0.0
    return None if layer or head > room else sizes
