"""Small random models for the tests of the engine: what a rank's share can be cut out of, each as a directory.

    path = write_model(tmp_path / "m", "qwen3_moe")            one of MODELS, fp32
    path = write_model(tmp_path / "m", "llama", seed=1, dtype="bfloat16", max_position=256)
    narrow = write_fp8(path, tmp_path / "m-fp8", "channel")    by the code of `skymoe quantize`

Odd on purpose: heads, key/value groups, columns and experts that no number of ranks divides. Weights, biases and norms
are large enough that every one of them matters. All but `skymoe` and `skywork_moe` are models of transformers too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from export.models import random_model

from skymoe.model.save import save_pretrained
from skymoe.quantize.config import QuantizeConfig
from skymoe.quantize.run import run as quantize
from skymoe.spec.hf_families import carried
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm, RopeScaling, RopeSpec
from skymoe.spec.quantization import Fp8Scheme


def _spec(architecture: Architecture, **changes: Any) -> ModelSpec:
    options: dict[str, Any] = dict(
        architecture=architecture, vocab_size=97, hidden_size=36, num_layers=3, ffn_size=200, num_heads=9,
        num_kv_heads=3, head_dim=6, max_position=128, init_std=0.3, bos_id=1, eos_ids=(2,),
    )  # fmt: skip
    return ModelSpec(**{**options, **changes})


_SIX = MoESpec(num_experts=6, top_k=2, ffn_size=20)

MODELS: dict[str, ModelSpec] = {
    "llama": _spec(Architecture.LLAMA),
    "llama_bias_tied": _spec(Architecture.LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=True),
    "llama_scaled": _spec(
        Architecture.LLAMA, hidden_size=40, num_heads=10, num_kv_heads=5,
        rope=RopeSpec(theta=500.0, scaling=RopeScaling.YARN, factor=4.0, original_max_position=32),
    ),
    "mistral_window": _spec(Architecture.MISTRAL, num_heads=8, num_kv_heads=2, sliding_window=5),
    "qwen2": _spec(Architecture.QWEN2, num_heads=10, num_kv_heads=5, qkv_bias=True),
    "qwen3": _spec(Architecture.QWEN3, qk_norm=QkNorm.HEAD),
    "olmoe": _spec(
        Architecture.OLMOE, head_dim=4, qk_norm=QkNorm.FULL,
        moe=replace(_SIX, num_experts=7, top_k=3, norm_topk=False),
    ),
    "mixtral": _spec(Architecture.MIXTRAL, moe=_SIX),
    "qwen3_moe": _spec(
        Architecture.QWEN3_MOE, num_heads=10, num_kv_heads=5, qk_norm=QkNorm.HEAD, moe=_SIX, moe_layers=(0, 2)
    ),
    "qwen2_moe": _spec(
        Architecture.QWEN2_MOE, num_heads=3, num_kv_heads=3, head_dim=12, qkv_bias=True,
        moe=replace(_SIX, top_k=3, norm_topk=False, shared_ffn_size=26),
    ),
    "skymoe": _spec(Architecture.SKYMOE, moe=replace(_SIX, gate_norm=GateNormSpec(scale=1.5), expert_bias=True)),
    "skywork_moe": _spec(
        Architecture.SKYWORK_MOE, num_heads=6, num_kv_heads=6,
        moe=MoESpec(num_experts=16, top_k=2, ffn_size=28, gate_norm=GateNormSpec(eps=0.0, subtract_mean=False)),
    ),
}  # fmt: skip
"""By name. 9 heads on 3 or 5 key/value heads, FFN 200, experts of 20 columns; see each."""

_WIDE: dict[str, Any] = dict(hidden_size=128, num_heads=12, num_kv_heads=4, head_dim=64, ffn_size=384, init_std=0.15)
WIDE: dict[str, ModelSpec] = {
    "llama_wide": _spec(Architecture.LLAMA, **{**_WIDE, "num_heads": 16}),
    "mixtral_wide": _spec(Architecture.MIXTRAL, **_WIDE, moe=replace(_SIX, ffn_size=256)),
    "skywork_wide": _spec(
        Architecture.SKYWORK_MOE, **{**_WIDE, "hidden_size": 384, "num_heads": 6, "num_kv_heads": 6},
        moe=replace(_SIX, ffn_size=256, gate_norm=GateNormSpec(eps=0.0, subtract_mean=False)),
    ),
}  # fmt: skip
"""Sides of whole blocks of 128, for FP8 in blocks; heads of 64 channels, so that ranks begin within a block."""


def write_model(path: Path, name: str, *, seed: int = 0, dtype: str | None = None, **changes: Any) -> Path:
    """The model `name` of MODELS or WIDE with random weights as a directory at `path`.

    Args:
        path: to create.
        name: which model.
        seed: of the weights.
        dtype: of the files; fp32 when None.
        changes: to its spec.
    """
    spec = replace((MODELS | WIDE)[name], **changes)
    assert not carried(spec)[1], "it would be saved as another architecture"
    return save_pretrained(random_model(spec, seed), path, dtype=dtype)


def write_fp8(source: Path, out: Path, scheme: Fp8Scheme | str) -> Path:
    """The model at `source` with FP8 weights, as `skymoe quantize` writes it."""
    quantize(QuantizeConfig(source=str(source), out=out, scheme=Fp8Scheme(scheme), receipt_tokens=0))
    return out
