"""Every family with every method that promises exactness: the receipt agrees, and so does transformers."""

from __future__ import annotations

import pytest
import torch

from skymoe.model.load import load
from skymoe.spec.hf import spec_from_directory
from skymoe.upcycle.run import run
from tests.upcycle.conftest import DENSE, TOKENS, config_of

EXACT = {
    "copy": {"experts": 5, "top_k": 2},
    "copy, top-1": {"experts": 4, "top_k": 1},
    "copy, top-4 of 6": {"experts": 6, "top_k": 4, "router_init": "uniform"},
    "copy, gate norm": {"experts": 5, "top_k": 3, "gate_norm": True, "gate_scale": 2.0},
    "copy, all, not renormalized": {"experts": 3, "top_k": 3, "norm_topk": False},
    "copy, some layers": {"experts": 4, "layer_interval": 2},
    "virtual groups": {"method": "virtual_group", "granularity": 4, "expansion": 3, "top_k": 4},
    "virtual groups, two": {"method": "virtual_group", "granularity": 2, "expansion": 3, "top_k": 4, "layers": [1]},
    "virtual groups, gate norm": {"method": "virtual_group", "granularity": 8, "expansion": 2, "gate_norm": True},
    "virtual groups, all, not renormalized": {
        "method": "virtual_group",
        "granularity": 2,
        "expansion": 2,
        "top_k": 4,
        "norm_topk": False,
    },
    "shared, zero routed": {"shared": "zero_routed", "experts": 4, "norm_topk": False, "last_layers": 2},
    "shared, zero routed drop": {"shared": "zero_routed", "experts": 4, "method": "drop"},
    "shared, split": {
        "method": "virtual_group",
        "granularity": 8,
        "expansion": 2,
        "shared": "split",
        "shared_shards": 5,
    },
}
FIVE = {  # shards of widths that transformers' grouped matmul takes: multiples of 16 bytes
    "virtual groups of 5": {"method": "virtual_group", "granularity": 5, "expansion": 3, "top_k": 10},
    "split of 5": {"method": "virtual_group", "granularity": 5, "expansion": 2, "shared": "split", "shared_shards": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_are_exact(family, method, parents, oracle, tmp_path):
    report = run(config_of(parents(family), tmp_path / "moe", receipt_tokens=24, **EXACT[method]))
    assert report.exact, report.reason
    assert report.max_abs_dlogit < 1e-4
    assert report.kl < 1e-9


@pytest.mark.parametrize(
    ("family", "method", "architecture"),
    [
        ("llama", "copy", "mixtral"),
        ("llama3", "copy, some layers", "qwen2_moe"),
        ("llama3", "split of 5", "qwen2_moe"),
        ("mistral", "virtual groups of 5", "mixtral"),
        ("mistral", "copy, gate norm", "skymoe"),
        ("qwen2", "virtual groups, two", "qwen2_moe"),
        ("qwen2", "shared, zero routed", "qwen2_moe"),
        ("qwen2", "copy, all, not renormalized", "qwen2_moe"),
        ("qwen3", "copy", "qwen3_moe"),
        ("qwen3", "virtual groups, all, not renormalized", "qwen3_moe"),
        ("qwen3", "shared, split", "skymoe"),
        ("skywork", "copy", "mixtral"),
        ("skywork", "copy, all, not renormalized", "qwen2_moe"),
    ],
)
def test_transformers_loads_the_native_format_and_agrees(family, method, architecture, parents, oracle, tmp_path):
    report = run(config_of(parents(family), tmp_path / "moe", receipt_tokens=0, **{**EXACT, **FIVE}[method]))
    assert report.architecture == architecture
    trust = {"trust_remote_code": True} if architecture == "skymoe" else {}
    with torch.no_grad():
        dense = load(parents(family))(TOKENS)
    theirs = oracle.logits(tmp_path / "moe", TOKENS, **trust)
    torch.testing.assert_close(theirs, dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "skywork_moe", "skymoe", "skymoe_biased"]
)
def test_clones_are_exact_when_top_k_grows_with_them(family, factor, parents, tmp_path):
    old = spec_from_directory(parents(family))
    report = run(
        config_of(
            parents(family),
            tmp_path / "moe",
            method="duplicate",
            experts=factor * old.moe.num_experts,
            receipt_tokens=24,
        )
    )
    assert report.exact, report.reason
    assert report.max_abs_dlogit < 1e-4
    new = spec_from_directory(tmp_path / "moe")
    assert (new.architecture, new.moe_layers, new.moe.top_k) == (
        old.architecture,
        old.moe_layers,
        factor * old.moe.top_k,
    )
    assert report.kl < 1e-9


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_transformers_agrees_on_clones(family, parents, oracle, tmp_path):
    run(config_of(parents(family), tmp_path / "moe", method="duplicate", receipt_tokens=0))
    theirs = oracle.logits(tmp_path / "moe", TOKENS)
    torch.testing.assert_close(theirs, oracle.logits(parents(family), TOKENS), rtol=0, atol=1e-4)
