"""What a model costs on paper: parameters, bytes, floating-point operations per token.

One price list for the whole project: the training log's MFU, `skymoe inspect` and the planner all ask here, and a test
holds the counts to the built module (`sum(p.numel())`).

Conventions, because published figures mix them:

- A multiply-add is 2 FLOPs. Only matrix multiplications are counted: projections, experts, router, head and the two
  attention products. Norms, softmax, rotary, activations and the embedding look-up (a copy) are not.
- `causal` counts the query-key pairs a causal model needs, (T + 1) / 2 keys per query on average; `full` counts T, as
  6N + 12 L H d T formulas do. Real kernels skip the upper triangle, so causal MFU is the honest one; the full one is
  printed because most published figures use it.
- A sliding window of w sees min(p + 1, w) keys from position p (causal), min(T, w) (full).
- Backward costs twice the forward. What a program computes besides (recomputation) is in `utilisation.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError
from skymoe.spec.model import ModelSpec, QkNorm


class AttentionCount(StrEnum):
    """Which query-key pairs are counted."""

    CAUSAL = "causal"
    FULL = "full"


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model by part; each field counts all layers together.

    Attributes:
        embedding: V * D.
        head: V * D, or 0 when tied to the embedding.
        attention: q, k, v, o with biases and the norms of q and k.
        dense_ffn: feed-forwards of the dense layers.
        experts: all routed experts.
        shared: shared experts with their gates.
        router: E * D per MoE layer. The expert bias is no parameter (it is not trained by gradients).
        norms: RMSNorm vectors outside attention.
        active_experts: the share of `experts` that one token uses: top_k / num_experts.
    """

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    experts: int
    shared: int
    router: int
    norms: int
    active_experts: int

    @property
    def total(self) -> int:
        """Every parameter."""
        return self.embedding + self.head + self._always + self.experts

    @property
    def active(self) -> int:
        """Parameters that take part in one token, embedding and head included."""
        return self.embedding + self.head + self._always + self.active_experts

    @property
    def active_without_embedding(self) -> int:
        """Active parameters that are multiplied: `active` less the look-up table (kept when it is also the head)."""
        return self.active - (self.embedding if self.head else 0)

    @property
    def _always(self) -> int:
        return self.attention + self.dense_ffn + self.shared + self.router + self.norms


def count_parameters(spec: ModelSpec) -> ParameterCount:
    """Parameters of `spec`.

    Attention: D (H + 2 H_kv) d + H d D, and where the spec has them biases and q/k norms (2 d per head; over the whole
    projection (H + H_kv) d). SwiGLU of width F: 3 D F.
    """
    dim, num_layers, num_moe = spec.hidden_size, spec.num_layers, len(spec.moe_layer_ids)
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = 2 * dim * (q_size + kv_size)
    attention += (q_size + 2 * kv_size) * spec.qkv_bias + dim * spec.o_bias
    attention += {None: 0, QkNorm.HEAD: 2 * spec.head_dim, QkNorm.FULL: q_size + kv_size}[spec.qk_norm]
    dense = 3 * dim * spec.ffn_size + (2 * spec.ffn_size + dim) * spec.mlp_bias
    experts = active = shared = router = 0
    if spec.moe is not None:
        one = 3 * dim * spec.moe.ffn_size
        experts, active = num_moe * spec.moe.num_experts * one, num_moe * spec.moe.top_k * one
        router = num_moe * spec.moe.num_experts * dim
        shared = num_moe * (3 * dim * spec.moe.shared_ffn_size + dim) if spec.moe.shared_ffn_size else 0
    return ParameterCount(
        embedding=spec.vocab_size * dim,
        head=0 if spec.tie_embeddings else spec.vocab_size * dim,
        attention=num_layers * attention,
        dense_ffn=spec.num_dense_layers * dense,
        experts=experts,
        shared=shared,
        router=router,
        norms=(2 * num_layers + 1) * dim,
        active_experts=active,
    )


