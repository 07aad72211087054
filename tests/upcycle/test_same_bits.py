"""The same command gives the same bytes on any machine: hashes of whole outputs, made once and kept.

The parent is made of `ops.reproducible` too, so that nothing here depends on torch's random numbers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.ops.reproducible import normal
from skymoe.spec.model import Architecture, ModelSpec
from skymoe.upcycle.run import run
from tests.upcycle.conftest import config_of

GOLDEN = {
    "drop": "0a0b35e0e930091f5f6f31643cf7d4d547d4531d88d50baa397b7b760a8e0585",
    "noise": "5980a60b9fb4f144454bd1514b2768e2b5056f5be7dc85905cf13358ca653019",
    "virtual_group": "a34b038b8bd1ffca6f9eb1921c9b4dfc19d665e5bf40ec6fced30f87c37c0be9",
    "partition": "5ad2b404ab77a00cb4221a7198af86059deb1a2b1afd9053c0501af92beb8336",
    "specialists": "7a3341afda4fe453654e89b91cf694aab6a56aa0d1e5e314129de0d0da0de0c8",
}
OPTIONS = {
    "drop": {"method": "drop", "experts": 3, "ratio": 0.4, "seed": 11},
    "noise": {"method": "noise", "experts": 3, "drop_indices": "per_matrix", "seed": 11},
    "virtual_group": {
        "method": "virtual_group", "granularity": 3, "expansion": 2, "weight_scale": "he2024", "router_init": "uniform",
    },
    "partition": {"method": "partition", "experts": 3, "seed": 2},
    "specialists": {"method": "specialists", "experts": 3, "rest": "average"},
}  # fmt: skip


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two bf16 models of one shape."""
    spec = ModelSpec(
        architecture=Architecture.LLAMA, vocab_size=31, hidden_size=20, num_layers=2, ffn_size=54, num_heads=2,
        num_kv_heads=1, head_dim=10,
    )  # fmt: skip
    paths = []
    for number in range(2):
        model = Transformer(spec)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(normal(tuple(parameter.shape), 0.1, f"{number}/{name}"))
        paths.append(save_pretrained(model, tmp_path_factory.mktemp("fixed") / f"m{number}", dtype="bfloat16"))
    return paths


@pytest.mark.parametrize("method", GOLDEN)
def test_the_weights_are_those_that_were_made_before(method, fixed, tmp_path):
    sources = fixed if method == "specialists" else fixed[0]
    run(config_of(sources, tmp_path / "moe", receipt_tokens=0, **OPTIONS[method]))
    assert hashlib.sha256((tmp_path / "moe" / "model.safetensors").read_bytes()).hexdigest() == GOLDEN[method]
