"""FLOPs of a shape, half layer by half layer, per token: what `spec/flops.py` counts, for models of any kind.

The conventions are those of `spec/flops.py`, and a test holds the two together for every model that both know: a
multiply-add is 2, matrix products only, backward twice the forward, and the query-key pairs that a causal model needs
or all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from skymoe.plan.shape import AttentionShape, FfnShape, ModelShape
from skymoe.spec.flops import AttentionCount, mean_keys


@dataclass(frozen=True, kw_only=True)
class ShapeFlops:
    """Forward FLOPs of one token, averaged over a sequence.

    Attributes:
        halves: 2 L, attention and feed-forward of each layer in turn.
        head: of the head.
    """

    halves: tuple[float, ...]
    head: float

    @property
    def total(self) -> float:
        """Of the model."""
        return sum(self.halves) + self.head


def flops(shape: ModelShape, sequence_length: int, *, causal: bool) -> ShapeFlops:
    """FLOPs per token of a forward pass over sequences of `sequence_length` tokens."""
    hidden = shape.hidden_size
    halves: list[float] = []
    for layer in shape.layers:
        core = _core(layer.attention, sequence_length, causal)
        halves += [2.0 * layer.attention.parameters(hidden) + core, ffn_flops(layer.ffn, hidden)]
    return ShapeFlops(halves=tuple(halves), head=2.0 * hidden * shape.vocab_size)


def core_flops(shape: ModelShape, layer: int, sequence_length: int, *, causal: bool = True) -> float:
    """Of the two attention products of one layer, forward, per token."""
    return _core(shape.layers[layer].attention, sequence_length, causal)


def ffn_flops(ffn: FfnShape, hidden_size: int) -> float:
    """Of a feed-forward, router and shared experts included, forward, per token."""
    routed = ffn.top_k * ffn.matrices * hidden_size * ffn.inner
    return 2.0 * (routed + ffn.other_parameters(hidden_size))


def _core(attention: AttentionShape, sequence_length: int, causal: bool) -> float:
    keys = keys_seen(sequence_length, attention.window, causal)
    return 2.0 * attention.num_heads * (attention.head_dim + attention.value_dim) * keys


@lru_cache(maxsize=256)
def keys_seen(sequence_length: int, window: int | None, causal: bool = True) -> float:
    """Keys that a query multiplies with, on average."""
    return mean_keys(sequence_length, window, AttentionCount.CAUSAL if causal else AttentionCount.FULL)
