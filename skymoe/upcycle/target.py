"""What the upcycled model is on disk: the spec of the output, the architecture that carries it, remarks. No torch."""

from __future__ import annotations

import math
from dataclasses import replace

from skymoe.base.errors import ConfigError
from skymoe.convert.forms import ZERO_SHARED_FFN_SIZE
from skymoe.spec.hf_families import uncarried
from skymoe.spec.model import Architecture, ModelSpec
from skymoe.upcycle.blueprint import Blueprint
from skymoe.upcycle.config import Method, Shared, TargetFormat

_LLAMA_SHAPED = (Architecture.LLAMA, Architecture.MISTRAL, Architecture.SKYWORK)
_NATIVE = {  # best first
    Architecture.LLAMA: (Architecture.MIXTRAL, Architecture.QWEN2_MOE),
    Architecture.MISTRAL: (Architecture.MIXTRAL, Architecture.QWEN2_MOE),
    Architecture.SKYWORK: (Architecture.MIXTRAL, Architecture.QWEN2_MOE),
    Architecture.QWEN2: (Architecture.QWEN2_MOE,),
    Architecture.QWEN3: (Architecture.QWEN3_MOE,),
}
_ASKED = {
    TargetFormat.MIXTRAL: Architecture.MIXTRAL,
    TargetFormat.QWEN2_MOE: Architecture.QWEN2_MOE,
    TargetFormat.QWEN3_MOE: Architecture.QWEN3_MOE,
    TargetFormat.SKYMOE: Architecture.SKYMOE,
    TargetFormat.SKYWORK: Architecture.SKYWORK_MOE,
}


def target_spec(base: ModelSpec, blueprint: Blueprint, wanted: TargetFormat) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec of the output, and remarks for the user.

    Raises:
        ConfigError: the wanted format cannot carry it.
    """
    wide = replace(base, architecture=Architecture.SKYMOE, moe=blueprint.moe, moe_layers=blueprint.layers)
    if wanted is not TargetFormat.AUTO:
        spec = _as(wide, _ASKED[wanted])
        reasons = list(uncarried(spec))
        if (
            spec.architecture is Architecture.SKYWORK_MOE
            and base.moe is None
            and base.architecture not in _LLAMA_SHAPED
        ):
            reasons.insert(0, f"{base.architecture} is not Llama-shaped")
        if reasons:
            what = f"the {wanted} format cannot carry this model"
            raise ConfigError(what, why="; ".join(reasons), hint="--set format=skymoe")
        return spec, _remarks(spec, blueprint)
    own = (base.architecture,) if base.moe else ()
    first_reasons: tuple[str, ...] = ()
    for architecture in _NATIVE.get(base.architecture, own):
        spec = _as(wide, architecture)
        reasons_now = uncarried(spec)
        if not reasons_now:
            return spec, _remarks(spec, blueprint)
        first_reasons = first_reasons or reasons_now
    why = (
        [f"written as skymoe, transformers needs trust_remote_code: {'; '.join(first_reasons)}"]
        if first_reasons
        else []
    )
    return wide, (*why, *_remarks(wide, blueprint))


def _as(wide: ModelSpec, architecture: Architecture) -> ModelSpec:
    """`wide` under `architecture`; Qwen2-MoE gets the shared expert that it cannot do without."""
    moe = wide.moe
    assert moe is not None
    if architecture is Architecture.QWEN2_MOE and not moe.shared_ffn_size:
        moe = replace(moe, shared_ffn_size=ZERO_SHARED_FFN_SIZE)
    return replace(wide, architecture=architecture, moe=moe)


def _remarks(spec: ModelSpec, blueprint: Blueprint) -> tuple[str, ...]:
    moe = blueprint.moe
    remarks = []
    if moe.top_k == 1 and moe.norm_topk:
        remarks.append("top_k 1 with renormalization: the router gets no gradient from the language loss, ever")
    if moe.num_experts & (moe.num_experts - 1):
        remarks.append(f"{moe.num_experts} experts: some tools want a power of two")
    if spec.architecture is Architecture.SKYWORK_MOE and moe.gate_norm:
        remarks.append("the released Skywork vLLM fork drops gate normalization on its main path")
    if blueprint.method is Method.DUPLICATE and not blueprint.router_noise:
        remarks.append(
            "clones with equal router rows get equal tokens and equal gradients, and would stay equal in training: "
            "--set router_noise=0.01 tells them apart, at the price of exactness"
        )
    if blueprint.method is Method.VIRTUAL_GROUP and moe.top_k % blueprint.shards:
        whole = math.ceil(moe.top_k / blueprint.shards) * blueprint.shards
        remarks.append(f"top_k {moe.top_k} cuts groups of {blueprint.shards} shards: --top-k {whole} takes whole ones")
    if blueprint.method is Method.PARTITION and blueprint.shared is Shared.NONE:
        remarks.append("a partition starts with a fraction of the dense model: it needs long training to recover")
    return tuple(remarks)
