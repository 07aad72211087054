"""Which model directories llama.cpp turns into a GGUF that computes the same. No torch.

llama.cpp's `convert_hf_to_gguf.py` reads the directory of a class of transformers, and its programs then compute what
they have built in for that class, not what config.json says: Qwen2-MoE and OLMoE are never renormalized, Mixtral and
Qwen3-MoE always, whatever `norm_topk_prob`. Some differences stop the conversion or the loading with an error, others
are silent. Read in llama.cpp of October 2026 (commit 0c1e570): `conversion/{base,llama,qwen,olmo}.py` and
`src/models/{llama,qwen2moe,qwen3moe,olmoe}.cpp`.
"""

from __future__ import annotations

from skymoe.spec.model import Architecture, ModelSpec, RopeScaling

# Whether llama.cpp renormalizes the chosen probabilities of each class that it reads.
_RENORMALIZES = {
    Architecture.MIXTRAL: True,
    Architecture.QWEN2_MOE: False,
    Architecture.QWEN3_MOE: True,
    Architecture.OLMOE: False,
}
_LLAMA3_CONTEXT = 8192  # what the converter takes for the original context; it looks for it in another place than ours
_OLMOE_EPS = 1e-5


def gguf_misreads(spec: ModelSpec) -> tuple[str, ...]:
    """Why the GGUF of a directory of `spec` would not compute `spec`; empty when it would."""
    if spec.architecture not in _RENORMALIZES or spec.moe is None:
        return (f"llama.cpp's converter does not know {spec.architecture} mixtures of experts",)
    return (*_ffn(spec), *_attention(spec), *_rope(spec))


def _ffn(spec: ModelSpec) -> list[str]:
    arch, moe = spec.architecture, spec.moe
    assert moe is not None
    renormalizes = _RENORMALIZES[arch]
    never = "always" if renormalizes else "never"
    checks = [
        (moe.norm_topk != renormalizes and moe.top_k < moe.num_experts, f"llama.cpp {never} renormalizes {arch}"),
        (spec.num_dense_layers > 0, f"llama.cpp has no dense layers in {arch}"),
    ]
    return [reason for applies, reason in checks if applies]


def _attention(spec: ModelSpec) -> list[str]:
    arch, has = spec.architecture, Architecture
    square = arch in (has.QWEN2_MOE, has.OLMOE)  # written before heads could have a width of their own
    olmoe = arch is has.OLMOE
    checks = [
        (spec.sliding_window is not None, f"llama.cpp has no sliding window in {arch}"),
        (square and spec.tie_embeddings, f"llama.cpp wants a head of its own in {arch}"),
        (square and spec.num_heads * spec.head_dim != spec.hidden_size, f"llama.cpp has no head_dim in {arch}"),
        (spec.o_bias, f"llama.cpp has no output-projection bias in {arch}"),
        (olmoe and spec.num_kv_heads != spec.num_heads, "llama.cpp has no grouped queries in olmoe"),
        (olmoe and spec.norm_eps != _OLMOE_EPS, f"llama.cpp takes {_OLMOE_EPS:g} for olmoe's rms_norm_eps"),
    ]
    return [reason for applies, reason in checks if applies]


def _rope(spec: ModelSpec) -> list[str]:
    rope, arch = spec.rope, spec.architecture
    match rope.scaling:
        case RopeScaling.DYNAMIC:
            return ["llama.cpp has no dynamic rotary scaling"]
        case RopeScaling.LLAMA3 if arch is not Architecture.MIXTRAL:
            return [f"llama.cpp drops the rotary scaling llama3 of {arch}"]
        case RopeScaling.LLAMA3 if (rope.original_max_position or spec.max_position) != _LLAMA3_CONTEXT:
            return [f"llama.cpp takes {_LLAMA3_CONTEXT} for the original context of the rotary scaling llama3"]
        case RopeScaling.YARN if rope.mscale or not rope.truncate:
            return ["llama.cpp has its own form of this variant of yarn"]
    return []
