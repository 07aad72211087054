"""The feed-forward half of a Hugging Face config: dense widths, experts, gate.

Field names differ per family: Mixtral's and OLMoE's `intermediate_size` is the expert's width, Qwen's is the dense
layers' and `moe_intermediate_size` the expert's; Skywork writes `num_experts` as a list and switches gate normalization
by the *value* of `moe_use_logits_norm` (its released inference code tested only whether the field exists).
"""

from __future__ import annotations

from typing import Any

from skymoe.spec.fields import Fields
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec


def read_ffn(fields: Fields, architecture: Architecture) -> dict[str, Any]:
    """`ffn_size`, `moe` and `moe_layers` of the ModelSpec. Raises FormatError."""
    match architecture:
        case Architecture.MIXTRAL:
            return _read_mixtral(fields)
        case Architecture.SKYWORK_MOE:
            return _read_skywork(fields)
        case Architecture.QWEN2_MOE | Architecture.QWEN3_MOE:
            return _read_qwen(fields, shared=architecture is Architecture.QWEN2_MOE)
        case Architecture.OLMOE:
            return _read_olmoe(fields)
        case Architecture.SKYMOE:
            return _read_skymoe(fields)
    return {"ffn_size": fields.integer("intermediate_size")}


def write_ffn(spec: ModelSpec) -> dict[str, Any]:
    """The config fields of the feed-forward half. `spec` is one that its architecture can carry."""
    match spec.architecture:
        case Architecture.MIXTRAL:
            return _write_mixtral(spec)
        case Architecture.SKYWORK_MOE:
            return _write_skywork(spec)
        case Architecture.QWEN2_MOE | Architecture.QWEN3_MOE:
            return _write_qwen(spec)
        case Architecture.OLMOE:
            return _write_olmoe(spec)
        case Architecture.SKYMOE:
            return _write_skymoe(spec)
    return {"intermediate_size": spec.ffn_size}


def _read_mixtral(fields: Fields) -> dict[str, Any]:
    ffn_size = fields.integer("intermediate_size")
    moe = MoESpec(
        num_experts=fields.integer("num_local_experts", 8),
        top_k=fields.integer("num_experts_per_tok", 2),
        ffn_size=ffn_size,
        **_read_hints(fields),
    )
    return {"ffn_size": ffn_size, "moe": moe}


def _write_mixtral(spec: ModelSpec) -> dict[str, Any]:
    moe = _moe(spec)
    return {
        "intermediate_size": moe.ffn_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "router_jitter_noise": 0.0,
        **_write_hints(moe),
    }


def _read_skywork(fields: Fields) -> dict[str, Any]:
    ffn_size = fields.integer("intermediate_size")
    counts = fields.integers("num_experts") or fields.integers("num_local_experts")
    if len(set(counts)) != 1:
        raise fields.error("num_experts", f"must name one number of experts, got {list(counts)[:20]}")
    if fields.integer("moe_expert_interval", 1) != 1:
        raise fields.error("moe_expert_interval", "must be 1: experts in every layer")
    _refuse_multiplied_input(fields)
    norm = None
    if fields.flag("moe_use_logits_norm", False):
        norm = GateNormSpec(
            scale=fields.number("moe_gate_norm_std", 1.0),
            ddof=1,
            eps=fields.number("moe_gate_norm_eps", 0.0),
            subtract_mean=False,
        )
    moe = MoESpec(
        num_experts=counts[0], top_k=fields.integer("num_experts_per_tok", 2), ffn_size=ffn_size, gate_norm=norm
    )
    return {"ffn_size": ffn_size, "moe": moe}


def _refuse_multiplied_input(fields: Fields) -> None:
    """MoE++, the sibling code, multiplies the experts' input by k when all of these are off."""
    names = ("moe_use_mixtral_gating", "moe_use_Skywork_gating", "moe_feature_no_mul_topk")
    given = [fields.flag(name) for name in names if name in fields]
    if given and not any(given):
        raise fields.error(
            names[-1], "is false, and so is the gating of Skywork: scaled expert inputs are not supported"
        )


def _write_skywork(spec: ModelSpec) -> dict[str, Any]:
    moe = _moe(spec)
    norm = {"moe_use_logits_norm": False} if moe.gate_norm is None else {
        "moe_use_logits_norm": True,
        "moe_gate_norm_std": moe.gate_norm.scale,
        "moe_gate_norm_eps": moe.gate_norm.eps,
    }  # fmt: skip
    return {
        "intermediate_size": moe.ffn_size,
        "num_experts": [moe.num_experts],
        "num_experts_per_tok": moe.top_k,
        "moe_expert_interval": 1,
        "moe_use_mixtral_gating": True,
        "moe_use_Skywork_gating": True,
        "moe_feature_no_mul_topk": True,
        "moe_2layer_gate": False,
        **norm,
    }


