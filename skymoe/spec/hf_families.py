"""What each Hugging Face architecture calls itself, defaults to, and can carry: one row per architecture.

The defaults are those of the transformers configuration classes, for fields that a file leaves out. Where the families
differ in substance, `hf_attention.py` and `hf_ffn.py` read and write the fields, and `uncarried` says what a family has
no field for: the one place that decides whether a conversion would lose something.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from skymoe.spec.model import Architecture, ModelSpec, QkNorm, RopeScaling


@dataclass(frozen=True)
class Family:
    """One row: names, and the class's defaults for fields that a file leaves out.

    Attributes:
        model_type, hf_class: what the config calls itself.
        max_position, theta, norm_eps, head_dim: defaults; a head_dim of None is hidden_size / num_attention_heads.
        kv_heads_optional: whether an absent num_key_value_heads means as many as query heads.
        tokens: the class's own bos, eos and pad ids.
    """

    model_type: str
    hf_class: str
    max_position: int
    theta: float = 10000.0
    norm_eps: float = 1e-6
    head_dim: int | None = None
    kv_heads_optional: bool = False
    tokens: tuple[int | None, int | None, int | None] = (None, None, None)


def uncarried(spec: ModelSpec) -> tuple[str, ...]:
    """Why `spec.architecture` cannot carry `spec`; empty when it can."""
    arch = spec.architecture
    reasons = [*_uncarried_attention(spec), *_uncarried_ffn(spec)]
    rope = spec.rope
    if rope.scaling is RopeScaling.DYNAMIC and rope.original_max_position not in (None, spec.max_position):
        reasons.append("dynamic rotary scaling always starts from max_position_embeddings")
    if arch is Architecture.SKYWORK_MOE and spec.moe and spec.moe.gate_norm and spec.moe.gate_norm.ddof != 1:
        reasons.append("the gate normalization of skywork is the unbiased deviation (ddof=1)")
    return tuple(reasons)


def carried(spec: ModelSpec) -> tuple[ModelSpec, tuple[str, ...]]:
    """`spec` under an architecture that can carry it: its own, or `skymoe` with the reasons why not its own."""
    reasons = uncarried(spec)
    return (replace(spec, architecture=Architecture.SKYMOE), reasons) if reasons else (spec, ())


def _uncarried_attention(spec: ModelSpec) -> list[str]:
    arch, has = spec.architecture, Architecture
    if arch is has.SKYMOE:
        return []
    qwen2, qwen3, llama = arch in (has.QWEN2, has.QWEN2_MOE), arch in (has.QWEN3, has.QWEN3_MOE), arch is has.LLAMA
    olmoe, one_bias = arch is has.OLMOE, qwen3 or arch in (has.LLAMA, has.OLMOE)
    norm = QkNorm.HEAD if qwen3 else QkNorm.FULL if olmoe else None
    checks = [
        (spec.qkv_bias and not (qwen2 or one_bias), f"{arch} has no q/k/v biases"),
        (arch is has.QWEN2 and not spec.qkv_bias, "qwen2 always has q/k/v biases"),
        (spec.o_bias and not one_bias, f"{arch} has no output-projection bias"),
        (one_bias and spec.qkv_bias != spec.o_bias, f"{arch} has all attention biases or none"),
        (spec.mlp_bias and not llama, f"{arch} has no feed-forward biases"),
        (spec.qk_norm is not None and norm is None, f"{arch} has no q/k norm"),
        (norm is not None and spec.qk_norm is not norm, f"{arch} always has q/k norm of form {norm}"),
        (_has_odd_heads(spec), f"{arch} has heads of hidden_size / num_attention_heads"),
    ]
    if spec.sliding_window is not None:
        whole = arch in (has.MISTRAL, has.MIXTRAL, has.QWEN3_MOE)
        by_layer = arch in (has.QWEN2, has.QWEN3, has.QWEN2_MOE)
        checks += [
            (not (whole or by_layer), f"{arch} has no sliding window"),
            (whole and spec.sliding_layers is not None, f"{arch} has the sliding window in every layer or in none"),
        ]
    return [reason for applies, reason in checks if applies]


def _has_odd_heads(spec: ModelSpec) -> bool:
    """Heads of a width that the architecture's class cannot say (OLMoE, Skywork) or does not accept (Llama)."""
    match spec.architecture:
        case Architecture.OLMOE | Architecture.SKYWORK | Architecture.SKYWORK_MOE:
            return spec.num_heads * spec.head_dim != spec.hidden_size
        case Architecture.LLAMA:
            return spec.hidden_size % spec.num_heads != 0
    return False


