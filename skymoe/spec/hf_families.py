"""What each Hugging Face architecture calls itself, defaults to, and can carry: one row per architecture.

Biases, per-head q/k norm and sliding windows are where the families differ; the feed-forward half is in `hf_ffn.py`.
The defaults are those of the transformers configuration classes, for fields that a file leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from skymoe.spec.fields import Fields
from skymoe.spec.hf_window import (
    FULL,
    SLIDING,
    layer_types,
    read_layer_window,
    read_whole_window,
    read_window,
    require_layer_types,
    write_layer_window,
)
from skymoe.spec.model import Architecture, ModelSpec, RopeScaling


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: names, defaults, and the two halves of the translation of biases, norms and windows."""

    model_type: str
    hf_class: str
    max_position: int
    theta: float = 10000.0
    norm_eps: float = 1e-6
    head_dim: int | None = None
    kv_heads_optional: bool = False
    read_extras: Callable[[Fields, int], dict[str, Any]]
    write_extras: Callable[[ModelSpec], dict[str, Any]]


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
    checks = [
        (spec.qkv_bias and not (qwen2 or qwen3 or llama), f"{arch} has no q/k/v biases"),
        (arch is has.QWEN2 and not spec.qkv_bias, "qwen2 always has q/k/v biases"),
        (spec.o_bias and not (qwen3 or llama), f"{arch} has no output-projection bias"),
        ((qwen3 or llama) and spec.qkv_bias != spec.o_bias, f"{arch} has all attention biases or none"),
        (spec.mlp_bias and not llama, f"{arch} has no feed-forward biases"),
        (spec.qk_norm and not qwen3, f"{arch} has no q/k norm"),
        (qwen3 and not spec.qk_norm, f"{arch} always has q/k norm"),
    ]
    if spec.sliding_window is not None:
        whole = arch in (has.MISTRAL, has.MIXTRAL, has.QWEN3_MOE)
        by_layer = arch in (has.QWEN2, has.QWEN3, has.QWEN2_MOE)
        checks += [
            (not (whole or by_layer), f"{arch} has no sliding window"),
            (whole and spec.sliding_first_layer > 0, f"{arch} has the sliding window in every layer or in none"),
        ]
    return [reason for applies, reason in checks if applies]


def _uncarried_ffn(spec: ModelSpec) -> list[str]:
    arch, moe, has = spec.architecture, spec.moe, Architecture
    if arch is has.SKYMOE:
        return []
    if arch not in MOE_ARCHITECTURES:
        return [f"{arch} has no experts"] if moe else []
    if moe is None:
        return [f"{arch} needs experts"]
    qwen = arch in (has.QWEN2_MOE, has.QWEN3_MOE)
    checks = [
        (moe.gate_norm is not None and arch is not has.SKYWORK_MOE, f"{arch} has no gate normalization"),
        (moe.expert_bias, f"{arch} has no expert bias"),
        (spec.num_dense_layers > 0 and not qwen, f"{arch} has experts in every layer"),
        (not moe.norm_topk and not qwen, f"{arch} always renormalizes the chosen probabilities"),
        (moe.shared_ffn_size > 0 and arch is not has.QWEN2_MOE, f"{arch} has no shared expert"),
        (moe.shared_ffn_size == 0 and arch is has.QWEN2_MOE, "qwen2_moe always has a shared expert"),
    ]
    return [reason for applies, reason in checks if applies]


# ---- reading and writing biases, norms, windows


def _read_none(fields: Fields, num_layers: int) -> dict[str, Any]:
    require_layer_types(fields, num_layers, FULL)
    return {}


def _write_none(spec: ModelSpec) -> dict[str, Any]:
    return {}


def _read_llama(fields: Fields, num_layers: int) -> dict[str, Any]:
    require_layer_types(fields, num_layers, FULL)
    bias = fields.flag("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": fields.flag("mlp_bias", False)}


def _write_llama(spec: ModelSpec) -> dict[str, Any]:
    return {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}


def _read_mistral(fields: Fields, num_layers: int) -> dict[str, Any]:
    return read_whole_window(fields, num_layers, default=4096)


def _read_mixtral(fields: Fields, num_layers: int) -> dict[str, Any]:
    return read_whole_window(fields, num_layers, default=None)


def _write_window(spec: ModelSpec) -> dict[str, Any]:
    return {"sliding_window": spec.sliding_window}


def _read_qwen2(fields: Fields, num_layers: int) -> dict[str, Any]:
    return {
        "qkv_bias": True,
        **read_layer_window(fields, num_layers, fields.integer("max_window_layers", 28, minimum=0)),
    }


def _read_qwen3(fields: Fields, num_layers: int) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    window = read_layer_window(fields, num_layers, fields.integer("max_window_layers", 28, minimum=0))
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, **window}


def _write_qwen2(spec: ModelSpec) -> dict[str, Any]:
    return write_layer_window(spec)


