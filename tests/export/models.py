"""Random models of architectures that transformers cannot make, and the usual request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from skymoe.base.config import check_config
from skymoe.export.config import ExportConfig
from skymoe.model.init import initialize
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec

TOKENS = torch.arange(2 * 19).view(2, 19) * 5 % 83

NORMED = ModelSpec(
    architecture=Architecture.SKYMOE, vocab_size=97, hidden_size=36, num_layers=3, ffn_size=44, num_heads=6,
    num_kv_heads=2, head_dim=6, max_position=64, init_std=0.3,
    moe=MoESpec(num_experts=6, top_k=2, ffn_size=20, gate_norm=GateNormSpec(scale=1.5)),
)  # fmt: skip


def request(source: Path, out: Path, format_: str, **options: Any) -> ExportConfig:
    return check_config(ExportConfig, {"source": str(source), "out": str(out), "format": format_, **options})


def with_moe(spec: ModelSpec, **changes: Any) -> ModelSpec:
    assert spec.moe is not None
    return replace(spec, moe=replace(spec.moe, **changes))


def random_model(spec: ModelSpec, seed: int = 0) -> Transformer:
    """Weights, biases and norms that all matter."""
    model = initialize(Transformer(spec), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
    return model


def random_directory(path: Path, spec: ModelSpec, **zeroed: str) -> Path:
    """`spec` with random weights at `path`; parameters whose names end in one of `zeroed` are zero."""
    model = random_model(spec)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(tuple(zeroed.values())) and zeroed:
                tensor.zero_()
    return save_pretrained(model, path)
