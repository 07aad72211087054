"""The attention half of a Hugging Face config: biases, norms of queries and keys, windows.

One reader and one writer per family. `attention_bias` covers four projections in Llama, Qwen3 and OLMoE, `qkv_bias`
three in Qwen2-MoE; Qwen2 has always three. Of the norms a native config says nothing, the class decides: Qwen3 has one
per head, OLMoE one over the whole projection.
"""

from __future__ import annotations

from typing import Any

from skymoe.spec.fields import Fields
from skymoe.spec.hf_window import (
    FULL,
    SLIDING,
    layer_types,
    read_layer_window,
    read_whole_window,
    read_window,
    refuse_window,
    require_layer_types,
    write_layer_window,
)
from skymoe.spec.model import Architecture, ModelSpec, QkNorm


def read_attention(fields: Fields, architecture: Architecture, num_layers: int) -> dict[str, Any]:
    """Biases, `qk_norm`, `sliding_window` and `sliding_layers` of the ModelSpec. Raises FormatError."""
    match architecture:
        case Architecture.LLAMA:
            return _read_llama(fields, num_layers)
        case Architecture.MISTRAL:
            return read_whole_window(fields, num_layers, default=4096)
        case Architecture.MIXTRAL:
            return read_whole_window(fields, num_layers, default=None)
        case Architecture.QWEN2:
            return {"qkv_bias": True, **read_layer_window(fields, num_layers, _last_layers(fields, num_layers))}
        case Architecture.QWEN3:
            return _read_qwen3(fields, num_layers)
        case Architecture.QWEN2_MOE:
            return _read_qwen2_moe(fields, num_layers)
        case Architecture.QWEN3_MOE:
            return _read_qwen3_moe(fields, num_layers)
        case Architecture.OLMOE:
            return _read_olmoe(fields, num_layers)
        case Architecture.SKYMOE:
            return _read_skymoe(fields, num_layers)
    refuse_window(fields, num_layers)  # Skywork: no biases, no norms, no window
    return {}


def write_attention(spec: ModelSpec) -> dict[str, Any]:
    """The config fields of the attention half. `spec` is one that its architecture can carry."""
    match spec.architecture:
        case Architecture.LLAMA:
            return {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
        case Architecture.MISTRAL | Architecture.MIXTRAL:
            return {"sliding_window": spec.sliding_window}
        case Architecture.QWEN2:
            return write_layer_window(spec)
        case Architecture.QWEN3:
            return {"attention_bias": spec.qkv_bias, **write_layer_window(spec)}
        case Architecture.QWEN2_MOE:
            return {"qkv_bias": spec.qkv_bias, **write_layer_window(spec)}
        case Architecture.QWEN3_MOE:
            sliding = spec.sliding_window is not None
            whole = {"use_sliding_window": sliding, "sliding_window": spec.sliding_window}
            return {"attention_bias": spec.qkv_bias, **whole}
        case Architecture.OLMOE:
            return {"attention_bias": spec.qkv_bias, "clip_qkv": None}
        case Architecture.SKYMOE:
            return _write_skymoe(spec)
    return {}


def _read_llama(fields: Fields, num_layers: int) -> dict[str, Any]:
    refuse_window(fields, num_layers)
    return {**_one_bias(fields), "mlp_bias": fields.flag("mlp_bias", False)}


def _read_qwen3(fields: Fields, num_layers: int) -> dict[str, Any]:
    window = read_layer_window(fields, num_layers, _last_layers(fields, num_layers))
    return {**_one_bias(fields), "qk_norm": QkNorm.HEAD, **window}


def _read_qwen2_moe(fields: Fields, num_layers: int) -> dict[str, Any]:
    below = fields.integer("max_window_layers", 28, minimum=0)
    alternating = range(0, min(below, num_layers), 2)  # the class's own rule where layer_types is absent
    return {"qkv_bias": fields.flag("qkv_bias", True), **read_layer_window(fields, num_layers, alternating)}


def _read_qwen3_moe(fields: Fields, num_layers: int) -> dict[str, Any]:
    sliding = fields.flag("use_sliding_window", False)
    window = (read_window(fields) if fields.has("sliding_window") else 4096) if sliding else None
    require_layer_types(fields, num_layers, FULL if window is None else SLIDING)
    return {**_one_bias(fields), "qk_norm": QkNorm.HEAD, "sliding_window": window}


def _read_olmoe(fields: Fields, num_layers: int) -> dict[str, Any]:
    refuse_window(fields, num_layers)
    return {**_one_bias(fields), "qk_norm": QkNorm.FULL}


def _one_bias(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias}


def _last_layers(fields: Fields, num_layers: int) -> range:
    return range(fields.integer("max_window_layers", 28, minimum=0), num_layers)


def _read_skymoe(fields: Fields, num_layers: int) -> dict[str, Any]:
    flags: dict[str, Any] = {name: fields.flag(name, False) for name in ("qkv_bias", "o_bias", "mlp_bias")}
    window = read_layer_window(fields, num_layers, range(num_layers), switch="sliding_window" in fields)
    return {**flags, **window, "qk_norm": _read_qk_norm(fields)}


def _read_qk_norm(fields: Fields) -> QkNorm | None:
    if "qk_norm" not in fields:
        return None
    if isinstance(fields.raw("qk_norm"), bool):  # as files said before there was a second form
        return QkNorm.HEAD if fields.flag("qk_norm") else None
    name = fields.text("qk_norm")
    for norm in QkNorm:
        if norm == name:
            return norm
    raise fields.error("qk_norm", f"must be null or one of {', '.join(QkNorm)}, got {name!r}")


def _write_skymoe(spec: ModelSpec) -> dict[str, Any]:
    return {
        "qkv_bias": spec.qkv_bias,
        "o_bias": spec.o_bias,
        "mlp_bias": spec.mlp_bias,
        "qk_norm": None if spec.qk_norm is None else spec.qk_norm.value,
        "sliding_window": spec.sliding_window,
        "layer_types": layer_types(spec),
        "auto_map": {  # for transformers with trust_remote_code; we never look at it
            "AutoConfig": "configuration_skymoe.SkyMoeConfig",
            "AutoModel": "modeling_skymoe.SkyMoeModel",
            "AutoModelForCausalLM": "modeling_skymoe.SkyMoeForCausalLM",
        },
    }