def _read_qwen(fields: Fields, *, shared: bool) -> dict[str, Any]:
    num_layers = fields.integer("num_hidden_layers")
    dense = set(fields.integers("mlp_only_layers"))
    step = fields.integer("decoder_sparse_step", 1)
    layers = tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)
    name = "num_experts" if "num_experts" in fields else "num_local_experts"
    moe = MoESpec(
        num_experts=fields.integer(name),
        top_k=fields.integer("num_experts_per_tok"),
        ffn_size=fields.integer("moe_intermediate_size"),
        norm_topk=fields.flag("norm_topk_prob", False),
        shared_ffn_size=fields.integer("shared_expert_intermediate_size", 5632) if shared else 0,
        **_read_hints(fields),
    )
    ffn_size = fields.integer("intermediate_size", moe.ffn_size)
    return {"ffn_size": ffn_size, "moe": moe, "moe_layers": None if len(layers) == num_layers else layers}


def _write_qwen(spec: ModelSpec) -> dict[str, Any]:
    moe, sparse = _moe(spec), set(spec.moe_layer_ids)
    shared = {"shared_expert_intermediate_size": moe.shared_ffn_size} if moe.shared_ffn_size else {}
    return {
        "intermediate_size": spec.ffn_size,
        "moe_intermediate_size": moe.ffn_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.norm_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(spec.num_layers) if layer not in sparse],
        **shared,
        **_write_hints(moe),
    }


def _read_olmoe(fields: Fields) -> dict[str, Any]:
    ffn_size = fields.integer("intermediate_size")  # of one expert: there are no dense layers
    moe = MoESpec(
        num_experts=fields.integer("num_experts" if "num_experts" in fields else "num_local_experts", 64),
        top_k=fields.integer("num_experts_per_tok", 8),
        ffn_size=ffn_size,
        norm_topk=fields.flag("norm_topk_prob", False),
        **_read_hints(fields, default=0.01),
    )
    return {"ffn_size": ffn_size, "moe": moe}


def _write_olmoe(spec: ModelSpec) -> dict[str, Any]:
    moe = _moe(spec)
    return {
        "intermediate_size": moe.ffn_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.norm_topk,
        **_write_hints(moe),
    }


def _read_skymoe(fields: Fields) -> dict[str, Any]:
    ffn_size = fields.integer("intermediate_size")
    num_experts = fields.integer("num_local_experts", minimum=0)
    if num_experts == 0:
        return {"ffn_size": ffn_size}
    norm = None
    if fields.flag("gate_norm", False):
        norm = GateNormSpec(
            scale=fields.number("gate_norm_scale", 1.0),
            ddof=fields.integer("gate_norm_ddof", 1, minimum=0),
            eps=fields.number("gate_norm_eps", 1e-6),
            subtract_mean=fields.flag("gate_norm_subtract_mean", True),
        )
    moe = MoESpec(
        num_experts=num_experts,
        top_k=fields.integer("num_experts_per_tok"),
        ffn_size=fields.integer("moe_intermediate_size"),
        gate_norm=norm,
        norm_topk=fields.flag("norm_topk_prob", True),
        expert_bias=fields.flag("expert_bias", False),
        shared_ffn_size=fields.integer("shared_expert_intermediate_size", 0, minimum=0),
        **_read_hints(fields),
    )
    layers = fields.integers("moe_layers") if "moe_layers" in fields else None
    return {"ffn_size": ffn_size, "moe": moe, "moe_layers": layers}


def _write_skymoe(spec: ModelSpec) -> dict[str, Any]:
    moe = spec.moe
    if moe is None:
        return {"intermediate_size": spec.ffn_size, "num_local_experts": 0}
    norm = moe.gate_norm or GateNormSpec()
    return {
        "intermediate_size": spec.ffn_size,
        "moe_intermediate_size": moe.ffn_size,
        "num_local_experts": moe.num_experts,  # never a list, and not `num_experts`: serving engines read that first
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.norm_topk,
        "gate_norm": moe.gate_norm is not None,
        "gate_norm_scale": norm.scale,
        "gate_norm_ddof": norm.ddof,
        "gate_norm_eps": norm.eps,
        "gate_norm_subtract_mean": norm.subtract_mean,
        "expert_bias": moe.expert_bias,
        "shared_expert_intermediate_size": moe.shared_ffn_size,
        "moe_layers": None if spec.moe_layers is None else list(spec.moe_layers),
        **_write_hints(moe),
    }


def _read_hints(fields: Fields, default: float = 0.001) -> dict[str, Any]:
    coef = fields.number("router_aux_loss_coef", default)
    return {"aux_loss_coef": coef, "output_router_logits": fields.flag("output_router_logits", False)}


def _write_hints(moe: MoESpec) -> dict[str, Any]:
    return {"router_aux_loss_coef": moe.aux_loss_coef, "output_router_logits": moe.output_router_logits}


def _moe(spec: ModelSpec) -> MoESpec:
    assert spec.moe is not None  # `uncarried` has checked
    return spec.moe
