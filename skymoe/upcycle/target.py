"""What the upcycled model is: its spec, its architecture on disk, and whether it is exactly the dense model. No torch.

Of a dense parent y = F(x), the copy computes y = sum over the chosen experts of w_i F(x). That is F(x) exactly when
the combine weights sum to 1, whatever the router says; `exactness` is that table (docs/upcycling.md) as code.
"""

from __future__ import annotations

from dataclasses import replace

from skymoe.base.errors import ConfigError
from skymoe.convert.exactness import Exactness
from skymoe.spec.hf_families import uncarried
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec
from skymoe.upcycle.config import Method, TargetFormat, UpcycleConfig

SHARED_FFN_SIZE = 128  # of the shared expert that qwen2_moe insists on; its output is zero

_LLAMA_SHAPED = (Architecture.LLAMA, Architecture.MISTRAL, Architecture.SKYWORK)
_NATIVE = {
    Architecture.LLAMA: Architecture.MIXTRAL,
    Architecture.MISTRAL: Architecture.MIXTRAL,
    Architecture.SKYWORK: Architecture.MIXTRAL,
    Architecture.QWEN2: Architecture.QWEN2_MOE,
    Architecture.QWEN3: Architecture.QWEN3_MOE,
    Architecture.SKYMOE: Architecture.SKYMOE,
}


def target_spec(dense: ModelSpec, config: UpcycleConfig) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec of the output, and remarks for the user.

    Raises:
        ConfigError: the source is a mixture of experts already, or cannot be upcycled as asked.
    """
    _refuse(dense, config)
    norm = None
    if config.gate_norm:
        norm = GateNormSpec(scale=config.gate_scale, ddof=config.gate_ddof, eps=config.gate_eps)
    moe = MoESpec(num_experts=config.experts, top_k=config.top_k, ffn_size=dense.ffn_size, gate_norm=norm)
    wide = replace(dense, architecture=Architecture.SKYMOE, moe=moe, moe_layers=_layers(dense, config))
    if config.format is TargetFormat.SKYMOE:
        return wide, _remarks(wide)
    if config.format is TargetFormat.SKYWORK:
        return _skywork(dense, wide), _remarks(wide)
    native = _NATIVE[dense.architecture]
    if native is Architecture.MIXTRAL and wide.num_dense_layers:
        native = Architecture.QWEN2_MOE  # the only native class with dense layers in between and no q/k norm
    if native is Architecture.QWEN2_MOE:
        moe = replace(moe, shared_ffn_size=SHARED_FFN_SIZE)
    narrow = replace(wide, architecture=native, moe=moe)
    reasons = uncarried(narrow)
    if not reasons:
        return narrow, _remarks(narrow)
    why = f"written as skymoe, transformers needs trust_remote_code: {'; '.join(reasons)}"
    return wide, (why, *_remarks(wide))


def exactness(moe: MoESpec, method: Method) -> Exactness:
    """The table of research: when is the upcycled model the dense one at step 0?"""
    assert method is Method.COPY
    always = "every expert is the dense feed-forward, and the combine weights sum to 1, whatever the router chooses"
    if moe.norm_topk:
        return Exactness(True, always)
    if moe.top_k == moe.num_experts:
        return Exactness(True, "every expert is the dense feed-forward, and all are used: the softmax sums to 1")
    why = "the chosen probabilities are not renormalized: a token's output is scaled by their sum, which is below 1"
    return Exactness(False, why)


def _refuse(dense: ModelSpec, config: UpcycleConfig) -> None:
    if config.source.resolve() == config.out.resolve():
        raise ConfigError("the output is the source", where=config.out, hint="choose another directory")
    if dense.moe is not None:
        raise ConfigError(
            f"this model is already a mixture of experts ({dense.architecture})",
            where=config.source,
            why="upcycling starts from a dense model; growing the number of experts is not implemented",
            hint="give the dense parent, or train this model as it is: skymoe train",
        )
    if dense.mlp_bias:
        raise ConfigError(
            "the feed-forward layers have biases (mlp_bias)",
            where=config.source,
            why="experts have no biases in any format that other tools read",
        )
    if config.layers is not None and config.layers[-1] >= dense.num_layers:
        what = f"layers names layer {config.layers[-1]}, the model has {dense.num_layers}"
        raise ConfigError(what, where=config.source)


def _layers(dense: ModelSpec, config: UpcycleConfig) -> tuple[int, ...] | None:
    return None if config.layers is None or len(config.layers) == dense.num_layers else config.layers


def _skywork(dense: ModelSpec, wide: ModelSpec) -> ModelSpec:
    spec = replace(wide, architecture=Architecture.SKYWORK_MOE)
    reasons = list(uncarried(spec))
    if dense.architecture not in _LLAMA_SHAPED:
        reasons.insert(0, f"{dense.architecture} is not Llama-shaped")
    if reasons:
        what, hint = "the skywork format cannot carry this model", "--set format=skymoe"
        raise ConfigError(what, why="; ".join(reasons), hint=hint)
    return spec


def _remarks(spec: ModelSpec) -> tuple[str, ...]:
    assert spec.moe is not None
    remarks = []
    if spec.moe.top_k == 1:
        remarks.append("top_k 1 with renormalization: the router gets no gradient from the language loss, ever")
    if spec.moe.num_experts & (spec.moe.num_experts - 1):
        remarks.append(f"{spec.moe.num_experts} experts: some tools want a power of two")
    if spec.architecture is Architecture.SKYWORK_MOE and spec.moe.gate_norm:
        remarks.append("the released Skywork vLLM fork drops gate normalization on its main path")
    return tuple(remarks)
