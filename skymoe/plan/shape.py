"""ModelShape: what the planner has to know of a model, its layers one by one.

Wider than a `ModelSpec`, which describes models that this package can build: published measurements are of older and
newer models too (feed-forwards without a gate, dropout, multi-head latent attention), and a planner that is checked
against them must be able to say what they are. `shape_of` translates a ModelSpec. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.spec.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One attention.

    Attributes:
        num_heads, num_kv_heads, head_dim: query heads, key/value heads, width of a query (and key) head.
        value_dim: width of a value head.
        q_rank, kv_rank, rope_dim: ranks of the compressed queries and keys/values and the width of the rotary part in
            multi-head latent attention (DeepSeek-V2, section 2.1); 0 where projections are whole.
        window: sliding window in tokens, or None.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    window: int | None = None

    def parameters(self, hidden_size: int) -> int:
        """Weights that are multiplied: q, k, v, o, whole or in two steps."""
        queries, values = self.num_heads * self.head_dim, self.num_heads * self.value_dim
        if not self.kv_rank:
            return hidden_size * (queries + values + self.num_kv_heads * (self.head_dim + self.value_dim))
        q = hidden_size * self.q_rank + self.q_rank * queries if self.q_rank else hidden_size * queries
        kv = hidden_size * (self.kv_rank + self.rope_dim)
        kv += self.kv_rank * self.num_heads * (self.head_dim - self.rope_dim + self.value_dim)
        return q + kv + values * hidden_size


@dataclass(frozen=True, kw_only=True)
class FfnShape:
    """One feed-forward: dense (`num_experts` 0) or a mixture of experts.

    Attributes:
        inner: inner width, of the dense one or of one expert.
        gated: SwiGLU (three matrices) or not (two).
        num_experts, top_k: routed experts, and how many a token uses.
        shared_inner: inner width of the experts that every token uses, together.
        shared_gate: these are weighed by a gate of their own (Qwen2-MoE).
    """

    inner: int
    gated: bool = True
    num_experts: int = 0
    top_k: int = 0
    shared_inner: int = 0
    shared_gate: bool = False

    @property
    def is_moe(self) -> bool:
        """Whether there are experts."""
        return self.num_experts > 0

    @property
    def matrices(self) -> int:
        """Of one expert, or of the dense feed-forward."""
        return 3 if self.gated else 2

    def expert_parameters(self, hidden_size: int) -> int:
        """Of the routed experts, all together; 0 for a dense one."""
        return self.num_experts * self.matrices * hidden_size * self.inner

    def other_parameters(self, hidden_size: int) -> int:
        """What every token passes: the dense feed-forward, or router and shared experts."""
        if not self.is_moe:
            return self.matrices * hidden_size * self.inner
        gate = hidden_size if self.shared_gate else 0
        return hidden_size * self.num_experts + self.matrices * hidden_size * self.shared_inner + gate


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One layer."""

    attention: AttentionShape
    ffn: FfnShape


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer on paper.

    Attributes:
        name: for messages.
        hidden_size, vocab_size: D, V.
        layers: in order; equal ones are one object's value, so `set(layers)` is small.
        tied: the head is the embedding matrix.
        dropout: trained with dropout, whose masks are kept for the backward pass (GPT-3 and older).
        positions: learned absolute positions (rows of a second embedding), 0 with rotary ones.
    """

    name: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerShape, ...]
    tied: bool = False
    dropout: bool = False
    positions: int = 0

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def parameters(self) -> int:
        """All matrices: embedding, layers, head. Norms and biases are left out (below 0.1 %)."""
        embedding = self.hidden_size * (self.vocab_size + self.positions)
        head = 0 if self.tied else self.hidden_size * self.vocab_size
        return embedding + head + sum(layer_parameters(layer, self.hidden_size) for layer in self.layers)


def layer_parameters(layer: LayerShape, hidden_size: int) -> int:
    """Matrices of one layer."""
    ffn = layer.ffn.expert_parameters(hidden_size) + layer.ffn.other_parameters(hidden_size)
    return layer.attention.parameters(hidden_size) + ffn


def shape_of(spec: ModelSpec, name: str = "model") -> ModelShape:
    """The shape of a model that this package knows."""
    layers: list[LayerShape] = []
    known: dict[LayerShape, LayerShape] = {}
    for layer in range(spec.num_layers):
        attention = AttentionShape(
            num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, value_dim=spec.head_dim,
            window=spec.window(layer),
        )  # fmt: skip
        if spec.moe is not None and spec.is_moe_layer(layer):
            moe = spec.moe
            ffn = FfnShape(
                inner=moe.ffn_size, num_experts=moe.num_experts, top_k=moe.top_k, shared_inner=moe.shared_ffn_size,
                shared_gate=moe.shared_ffn_size > 0,
            )  # fmt: skip
        else:
            ffn = FfnShape(inner=spec.ffn_size)
        made = LayerShape(attention=attention, ffn=ffn)
        layers.append(known.setdefault(made, made))
    return ModelShape(
        name=name, hidden_size=spec.hidden_size, vocab_size=spec.vocab_size, layers=tuple(layers),
        tied=spec.tie_embeddings,
    )  # fmt: skip
