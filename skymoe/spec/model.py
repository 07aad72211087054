"""ModelSpec: what a decoder language model is.

One description covers the dense families (Llama, Mistral, Qwen2, Qwen3, Skywork) and their mixtures of experts
(Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, Skywork-MoE), with each layer's feed-forward chosen separately. `hf.py`
translates it to and from a Hugging Face `config.json`; `flops.py` counts its parameters and operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from skymoe.base.errors import ConfigError


class Architecture(StrEnum):
    """Which files on disk a model reads and writes: the tensor names and the config fields."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    SKYWORK = "skywork"
    MIXTRAL = "mixtral"
    QWEN2_MOE = "qwen2_moe"
    QWEN3_MOE = "qwen3_moe"
    OLMOE = "olmoe"
    SKYWORK_MOE = "skywork_moe"
    SKYMOE = "skymoe"


class QkNorm(StrEnum):
    """What one RMSNorm on queries, and one on keys, runs over."""

    HEAD = "head"  # each head alone, one weight vector for all heads (Qwen3)
    FULL = "full"  # the whole projection, all heads together (OLMoE)


class RopeScaling(StrEnum):
    """How rotary frequencies are stretched beyond the pretraining context."""

    NONE = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        scaling: the variant; the attributes below belong to the variants named in brackets.
        factor: stretch [linear, dynamic, yarn, llama3].
        original_max_position: context before stretching [dynamic, yarn, llama3]; None means the model's context.
        low_freq_factor, high_freq_factor: [llama3].
        beta_fast, beta_slow, truncate: [yarn].
        attention_factor: multiplies cos and sin; None derives it from `factor` [yarn].
        mscale, mscale_all_dim: DeepSeek's form of the same; zero means absent [yarn].
    """

    theta: float = 10000.0
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        _require(math.isfinite(self.theta) and self.theta > 0, f"rope.theta must be positive, got {self.theta}")
        _require(math.isfinite(self.factor) and self.factor >= 1, f"rope.factor must be >= 1, got {self.factor}")


@dataclass(frozen=True, kw_only=True)
class GateNormSpec:
    """Gating logit normalization, Skywork-MoE Eq. 6: z~ = scale * (z - mean(z)) / (std(z) + eps), per token.

    Attributes:
        scale: lambda of the paper; 1 in the released model.
        ddof: 1 is the unbiased deviation of the released code, 0 the population deviation.
        eps: guards constant logits; the released code has none (0).
        subtract_mean: True is the paper's form; False the released code's. The softmax is the same.
    """

    scale: float = 1.0
    ddof: int = 1
    eps: float = 1e-6
    subtract_mean: bool = True

    def __post_init__(self) -> None:
        _require(math.isfinite(self.scale) and self.scale > 0, f"gate_norm.scale must be positive, got {self.scale}")
        _require(self.ddof in (0, 1), f"gate_norm.ddof must be 0 or 1, got {self.ddof}")
        _require(0 <= self.eps < 1, f"gate_norm.eps must be in [0, 1), got {self.eps}")


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """The mixture-of-experts feed-forward of a layer.

    Attributes:
        num_experts: routed experts per layer (n).
        top_k: experts per token (k).
        ffn_size: inner width of one expert (F).
        gate_norm: gating logit normalization, or None.
        norm_topk: renormalize the k chosen probabilities to sum to 1 (Eq. 2).
        expert_bias: DeepSeek's loss-free balancing: a per-expert bias that takes part in the choice only.
        shared_ffn_size: inner width of a shared expert with a sigmoid gate (Qwen2-MoE); 0 means none.
        aux_loss_coef, output_router_logits: hints for those who train the model with transformers, carried from file
            to file: the weight of its balance loss, and whether it forms that loss. Nothing here reads them.
    """

    num_experts: int
    top_k: int
    ffn_size: int
    gate_norm: GateNormSpec | None = None
    norm_topk: bool = True
    expert_bias: bool = False
    shared_ffn_size: int = 0
    aux_loss_coef: float = 0.001
    output_router_logits: bool = False

    def __post_init__(self) -> None:
        _positive("moe", num_experts=self.num_experts, top_k=self.top_k, ffn_size=self.ffn_size)
        _require(
            self.top_k <= self.num_experts, f"top_k {self.top_k} is more than the {self.num_experts} experts there are"
        )
        _require(0 <= self.shared_ffn_size <= _LIMIT, f"moe.shared_ffn_size is {self.shared_ffn_size}")
        coef = self.aux_loss_coef
        _require(math.isfinite(coef) and coef >= 0, f"aux_loss_coef must not be negative, got {coef}")
        ddof = self.gate_norm.ddof if self.gate_norm else 0
        _require(self.num_experts > ddof, "gate_norm.ddof=1 needs at least 2 experts")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    Attributes:
        architecture: names and fields on disk.
        vocab_size, hidden_size, num_layers: V, D, L.
        ffn_size: inner width of the dense SwiGLU layers; of no meaning when every layer is MoE.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads (GQA), width of a head.
        max_position: context length in tokens.
        norm_eps: RMSNorm epsilon.
        rope: rotary embedding.
        tie_embeddings: the head is the embedding matrix.
        qkv_bias, o_bias: biases of the attention projections.
        mlp_bias: biases of the dense feed-forward (Llama's `mlp_bias`).
        qk_norm: RMSNorm on queries and keys, per head or over the whole projection, or None.
        sliding_window: attention window in tokens, or None.
        sliding_layers: which layers have the window; None means all of them when it is given.
        moe: the mixture of experts, or None for a dense model.
        moe_layers: which layers are MoE; None means all of them when `moe` is given.
        bos_id, eos_ids, pad_id: special tokens, None or empty when the model names none.
        init_std: standard deviation of the normal initial weights.
        use_cache: a hint for transformers, carried from file to file: `generate` keeps keys and values.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_layers: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int = 8192
    norm_eps: float = 1e-6
    rope: RopeSpec = field(default_factory=RopeSpec)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    moe: MoESpec | None = None
    moe_layers: tuple[int, ...] | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    init_std: float = 0.02
    use_cache: bool = True

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position")
        _positive("model", **{name: getattr(self, name) for name in names})
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim must be even for rotary embedding, got {self.head_dim}")
        _require(math.isfinite(self.norm_eps) and self.norm_eps > 0, f"norm_eps must be positive, got {self.norm_eps}")
        _require(math.isfinite(self.init_std) and self.init_std > 0, f"init_std must be positive, got {self.init_std}")
        _require(self.qk_norm is None or isinstance(self.qk_norm, QkNorm), f"qk_norm is {self.qk_norm!r}")
        if self.sliding_window is None:
            _require(not self.sliding_layers, "sliding_layers are given but the model has no sliding_window")
        else:
            _positive("model", sliding_window=self.sliding_window)
        _require(self.moe is not None or not self.moe_layers, "moe_layers are given but the model has no moe section")
        self._check_layers("moe_layers", self.moe_layers)
        self._check_layers("sliding_layers", self.sliding_layers)
        if self.num_dense_layers:
            _positive("model", ffn_size=self.ffn_size)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the feed-forward of `layer` is a mixture of experts."""
        return self.moe is not None and (self.moe_layers is None or layer in self.moe_layers)

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Global ids of the MoE layers, ascending."""
        if self.moe is None:
            return ()
        return tuple(range(self.num_layers)) if self.moe_layers is None else self.moe_layers

    @property
    def num_dense_layers(self) -> int:
        """How many layers have a dense feed-forward."""
        return self.num_layers - len(self.moe_layer_ids)

    def window(self, layer: int) -> int | None:
        """Attention window of `layer` in tokens, None for full attention."""
        return self.sliding_window if self.sliding_layers is None or layer in self.sliding_layers else None

    def _check_layers(self, name: str, layers: tuple[int, ...] | None) -> None:
        ascending = list(layers or ()) == sorted(set(layers or ()))
        _require(
            ascending and all(0 <= layer < self.num_layers for layer in layers or ()),
            f"{name} must be ascending layer numbers below {self.num_layers}, got {list(layers or ())[:20]}",
        )


_LIMIT = 2**31 - 1  # of any count in a config: far above every real model, far below an overflow


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(section: str, **counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= _LIMIT:
            raise ConfigError(f"{section}.{name} must be a positive integer up to {_LIMIT}, got {count!r}")
