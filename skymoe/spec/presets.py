"""Models known by name: a preset works wherever a model directory does, as far as no weights are needed.

Only shapes whose published parameter counts are reproduced exactly by `flops.count_parameters` are here (tested),
beside the two models of the Skywork papers and the small dense model of the demo.
"""

from __future__ import annotations

import difflib

from skymoe.base.errors import ConfigError
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm, RopeSpec

PRESETS: dict[str, ModelSpec] = {
    # Skywork-MoE report: 52 layers, every one of 16 experts top-2, gate normalization on. 146.36B total, 22.69B active.
    "skywork-moe": ModelSpec(
        architecture=Architecture.SKYWORK_MOE,
        vocab_size=65536,
        hidden_size=4608,
        num_layers=52,
        ffn_size=12288,
        num_heads=36,
        num_kv_heads=36,
        head_dim=128,
        max_position=8192,
        moe=MoESpec(
            num_experts=16, top_k=2, ffn_size=12288, gate_norm=GateNormSpec(eps=0.0, subtract_mean=False)
        ),
        bos_id=1,
        eos_ids=(2,),
    ),
    # The dense parent. The report counts 65536 vocabulary entries, reserved ones included.
    "skywork-13b": ModelSpec(
        architecture=Architecture.SKYWORK,
        vocab_size=65536,
        hidden_size=4608,
        num_layers=52,
        ffn_size=12288,
        num_heads=36,
        num_kv_heads=36,
        head_dim=128,
        max_position=4096,
        bos_id=1,
        eos_ids=(2,),
    ),
    "llama-3-8b": ModelSpec(
        architecture=Architecture.LLAMA,
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        ffn_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=8192,
        norm_eps=1e-5,
        rope=RopeSpec(theta=500000.0),
        bos_id=128000,
        eos_ids=(128001,),
    ),
    "llama-3-70b": ModelSpec(
        architecture=Architecture.LLAMA,
        vocab_size=128256,
        hidden_size=8192,
        num_layers=80,
        ffn_size=28672,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        max_position=8192,
        norm_eps=1e-5,
        rope=RopeSpec(theta=500000.0),
        bos_id=128000,
        eos_ids=(128001,),
    ),
    "mistral-7b": ModelSpec(
        architecture=Architecture.MISTRAL,
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        ffn_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=32768,
        norm_eps=1e-5,
        sliding_window=4096,
        bos_id=1,
        eos_ids=(2,),
    ),
    "mixtral-8x7b": ModelSpec(
        architecture=Architecture.MIXTRAL,
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        ffn_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=32768,
        norm_eps=1e-5,
        rope=RopeSpec(theta=1e6),
        moe=MoESpec(num_experts=8, top_k=2, ffn_size=14336),
        bos_id=1,
        eos_ids=(2,),
    ),
    "qwen2.5-7b": ModelSpec(
        architecture=Architecture.QWEN2,
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        ffn_size=18944,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        max_position=131072,
        rope=RopeSpec(theta=1e6),
        qkv_bias=True,
        bos_id=151643,
        eos_ids=(151643,),
    ),
    "qwen3-8b": ModelSpec(
        architecture=Architecture.QWEN3,
        vocab_size=151936,
        hidden_size=4096,
        num_layers=36,
        ffn_size=12288,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=40960,
        rope=RopeSpec(theta=1e6),
        qk_norm=QkNorm.HEAD,
        bos_id=151643,
        eos_ids=(151645,),
    ),
    "qwen3-30b-a3b": ModelSpec(
        architecture=Architecture.QWEN3_MOE,
        vocab_size=151936,
        hidden_size=2048,
        num_layers=48,
        ffn_size=6144,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        max_position=40960,
        rope=RopeSpec(theta=1e6),
        qk_norm=QkNorm.HEAD,
        moe=MoESpec(num_experts=128, top_k=8, ffn_size=768),
        bos_id=151643,
        eos_ids=(151645,),
    ),
    "olmoe-1b-7b": ModelSpec(
        architecture=Architecture.OLMOE,
        vocab_size=50304,
        hidden_size=2048,
        num_layers=16,
        ffn_size=1024,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        max_position=4096,
        norm_eps=1e-5,
        qk_norm=QkNorm.FULL,
        moe=MoESpec(num_experts=64, top_k=8, ffn_size=1024, norm_topk=False, aux_loss_coef=0.01),
        eos_ids=(50279,),
        pad_id=1,
    ),
    # The dense parent of `skymoe demo`: small enough that a few hundred steps teach it something on two cores.
    "demo-dense": ModelSpec(
        architecture=Architecture.LLAMA,
        vocab_size=2048,
        hidden_size=128,
        num_layers=4,
        ffn_size=384,
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        max_position=1024,
        tie_embeddings=True,
        bos_id=0,
        eos_ids=(0,),
    ),
}  # fmt: skip


def preset(name: str) -> ModelSpec:
    """The preset `name`.

    Raises:
        ConfigError: no such preset; the message lists those there are.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"{near[0]}?" if near else f"one of {', '.join(PRESETS)}"
        raise ConfigError(f"there is no preset {name!r}", hint=hint)
    return PRESETS[name]
