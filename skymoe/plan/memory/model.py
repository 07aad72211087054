"""The memory model: bytes of every part of a model on one rank (`sizes`), and the peak of every rank of a pipeline
(`rank_memory`). Sources and equations are with the parts: `static`, `activation`, `alive`, `reserve`. No torch here.
"""

from __future__ import annotations

from skymoe.plan.memory.activation import attention_bytes, element_bytes, ffn_bytes, layer_input
from skymoe.plan.memory.ranks import rank_memory
from skymoe.plan.memory.reserve import reserve_bytes
from skymoe.plan.memory.sizes import Size, Sizes
from skymoe.plan.memory.static import (
    Parameters,
    embedding_parameters,
    head_parameters,
    layer_parameters,
    static_bytes,
)
from skymoe.plan.shape import LayerShape
from skymoe.plan.work import Recompute, Work
from skymoe.spec.split import Split

__all__ = ["rank_memory", "sizes"]

LOGIT_BYTES = 2 + 4
"""Per logit: what the product gives, and the fp32 copy that the loss turns into the gradient in place."""


def sizes(work: Work) -> Sizes:
    """Bytes of every part on the fullest rank of a stage."""
    layers = {layer: _layer_sizes(work, layer) for layer in dict.fromkeys(work.shape.layers)}
    return Sizes(
        halves=tuple(half for layer in work.shape.layers for half in layers[layer]),
        embedding=_embedding(work),
        head=_head(work),
        reserve=reserve_bytes(work),
    )


def _layer_sizes(work: Work, layer: LayerShape) -> tuple[Size, Size]:
    parameters = layer_parameters(layer, work.shape.hidden_size, work.division)
    kept = attention_bytes(work, layer.attention), ffn_bytes(work, layer.ffn)
    checkpoint, gathered = layer_input(work), _gathered(work, parameters[0] + parameters[1])
    found = []
    for half, own in enumerate(parameters):
        static, bytes_ = static_bytes(own, work.division), kept[half]
        activation, transient = bytes_.kept, bytes_.again + bytes_.buffers
        if work.recompute is Recompute.FULL:
            activation = checkpoint if half == 0 else 0.0
            transient = kept[0].kept + kept[1].kept - checkpoint + max(one.buffers for one in kept)
        found.append(
            Size(
                weights=static.weights, gradients=static.gradients, optimizer=static.optimizer,
                activation=activation, checkpoint=checkpoint, transient=transient + gathered,
            )
        )  # fmt: skip
    return found[0], found[1]


def _gathered(work: Work, parameters: Parameters) -> float:
    """ZeRO-3: a layer and the next one whole, and the gradients of one before they are divided."""
    if work.division.zero_stage < 3:
        return 0.0
    return parameters.total * element_bytes(work) * (2 + 1)


def _embedding(work: Work) -> Size:
    parameters = embedding_parameters(work.shape, work.division.tp)
    static = static_bytes(parameters, work.division)
    mask = layer_input(work) / element_bytes(work) if work.shape.dropout else 0.0
    return Size(
        weights=static.weights, gradients=static.gradients, optimizer=static.optimizer, activation=mask,
        checkpoint=0.0, transient=_gathered(work, parameters),
    )  # fmt: skip


def _head(work: Work) -> Size:
    parameters = head_parameters(work.shape, work.division)
    static = static_bytes(parameters, work.division)
    rows = Split.remainder_first(work.shape.vocab_size, work.division.tp).sizes[0]
    logits = work.tokens * rows * (LOGIT_BYTES + element_bytes(work) - 2)
    return Size(
        weights=static.weights, gradients=static.gradients, optimizer=static.optimizer,
        activation=2 * layer_input(work), checkpoint=0.0, transient=logits + _gathered(work, parameters),
    )  # fmt: skip
