"""Parents of every family, made once: transformers' where it has them, ours where it has not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from skymoe.base.config import check_config
from skymoe.model.init import initialize
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec
from skymoe.upcycle.config import UpcycleConfig

TOKENS = torch.arange(2 * 19).view(2, 19) * 5 % 83

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
DENSE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "skywork": ("llama", {}),
}
MIXTURES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", {}),
    "olmoe": ("olmoe", {}),
}


def config_of(sources: Path | list[Path], out: Path, **options: Any) -> UpcycleConfig:
    paths = [sources] if isinstance(sources, Path) else sources
    return check_config(UpcycleConfig, {"sources": [str(path) for path in paths], "out": str(out), **options})


def edit_config(path: Path, **changes: Any) -> None:
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**data, **changes}))


def own_mixture(path: Path, architecture: Architecture, moe: MoESpec) -> Path:
    """A mixture that transformers has no class for: gate normalization, expert bias."""
    spec = ModelSpec(
        architecture=architecture, vocab_size=97, hidden_size=40, num_layers=3, ffn_size=56, num_heads=4,
        num_kv_heads=4, head_dim=10, max_position=64, init_std=0.1, moe=moe,
        moe_layers=(0, 2) if architecture is Architecture.SKYMOE else None,
    )  # fmt: skip
    model = initialize(Transformer(spec), 5)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("expert_bias"):
                tensor.copy_(torch.linspace(-0.2, 0.2, moe.num_experts))
            elif "router" in name:
                tensor *= 5
    return save_pretrained(model, path)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of a tiny conversion is waiting for the disk; power cuts are tested elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def parents(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of a family -> a directory that no test changes."""
    root = tmp_path_factory.mktemp("parents")

    def parent(name: str) -> Path:
        path = root / name
        if path.exists():
            return path
        if name == "skywork_moe":  # the released form: lambda 1, unbiased deviation, no epsilon
            norm = GateNormSpec(scale=1.0, ddof=1, eps=0.0, subtract_mean=False)
            return own_mixture(
                path, Architecture.SKYWORK_MOE, MoESpec(num_experts=5, top_k=2, ffn_size=24, gate_norm=norm)
            )
        if name == "skymoe":
            norm = GateNormSpec(scale=1.7, ddof=1, eps=1e-2)
            moe = MoESpec(num_experts=6, top_k=2, ffn_size=24, gate_norm=norm, expert_bias=True, shared_ffn_size=16)
            return own_mixture(path, Architecture.SKYMOE, moe)
        if name == "skymoe_biased":  # the bias is added to probabilities, which shrink when experts are cloned
            moe = MoESpec(num_experts=5, top_k=2, ffn_size=24, expert_bias=True, norm_topk=False)
            return own_mixture(path, Architecture.SKYMOE, moe)
        model_type, changes = {**DENSE, **MIXTURES}[name]
        oracle.make(path, model_type, **changes)
        if name == "skywork":
            edit_config(path, model_type="skywork", architectures=["SkyworkForCausalLM"])
        return path

    return parent