def parameter_bytes(spec: ModelSpec, dtype: DType) -> int:
    """Bytes of all weights in `dtype`."""
    return count_parameters(spec).total * dtype.itemsize


def kv_bytes_per_token(spec: ModelSpec, dtype: DType) -> int:
    """Bytes of keys and values that one token leaves in the cache of all layers: 2 L H_kv d."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one token, averaged over a sequence.

    Attributes:
        attention, ffn: one total per layer: its projections and scores; its feed-forward, router included.
        attention_projections, attention_scores, dense_ffn, experts, shared, router, head: by part, all layers together.
    """

    attention: tuple[float, ...]
    ffn: tuple[float, ...]
    attention_projections: float
    attention_scores: float
    dense_ffn: float
    experts: float
    shared: float
    router: float
    head: float

    @property
    def layers(self) -> tuple[float, ...]:
        """One total per layer, attention and feed-forward together."""
        return tuple(sum(halves) for halves in zip(self.attention, self.ffn, strict=True))

    @property
    def total(self) -> float:
        """All layers and the head."""
        return sum(self.layers) + self.head


def flops_per_token(
    spec: ModelSpec,
    sequence_length: int,
    *,
    attention: AttentionCount | str = AttentionCount.CAUSAL,
    backward: bool = False,
) -> Flops:
    """FLOPs per token of a forward pass over sequences of `sequence_length` tokens, or of a training step.

    Per layer: 2 * (parameters multiplied) + 4 H d * (keys seen); head: 2 V D. With `backward` everything times 3.

    Args:
        spec: the model.
        sequence_length: T, in tokens.
        attention: `causal` or `full` (see the module docstring).
        backward: include the backward pass.

    Raises:
        ConfigError: `sequence_length` is not positive.
    """
    if sequence_length < 1:
        raise ConfigError(f"sequence_length must be positive, got {sequence_length}")
    convention = AttentionCount(attention)
    times = 3.0 if backward else 1.0
    dim, moe = spec.hidden_size, spec.moe
    projections = times * 4 * dim * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    dense = times * 6 * dim * spec.ffn_size
    experts = times * 6 * dim * moe.ffn_size * moe.top_k if moe else 0.0
    shared = times * (6 * dim * moe.shared_ffn_size + 2 * dim) if moe and moe.shared_ffn_size else 0.0
    router = times * 2 * dim * moe.num_experts if moe else 0.0
    scores = [
        times * 4 * spec.num_heads * spec.head_dim * mean_keys(sequence_length, spec.window(layer), convention)
        for layer in range(spec.num_layers)
    ]
    moe_ids = frozenset(spec.moe_layer_ids)
    ffn = [experts + shared + router if layer in moe_ids else dense for layer in range(spec.num_layers)]
    return Flops(
        attention=tuple(projections + score for score in scores),
        ffn=tuple(ffn),
        attention_projections=projections * spec.num_layers,
        attention_scores=sum(scores),
        dense_ffn=dense * spec.num_dense_layers,
        experts=experts * len(moe_ids),
        shared=shared * len(moe_ids),
        router=router * len(moe_ids),
        head=times * 2 * spec.vocab_size * dim,
    )


def mean_keys(sequence_length: int, window: int | None, attention: AttentionCount) -> float:
    """Keys that a query multiplies with, averaged over the positions of a sequence."""
    seen = min(sequence_length, window or sequence_length)
    if attention is AttentionCount.FULL:
        return float(seen)
    return seen - seen * (seen - 1) / (2 * sequence_length)  # the first `seen` queries see 1, 2, ... keys


def mfu(tokens_per_second: float, flops: Flops, peak_flops_per_second: float) -> float:
    """Model FLOPs utilization of one device: the share of its peak that `flops` per token at this speed uses."""
    return tokens_per_second * flops.total / peak_flops_per_second
