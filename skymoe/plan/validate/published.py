"""Prices and sizes with what a published run does and `estimate` does not know.

A head divided over all stages (Vocabulary Parallelism), a second head and one more layer at the end (multi-token
prediction), streams around experts that a release had not fused yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skymoe.plan.cost.bill import Frame
from skymoe.plan.cost.ffn import expert_rows
from skymoe.plan.cost.model import prices
from skymoe.plan.cost.prices import Price, Prices
from skymoe.plan.memory.model import sizes
from skymoe.plan.memory.sizes import Size, Sizes
from skymoe.plan.validate.layouts import CaseLayout, Placement
from skymoe.plan.validate.models import CaseModel
from skymoe.plan.work import Work

VOCABULARY_PASSES = 1.08
"""What passes of divided vocabulary layers add to every stage: all ranks meet twice per micro-batch. Chosen on the
uniform and the vocabulary-parallel runs of vocab_parallelism; it is not in the FLOPs."""


def published_prices(work: Work, model: CaseModel, layout: CaseLayout) -> Prices:
    """Prices of `work` with what its source did to the ends of the model (see above)."""
    listed = prices(work)
    if layout.unfused_passes:
        listed = _unfused(work, listed, layout.unfused_passes)
    if model.predicts_two:
        listed = replace(listed, head=_sum((listed.head, listed.head, *listed.halves[-2:])))
    if layout.placement is not Placement.VOCABULARY:
        return listed
    ends = _sum((listed.embedding, listed.head))
    part = _scaled(ends, 1.0 / len(listed.halves))
    free = Price(forward_s=0.0, backward_s=0.0)
    halves = tuple(_scaled(_sum((half, part)), VOCABULARY_PASSES) for half in listed.halves)
    return replace(listed, halves=halves, embedding=free, head=free)


def _unfused(work: Work, listed: Prices, passes: float) -> Prices:
    """Streams between the experts' matrices that the law of a fused activation lacks; a waiting host hides them."""
    kernels = Frame(work).kernels
    halves = list(listed.halves)
    for number, layer in enumerate(work.shape.layers):
        if not layer.ffn.is_moe:
            continue
        half = halves[2 * number + 1]
        numbers = expert_rows(Frame(work), layer.ffn) * layer.ffn.inner / work.division.etp
        more = max(0.0, kernels.memory(passes * numbers * kernels.element) - half.parts.get("host", 0.0))
        halves[2 * number + 1] = replace(
            half, forward_s=half.forward_s + more / 3, backward_s=half.backward_s + 2 * more / 3,
            parts={**half.parts, "memory": half.parts.get("memory", 0.0) + more},
        )  # fmt: skip
    return replace(listed, halves=tuple(halves))


def _sum(parts: Sequence[Price]) -> Price:
    causes: dict[str, float] = {}
    for part in parts:
        for cause, seconds in part.parts.items():
            causes[cause] = causes.get(cause, 0.0) + seconds
    return Price(
        forward_s=sum(part.forward_s for part in parts), backward_s=sum(part.backward_s for part in parts),
        weight_s=sum(part.weight_s for part in parts), again_s=parts[0].again_s, parts=causes,
    )  # fmt: skip


def _scaled(price: Price, share: float) -> Price:
    return Price(
        forward_s=share * price.forward_s, backward_s=share * price.backward_s, weight_s=share * price.weight_s,
        again_s=share * price.again_s, parts={cause: share * seconds for cause, seconds in price.parts.items()},
    )  # fmt: skip


def published_sizes(work: Work, layout: CaseLayout) -> Sizes:
    """Where embedding and head are divided over all stages, so are their bytes."""
    listed = sizes(work)
    if not layout.fused_loss:
        listed = replace(listed, head=replace(listed.head, transient=2 * listed.head.transient))
    if layout.placement is not Placement.VOCABULARY:
        return listed
    ends, share = (listed.embedding, listed.head), 1.0 / len(listed.halves)
    static = [
        share * sum(getter) for getter in zip(*((e.weights, e.gradients, e.optimizer) for e in ends), strict=True)
    ]
    transient = share * sum(end.transient for end in ends) * len(listed.halves) / work.division.pp

    def with_part(half: Size) -> Size:
        return replace(
            half, weights=half.weights + static[0], gradients=half.gradients + static[1],
            optimizer=half.optimizer + static[2], transient=max(half.transient, transient),
        )  # fmt: skip

    nothing = Size(weights=0.0, gradients=0.0, optimizer=0.0, activation=0.0, checkpoint=0.0)
    return replace(listed, halves=tuple(map(with_part, listed.halves)), embedding=nothing, head=nothing)
