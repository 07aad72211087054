"""The modelling files beside the weights: transformers computes, generates, saves and loads what we do.

transformers is the reader here: every load is strict (the `oracle` refuses missing, unexpected and new keys).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from skymoe.model.load import load
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm, RopeScaling, RopeSpec

TOKENS = torch.arange(2 * 23).view(2, 23) * 7 % 83
MOE = MoESpec(num_experts=5, top_k=2, ffn_size=28, gate_norm=GateNormSpec())
SKYMOE = ModelSpec(
    architecture=Architecture.SKYMOE, vocab_size=97, hidden_size=36, num_layers=3, ffn_size=50, num_heads=6,
    num_kv_heads=2, head_dim=10, max_position=64, init_std=0.2, eos_ids=(0,), moe=MOE,
)  # fmt: skip
VARIANTS = {
    "gate-norm": SKYMOE,
    "paper-2": replace(SKYMOE, moe=replace(MOE, top_k=3, gate_norm=GateNormSpec(scale=2.0, ddof=0, eps=0.0))),
    "released": replace(SKYMOE, moe=replace(MOE, gate_norm=GateNormSpec(eps=0.0, subtract_mean=False))),
    "everything": replace(
        SKYMOE,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=QkNorm.HEAD,
        tie_embeddings=True,
        sliding_window=5,
        sliding_layers=(0, 2),
        rope=RopeSpec(theta=500.0, scaling=RopeScaling.LLAMA3, factor=4.0, original_max_position=16),
        moe=replace(MOE, expert_bias=True, norm_topk=False, shared_ffn_size=12),
        moe_layers=(0, 2),
    ),
    "full-norm": replace(SKYMOE, qk_norm=QkNorm.FULL, qkv_bias=True, moe=replace(MOE, norm_topk=False)),
    "no-norm": replace(SKYMOE, moe=replace(MOE, gate_norm=None, expert_bias=True), sliding_window=7),
    "dense": replace(SKYMOE, moe=None, qkv_bias=True),
}
# The dense families as they come, odd ones too, and OLMoE: whatever their attention is, it goes into the skymoe files.
PARENTS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 900.0}},
    "skywork": {},
    "olmoe": {},
}


def build(make, spec: ModelSpec) -> Transformer:
    model = make(**vars(spec))
    for buffer in model.buffers():  # expert biases
        buffer.copy_(torch.linspace(-0.2, 0.3, len(buffer)))
    return model


def gate_normalized(family: str, oracle, tmp_path) -> ModelSpec:
    """The spec of a parent of `family` with normalized gates; new experts where it has none."""
    changes = PARENTS[family]
    spec = spec_from_directory(oracle.make(tmp_path / "parent", family.replace("skywork", "llama"), **changes))
    moe = replace(spec.moe, gate_norm=GateNormSpec()) if spec.moe else MOE
    return replace(spec, architecture=Architecture.SKYMOE, moe=moe, init_std=0.2)


def greedy(model: Transformer, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """What `generate` should give, by whole forward passes."""
    with torch.no_grad():
        for _ in range(steps):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_computes_the_same_from_the_files_beside_the_weights(name, make, oracle, tmp_path):
    model = build(make, VARIANTS[name])
    out = save_pretrained(model, tmp_path / name.replace("-", "_"))
    with torch.no_grad():
        expected = model(TOKENS)
        torch.testing.assert_close(load(out)(TOKENS), expected, rtol=0, atol=0)
    theirs = oracle.logits(out, TOKENS, trust_remote_code=True)
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", PARENTS)
def test_every_family_survives_transformers(family, make, oracle, tmp_path):
    """Logits, generation with the cache, and a round trip through transformers' own save_pretrained."""
    from transformers import AutoModelForCausalLM

    spec = gate_normalized(family, oracle, tmp_path)
    model = build(make, spec)
    out = save_pretrained(model, tmp_path / "out")
    with torch.no_grad():
        expected = model(TOKENS)
    torch.testing.assert_close(oracle.logits(out, TOKENS, trust_remote_code=True), expected, rtol=0, atol=1e-4)

    hf = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    prompt = TOKENS[:, :9]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    generated = hf.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(generated, greedy(model, prompt, 8))

    hf.save_pretrained(tmp_path / "again")
    assert spec_from_directory(tmp_path / "again") == spec
    before, after = load_file(out / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()  # the names of the hub, and no buffer of the router
    torch.testing.assert_close(load(tmp_path / "again")(TOKENS), expected, rtol=0, atol=0)
    again = oracle.logits(tmp_path / "again", TOKENS, trust_remote_code=True)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["everything", "full-norm"])
def test_transformers_generates_with_its_cache(name, make, oracle, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(make, VARIANTS[name])
    out = save_pretrained(model, tmp_path / "m")
    hf = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    prompt = TOKENS[:1, :9]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    generated = hf.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(generated, greedy(model, prompt, 8))


@pytest.mark.parametrize("name", ["gate-norm", "everything", "no-norm"])
def test_a_serving_engine_cannot_mistake_the_router_for_a_plain_one(name, make, oracle, tmp_path):
    """vLLM's fuser takes a router whose state is within {weight, e_score_correction_bias} for linear + softmax."""
    from transformers import AutoModelForCausalLM

    out = save_pretrained(build(make, VARIANTS[name]), tmp_path / "m")
    hf = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    router = hf.model.layers[0].mlp.gate
    state = {name for name, _ in router.named_parameters()} | {name for name, _ in router.named_buffers()}
    assert state - {"weight", "e_score_correction_bias"}
    assert not [key for key in load_file(out / "model.safetensors") if "norm_scale" in key]  # only in memory


def test_the_balance_loss_of_transformers_sees_the_normalized_logits(make, oracle, tmp_path):
    from transformers import AutoModelForCausalLM

    spec = replace(SKYMOE, moe=replace(MOE, aux_loss_coef=0.07, output_router_logits=True))
    out = save_pretrained(build(make, spec), tmp_path / "m")
    hf = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    normalized, weights, _ = hf.model.layers[0].mlp.gate(torch.randn(7, 36))
    assert normalized.std(-1).sub(1).abs().max() < 1e-4
    assert weights.sum(-1).sub(1).abs().max() < 1e-6
    result = hf(TOKENS, labels=TOKENS)  # output_router_logits comes from the config
    plain = hf(TOKENS, labels=TOKENS, output_router_logits=False)
    assert len(result.router_logits) == 3
    torch.testing.assert_close(result.loss, plain.loss + 0.07 * result.aux_loss)
    assert result.aux_loss > 0