def _uncarried_ffn(spec: ModelSpec) -> list[str]:
    arch, moe, has = spec.architecture, spec.moe, Architecture
    if arch is has.SKYMOE:
        return []
    if arch not in MOE_ARCHITECTURES:
        return [f"{arch} has no experts"] if moe else []
    if moe is None:
        return [f"{arch} needs experts"]
    qwen, olmoe = arch in (has.QWEN2_MOE, has.QWEN3_MOE), arch is has.OLMOE
    checks = [
        (moe.gate_norm is not None and arch is not has.SKYWORK_MOE, f"{arch} has no gate normalization"),
        (moe.expert_bias, f"{arch} has no expert bias"),
        (spec.num_dense_layers > 0 and not qwen, f"{arch} has experts in every layer"),
        (not moe.norm_topk and not (qwen or olmoe), f"{arch} always renormalizes the chosen probabilities"),
        (moe.shared_ffn_size > 0 and arch is not has.QWEN2_MOE, f"{arch} has no shared expert"),
        (moe.shared_ffn_size == 0 and arch is has.QWEN2_MOE, "qwen2_moe always has a shared expert"),
    ]
    return [reason for applies, reason in checks if applies]


MOE_ARCHITECTURES = (
    Architecture.MIXTRAL,
    Architecture.QWEN2_MOE,
    Architecture.QWEN3_MOE,
    Architecture.OLMOE,
    Architecture.SKYWORK_MOE,
    Architecture.SKYMOE,
)
# fmt: off
FAMILIES: dict[Architecture, Family] = {
    Architecture.LLAMA: Family("llama", "LlamaForCausalLM", max_position=2048, kv_heads_optional=True,
                               tokens=(1, 2, None)),
    Architecture.MISTRAL: Family("mistral", "MistralForCausalLM", max_position=131072, tokens=(1, 2, None)),
    Architecture.QWEN2: Family("qwen2", "Qwen2ForCausalLM", max_position=32768),
    Architecture.QWEN3: Family("qwen3", "Qwen3ForCausalLM", max_position=32768, head_dim=128),
    Architecture.SKYWORK: Family("skywork", "SkyworkForCausalLM", max_position=4096, kv_heads_optional=True,
                                 tokens=(1, 2, None)),
    Architecture.MIXTRAL: Family("mixtral", "MixtralForCausalLM", max_position=131072, theta=1e6, norm_eps=1e-5,
                                 tokens=(1, 2, None)),
    Architecture.QWEN2_MOE: Family("qwen2_moe", "Qwen2MoeForCausalLM", max_position=32768),
    Architecture.QWEN3_MOE: Family("qwen3_moe", "Qwen3MoeForCausalLM", max_position=32768),
    Architecture.OLMOE: Family("olmoe", "OlmoeForCausalLM", max_position=4096, norm_eps=1e-5, kv_heads_optional=True,
                               tokens=(None, 50279, 1)),
    Architecture.SKYWORK_MOE: Family("skywork", "SkyworkForCausalLM", max_position=8192, kv_heads_optional=True,
                                     tokens=(1, 2, None)),
    Architecture.SKYMOE: Family("skymoe", "SkyMoeForCausalLM", max_position=8192, kv_heads_optional=True),
}
# fmt: on