def _write_qwen3(spec: ModelSpec) -> dict[str, Any]:
    return {"attention_bias": spec.qkv_bias, **write_layer_window(spec)}


def _read_qwen2_moe(fields: Fields, num_layers: int) -> dict[str, Any]:
    # Without layer_types the class alternates sliding and full layers, which no ModelSpec says.
    if fields.flag("use_sliding_window", False) and "layer_types" not in fields:
        raise fields.error("layer_types", "is missing", why="with use_sliding_window it decides which layers slide")
    return {"qkv_bias": fields.flag("qkv_bias", True), **read_layer_window(fields, num_layers, num_layers)}


def _write_qwen2_moe(spec: ModelSpec) -> dict[str, Any]:
    return {"qkv_bias": spec.qkv_bias, **write_layer_window(spec)}


def _read_qwen3_moe(fields: Fields, num_layers: int) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    sliding = fields.flag("use_sliding_window", False)
    window = (read_window(fields) if fields.has("sliding_window") else 4096) if sliding else None
    require_layer_types(fields, num_layers, FULL if window is None else SLIDING)
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "sliding_window": window}


def _write_qwen3_moe(spec: ModelSpec) -> dict[str, Any]:
    sliding = spec.sliding_window is not None
    return {"attention_bias": spec.qkv_bias, "use_sliding_window": sliding, "sliding_window": spec.sliding_window}


def _read_skymoe(fields: Fields, num_layers: int) -> dict[str, Any]:
    flags = {name: fields.flag(name, False) for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm")}
    return {**flags, **read_layer_window(fields, num_layers, 0, switch=fields.raw("sliding_window") is not None)}


def _write_skymoe(spec: ModelSpec) -> dict[str, Any]:
    flags = {"qkv_bias": spec.qkv_bias, "o_bias": spec.o_bias, "mlp_bias": spec.mlp_bias, "qk_norm": spec.qk_norm}
    return {
        **flags,
        "sliding_window": spec.sliding_window,
        "layer_types": layer_types(spec),
        "auto_map": {  # for transformers with trust_remote_code; we never look at it
            "AutoConfig": "configuration_skymoe.SkyMoeConfig",
            "AutoModel": "modeling_skymoe.SkyMoeModel",
            "AutoModelForCausalLM": "modeling_skymoe.SkyMoeForCausalLM",
        },
    }


MOE_ARCHITECTURES = (
    Architecture.MIXTRAL,
    Architecture.QWEN2_MOE,
    Architecture.QWEN3_MOE,
    Architecture.SKYWORK_MOE,
    Architecture.SKYMOE,
)
# fmt: off
FAMILIES: dict[Architecture, Family] = {
    Architecture.LLAMA: Family(model_type="llama", hf_class="LlamaForCausalLM", max_position=2048,
                               kv_heads_optional=True, read_extras=_read_llama, write_extras=_write_llama),
    Architecture.MISTRAL: Family(model_type="mistral", hf_class="MistralForCausalLM", max_position=131072,
                                 read_extras=_read_mistral, write_extras=_write_window),
    Architecture.QWEN2: Family(model_type="qwen2", hf_class="Qwen2ForCausalLM", max_position=32768,
                               read_extras=_read_qwen2, write_extras=_write_qwen2),
    Architecture.QWEN3: Family(model_type="qwen3", hf_class="Qwen3ForCausalLM", max_position=32768, head_dim=128,
                               read_extras=_read_qwen3, write_extras=_write_qwen3),
    Architecture.SKYWORK: Family(model_type="skywork", hf_class="SkyworkForCausalLM", max_position=4096,
                                 kv_heads_optional=True, read_extras=_read_none, write_extras=_write_none),
    Architecture.MIXTRAL: Family(model_type="mixtral", hf_class="MixtralForCausalLM", max_position=131072, theta=1e6,
                                 norm_eps=1e-5, read_extras=_read_mixtral, write_extras=_write_window),
    Architecture.QWEN2_MOE: Family(model_type="qwen2_moe", hf_class="Qwen2MoeForCausalLM", max_position=32768,
                                   read_extras=_read_qwen2_moe, write_extras=_write_qwen2_moe),
    Architecture.QWEN3_MOE: Family(model_type="qwen3_moe", hf_class="Qwen3MoeForCausalLM", max_position=32768,
                                   read_extras=_read_qwen3_moe, write_extras=_write_qwen3_moe),
    Architecture.SKYWORK_MOE: Family(model_type="skywork", hf_class="SkyworkForCausalLM", max_position=8192,
                                     kv_heads_optional=True, read_extras=_read_none, write_extras=_write_none),
    Architecture.SKYMOE: Family(model_type="skymoe", hf_class="SkyMoeForCausalLM", max_position=8192,
                                kv_heads_optional=True, read_extras=_read_skymoe, write_extras=_write_skymoe),
}
# fmt: on
