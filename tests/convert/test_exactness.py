"""What export_targets says is what `skymoe export` does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skymoe.base.errors import ConfigError
from skymoe.convert.exactness import export_targets
from skymoe.convert.forms import Unused
from skymoe.export.config import Format
from skymoe.export.target import target_form
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm, RopeScaling, RopeSpec

MOE = MoESpec(num_experts=8, top_k=2, ffn_size=64)
LLAMA = ModelSpec(
    architecture=Architecture.SKYMOE,
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    ffn_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    moe=MOE,
)


def told(spec, format_):
    return next(target for target in export_targets(spec) if target.format == format_)


def verdicts(spec):
    names = {(True, True): "exact", (True, False): "fold", (False, False): "no"}
    return {target.format: names[target.carries, target.exact] for target in export_targets(spec)}


def test_the_portable_copy_of_a_llama():
    assert verdicts(LLAMA) == {
        "mixtral": "exact", "qwen2_moe": "exact", "qwen3_moe": "no", "olmoe": "no", "skywork": "exact",
        "skymoe": "exact", "gguf": "exact",
    }  # fmt: skip
    assert "adds exactly 0" in told(LLAMA, "qwen2_moe").reason
    assert "mixtral" in told(LLAMA, "gguf").reason


def test_with_gate_normalization():
    spec = replace(LLAMA, moe=replace(MOE, gate_norm=GateNormSpec()))
    assert verdicts(spec) == {
        "mixtral": "fold", "qwen2_moe": "fold", "qwen3_moe": "no", "olmoe": "no", "skywork": "exact",
        "skymoe": "exact", "gguf": "fold",
    }  # fmt: skip
    assert "--fold-gate-norm" in told(spec, "mixtral").reason
    assert "--fold-gate-norm" in told(spec, "gguf").reason


def test_families_with_biases_norms_and_dense_layers():
    qwen2 = replace(LLAMA, qkv_bias=True)
    assert {name for name, verdict in verdicts(qwen2).items() if verdict == "exact"} == {"qwen2_moe", "skymoe"}
    assert told(qwen2, "gguf").reason == "llama.cpp never renormalizes qwen2_moe"
    qwen3 = replace(LLAMA, qk_norm=QkNorm.HEAD)
    assert {name for name, verdict in verdicts(qwen3).items() if verdict == "exact"} == {"qwen3_moe", "skymoe", "gguf"}
    mixed = replace(LLAMA, moe_layers=(1,))
    assert {name for name, verdict in verdicts(mixed).items() if verdict == "exact"} == {"qwen2_moe", "skymoe"}
    assert "every layer" in told(mixed, "mixtral").reason


def test_what_llama_cpp_cannot_read():
    spec = replace(LLAMA, rope=RopeSpec(scaling=RopeScaling.DYNAMIC, factor=2.0))
    assert (verdicts(spec)["mixtral"], verdicts(spec)["gguf"]) == ("exact", "no")
    only_ours = replace(LLAMA, moe=replace(MOE, expert_bias=True))
    assert {name for name, verdict in verdicts(only_ours).items() if verdict != "no"} == {"skymoe"}


def test_a_dense_model_has_no_targets():
    assert export_targets(replace(LLAMA, moe=None)) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True},
        {"qkv_bias": True, "o_bias": True, "qk_norm": QkNorm.HEAD},
        {"moe_layers": (0,)},
        {"sliding_window": 4},
        {"moe": replace(MOE, top_k=8, norm_topk=False)},
        {"moe": replace(MOE, norm_topk=False)},
        {"moe": replace(MOE, shared_ffn_size=16)},
        {"moe": replace(MOE, gate_norm=GateNormSpec(ddof=0))},
        {"moe": replace(MOE, gate_norm=GateNormSpec(), top_k=1)},
    ],
)
def test_export_agrees(changes):
    spec = replace(LLAMA, **changes)
    for format_ in Format:
        target = told(spec, format_.value)
        for fold in (False, True):
            try:
                form = target_form(spec, format_, Unused(), fold=fold)
                done = "approximate" if form.folded else "exact"
            except ConfigError:
                done = "refused"
            if not fold:
                assert (done == "exact") == target.exact, target
            elif not target.exact:
                assert (done == "approximate") == target.carries, target
