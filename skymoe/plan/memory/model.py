"""The memory model: bytes of every part of a model on one rank (`sizes`), and the peak of every rank of a pipeline
(`rank_memory`). Sources and equations are with the parts: `static`, `activation`, `alive`, `reserve`. No torch here.
"""

from __future__ import annotations

from skymoe.plan.memory.activation import attention_bytes, element_bytes, ffn_bytes, layer_input
from skymoe.plan.memory.own import own_sizes
from skymoe.plan.memory.ranks import rank_memory
from skymoe.plan.memory.reserve import reserve_bytes
from skymoe.plan.memory.runtime import MEGATRON, SKYMOE, Runtime
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


def sizes(work: Work, *, runtime: Runtime | None = None) -> Sizes:
    """Bytes of every part on the fullest rank of a stage, as `runtime` keeps them.

    None means MEGATRON, and on a CPU this package, whose own account is in `own`.
    """
    if runtime is None:
        runtime = SKYMOE if work.cluster.gpu.name.startswith("cpu") else MEGATRON
    if runtime.is_ours:
        return own_sizes(work)
    layers = {layer: _layer_sizes(work, layer, runtime) for layer in dict.fromkeys(work.shape.layers)}
    return Sizes(
        halves=tuple(half for layer in work.shape.layers for half in layers[layer]),
        embedding=_embedding(work),
        head=_head(work, runtime),
        reserve=reserve_bytes(work),
    )


def _layer_sizes(work: Work, layer: LayerShape, runtime: Runtime) -> tuple[Size, Size]:
    parameters = layer_parameters(layer, work.shape.hidden_size, work.division)
    kept = attention_bytes(work, layer.attention), ffn_bytes(work, layer.ffn, runtime)
    checkpoint, gathered = layer_input(work), _gathered(work, parameters[0] + parameters[1])
    whole = kept[0].kept + kept[1].kept
    found = []
    for half, own in enumerate(parameters):
        activation, transient = kept[half].kept, kept[half].again + kept[half].working
        if work.recompute is Recompute.FULL:
            activation = checkpoint if half == 0 else 0.0  # of both halves together
            transient = whole - checkpoint + max(one.working for one in kept)
        found.append(_size(work, own, activation=activation, checkpoint=checkpoint, transient=transient + gathered))
    return found[0], found[1]


def _embedding(work: Work) -> Size:
    """The gradient of the whole table is formed, then added to what there is of it."""
    parameters = embedding_parameters(work.shape, work.division.tp)
    gradient = parameters.total * element_bytes(work)
    return _size(work, parameters, transient=gradient + _gathered(work, parameters))


def _head(work: Work, runtime: Runtime) -> Size:
    """Logits and their gradient."""
    rows = Split.remainder_first(work.shape.vocab_size, work.division.tp).sizes[0]
    logits = work.tokens * rows * runtime.logit_bytes
    parameters = head_parameters(work.shape, work.division)
    return _size(work, parameters, activation=2 * layer_input(work), transient=logits + _gathered(work, parameters))


def _gathered(work: Work, parameters: Parameters) -> float:
    """ZeRO-3: a layer and the next one whole, and the gradients of one before they are divided. See `static_bytes`."""
    moves = work.division.zero_stage >= 3 and work.division.pp == 1
    return parameters.total * element_bytes(work) * 3 if moves else 0.0


def _size(
    work: Work, parameters: Parameters, *, activation: float = 0.0, transient: float, checkpoint: float = 0.0
) -> Size:
    static = static_bytes(parameters, work.division, element_bytes(work))
    return Size(
        weights=static.weights, gradients=static.gradients, optimizer=static.optimizer,
        activation=activation, checkpoint=checkpoint, transient=transient,
    )  # fmt: skip
