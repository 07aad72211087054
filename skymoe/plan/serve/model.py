"""What serving has to know of a model: bytes of weights and of keys and values, per unit that can be given to a GPU.

Units are never cut: a query head with what belongs to it, a key/value head with its query heads (grouped-query
attention), a block of feed-forward columns (of every expert, or of a dense feed-forward), a whole expert, a row of the
vocabulary. Latent attention (DeepSeek-V2, 2.1) keeps one compressed vector for all heads: its cache and the matrices
that make it are on every GPU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.shape import AttentionShape, FfnShape, LayerShape, ModelShape

HEAD_BYTES = 2.0  # embedding, head and routers stay in 16 bits


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model as it is served.

    Attributes:
        shape: the model.
        weight_bytes: of a stored element of attention and feed-forward.
        compute: in which format matrices are multiplied.
        kv_bytes: of a stored element of keys and values.
        head_bytes: of an element of embedding and head.
    """

    shape: ModelShape
    weight_bytes: float
    compute: Precision
    kv_bytes: float
    head_bytes: float = HEAD_BYTES

    def __post_init__(self) -> None:
        if len({_heads(layer.attention) for layer in self.shape.layers}) != 1:
            raise ConfigError(
                f"{self.shape.name}: layers have different attention heads", why="one division of heads is for all"
            )
        if self.attention.num_heads % self.attention.num_kv_heads:
            raise ConfigError(
                f"{self.shape.name}: {self.attention.num_heads} query heads are no multiple of "
                f"{self.attention.num_kv_heads} key/value heads"
            )

    @property
    def attention(self) -> AttentionShape:
        """Of every layer, windows aside."""
        return self.shape.layers[0].attention

    @property
    def kinds(self) -> tuple[tuple[LayerShape, int], ...]:
        """Layers that are alike, and how many."""
        return tuple(Counter(self.shape.layers).items())

    @property
    def expert_ffn(self) -> FfnShape | None:
        """The experts, None in a dense model; mixtures with experts of several kinds are refused."""
        found = {layer.ffn for layer in self.shape.layers if layer.ffn.is_moe}
        if len(found) > 1:
            raise ConfigError(f"{self.shape.name}: layers have different experts", why="one division is for all")
        return next(iter(found), None)

    @property
    def dense_ffn(self) -> FfnShape | None:
        """The dense feed-forward, the widest one where they differ."""
        found = [layer.ffn for layer in self.shape.layers if not layer.ffn.is_moe]
        return max(found, key=lambda ffn: ffn.inner, default=None)

    @property
    def num_moe(self) -> int:
        """Layers with experts."""
        return sum(layer.ffn.is_moe for layer in self.shape.layers)

    @property
    def query_elements(self) -> int:
        """Weights of one query head in one layer: its part of q and o."""
        a, width = self.attention, self.shape.hidden_size
        if not a.kv_rank:
            return width * (a.head_dim + a.value_dim)
        q = (a.q_rank or width) * a.head_dim
        return q + a.kv_rank * (a.head_dim - a.rope_dim + a.value_dim) + width * a.value_dim

    @property
    def kv_elements(self) -> int:
        """Weights of one key/value head in one layer; 0 with latent attention."""
        a = self.attention
        return 0 if a.kv_rank else self.shape.hidden_size * (a.head_dim + a.value_dim)

    @property
    def common_elements(self) -> int:
        """Attention weights of one layer that every GPU has."""
        a = self.attention
        return self.shape.hidden_size * (a.q_rank + a.kv_rank + a.rope_dim) if a.kv_rank else 0

    @property
    def kv_head_bytes(self) -> float:
        """Of one token and one key/value head in one layer; 0 with latent attention."""
        a = self.attention
        return 0.0 if a.kv_rank else (a.head_dim + a.value_dim) * self.kv_bytes

    @property
    def common_kv_bytes(self) -> float:
        """Of one token in one layer, on every GPU: the compressed vector of latent attention."""
        a = self.attention
        return (a.kv_rank + a.rope_dim) * self.kv_bytes if a.kv_rank else 0.0

    @property
    def total_bytes(self) -> float:
        """All weights once."""
        shape = self.shape
        ends = shape.hidden_size * shape.vocab_size * (1 if shape.tied else 2) * self.head_bytes
        return (shape.parameters - shape.hidden_size * shape.vocab_size * (1 if shape.tied else 2)) * (
            self.weight_bytes
        ) + ends

    @property
    def kv_token_bytes(self) -> float:
        """Of one token, all layers and heads, on one GPU."""
        return self.shape.num_layers * (self.kv_head_bytes * self.attention.num_kv_heads + self.common_kv_bytes)


def _heads(a: AttentionShape) -> tuple[int, ...]:
    return (a.num_heads, a.num_kv_heads, a.head_dim, a.value_dim, a.q_rank, a.kv_rank, a.rope_dim)


def active_elements(served: Served) -> float:
    """Weights that one token is multiplied with."""
    shape, total = served.shape, 0.0
    for layer, count in served.kinds:
        ffn = layer.ffn
        routed = ffn.top_k * ffn.matrices * shape.hidden_size * ffn.inner if ffn.is_moe else 0
        total += count * (
            layer.attention.parameters(shape.hidden_size) + routed + ffn.other_parameters(shape.hidden_size)
        )
    return total + shape.hidden_size * shape.vocab_size
