"""Logits of loaded checkpoints against transformers; broken and hostile directories."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import skymoe
from skymoe.base.errors import ConfigError, FormatError
from skymoe.model.load import load
from skymoe.ops.experts import ExpertsBackend
from skymoe.spec.model import Architecture

TOKENS = torch.arange(2 * 23).view(2, 23) * 7 % 83


def assert_same(path, oracle, tokens=TOKENS):
    with torch.no_grad():
        ours = load(path)(tokens)
    theirs = oracle.logits(path, tokens)
    assert theirs.abs().max() > 0.5  # a comparison of noughts would prove nothing
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_equal_transformers(model_type, oracle, tmp_path):
    assert_same(oracle.make(tmp_path / "m", model_type), oracle)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 2}),
        ("llama", {"head_dim": 22, "rope_theta": 500.0}),
        ("mistral", {"sliding_window": 5}),
        ("mistral", {"tie_word_embeddings": True, "rms_norm_eps": 0.01}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
        ("mixtral", {"sliding_window": 7, "tie_word_embeddings": True}),
        ("qwen2_moe", {"mlp_only_layers": [1], "norm_topk_prob": True}),
        ("qwen2_moe", {"decoder_sparse_step": 2, "qkv_bias": False}),
        ("qwen3_moe", {"mlp_only_layers": [0], "norm_topk_prob": False, "attention_bias": True}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        ("mixtral", {"head_dim": 14, "num_key_value_heads": 3, "num_experts_per_tok": 3}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),  # layers 0 and 2
        (
            "qwen2_moe",
            {
                "use_sliding_window": True,
                "sliding_window": 3,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
        ),
        ("qwen2_moe", {"mlp_only_layers": [2], "decoder_sparse_step": 2, "shared_expert_intermediate_size": 13}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "tie_word_embeddings": True, "num_experts_per_tok": 4}),
        ("olmoe", {"norm_topk_prob": True, "tie_word_embeddings": True}),
        ("olmoe", {"attention_bias": True, "num_key_value_heads": 6, "num_experts_per_tok": 1}),
    ],
)
def test_variants_equal_transformers(model_type, changes, oracle, tmp_path):
    assert_same(oracle.make(tmp_path / "m", model_type, **changes), oracle)


ROPES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7,
                    "mscale_all_dim": 1.3, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn-factor": {"rope_type": "yarn", "factor": 2.5, "attention_factor": 1.1},
}  # fmt: skip


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_skywork_moe_without_its_norm_is_mixtral(layout, oracle, tmp_path):
    from transformers import AutoModelForCausalLM

    path = oracle.make(tmp_path / "m", "mixtral")
    expected = oracle.logits(path, TOKENS)
    if layout == "fused":
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(path, save_original_format=False)
    as_skywork(path, num_local_experts=None, num_experts=[5], moe_use_logits_norm=False)
    model = load(path)
    assert model.spec.architecture is Architecture.SKYWORK_MOE
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-4)


def test_skywork_moe_divides_the_logits_by_their_unbiased_deviation(oracle, tmp_path):
    from transformers import AutoModelForCausalLM

    path = oracle.make(tmp_path / "m", "mixtral")
    hf = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    for layer in hf.model.layers:
        layer.mlp.gate.register_forward_hook(released_gate)
    as_skywork(path, num_experts=[5], num_local_experts=None, moe_use_logits_norm=True, moe_gate_norm_std=2.0)
    with torch.no_grad():
        torch.testing.assert_close(load(path)(TOKENS), hf(TOKENS).logits, rtol=0, atol=1e-4)


def released_gate(gate, inputs, output):
    """The released code's gate: std * logits / logits.std(dim=1), softmax, top-2, renormalized."""
    scaled = 2.0 * output[0] / output[0].std(dim=1, keepdim=True)
    weights, ids = scaled.softmax(-1).topk(2)
    return output[0], weights / weights.sum(-1, keepdim=True), ids


def test_skywork_13b_is_llama(oracle, tmp_path):
    path = oracle.make(
        tmp_path / "m", "llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    )
    expected = oracle.logits(path, TOKENS)
    as_skywork(path)
    torch.testing.assert_close(load(path)(TOKENS), expected, rtol=0, atol=1e-4)


def as_skywork(path, **changes):
    edit(path, model_type="skywork", architectures=["SkyworkForCausalLM"], **changes)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "olmoe"])
def test_rope_scaling_equals_transformers_beyond_the_context(name, model_type, oracle, tmp_path):
    rope = ROPES[name] | {"rope_theta": 1000.0}
    path = oracle.make(tmp_path / "m", model_type, rope_parameters=rope, max_position_embeddings=32)
    assert_same(path, oracle, torch.arange(80)[None] * 11 % 83)  # 80 > 32 > 16 positions


def test_dtype_follows_the_files_unless_given(oracle, tmp_path):
    path = oracle.make(tmp_path / "m", "mixtral", dtype=torch.bfloat16)
    assert {p.dtype for p in load(path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in skymoe.load(path, dtype="float32").parameters()} == {torch.float32}
    assert all(p.requires_grad for p in load(path).parameters())
    with pytest.raises(ConfigError, match="dtype must be one of"):
        load(path, dtype="int8")
    loop = load(path, dtype=torch.float32, experts=ExpertsBackend.LOOP)(TOKENS)
    torch.testing.assert_close(loop, load(path, dtype=torch.float32)(TOKENS), rtol=0, atol=1e-5)


def edit(path, **changes):
    """Change fields of config.json; None removes one."""
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if key not in changes or value is not None}
    (path / "config.json").write_text(json.dumps(config))


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_fused_experts_on_disk_are_read(model_type, oracle, tmp_path):
    from transformers import AutoModelForCausalLM

    path = oracle.make(tmp_path / "m", model_type)
    expected = load(path)(TOKENS)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = load_file(tmp_path / "fused" / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    torch.testing.assert_close(load(tmp_path / "fused")(TOKENS), expected, rtol=0, atol=0)


def test_every_difference_between_files_and_config_is_named(oracle, tmp_path):
    path = oracle.make(tmp_path / "m", "llama")

    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(49)

    rewrite(path, damage)
    with pytest.raises(FormatError) as caught:
        load(path)
    told = str(caught.value)
    assert "1 missing (model.layers.1.mlp.up_proj.weight)" in told
    assert "1 not part of this architecture (model.layers.7.mlp.up_proj.weight)" in told
    assert "model.norm.weight is [49], expected [48]" in told


def test_old_rotary_buffers_are_passed_over(oracle, tmp_path):
    path = oracle.make(tmp_path / "m", "llama")
    expected = load(path)(TOKENS)
    rewrite(path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    torch.testing.assert_close(load(path)(TOKENS), expected, rtol=0, atol=0)


def test_a_spare_head_of_a_tied_model_must_equal_the_embedding(oracle, tmp_path):
    path = oracle.make(tmp_path / "m", "llama", tie_word_embeddings=True)
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(path)
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(FormatError, match=r"lm_head.weight differs[\s\S]*tie_word_embeddings"):
        load(path)


def test_a_missing_head_hints_at_tying(oracle, tmp_path):
    path = oracle.make(tmp_path / "m", "llama", tie_word_embeddings=True)
    edit(path, tie_word_embeddings=False)
    with pytest.raises(FormatError, match=r"lm_head.weight[\s\S]*tie_word_embeddings: true"):
        load(path)


def test_an_absurd_number_of_experts_is_refused_at_once(oracle, tmp_path):
    path = oracle.make(tmp_path / "m", "mixtral")
    edit(path, num_local_experts=2**31 - 1)
    with pytest.raises(FormatError, match="speaks of at least"):
        load(path)


def test_integer_weights_are_refused(oracle, tmp_path):
    path = oracle.make(tmp_path / "m", "llama")
    rewrite(path, lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    with pytest.raises(FormatError, match="model.norm.weight is int8"):
        load(path)


@pytest.mark.parametrize("name", ["canary.py", "modeling_llama.py"])
def test_code_in_the_directory_is_never_run(name, oracle, tmp_path):
    path = oracle.make(tmp_path / "m", "llama")
    canary = tmp_path / "ran"
    (path / name).write_text(f"open({str(canary)!r}, 'w')")
    edit(path, auto_map={"AutoModelForCausalLM": f"{name[:-3]}.LlamaForCausalLM"})
    load(path)
    assert not canary.exists()


def test_nothing_there(tmp_path):
    with pytest.raises(FormatError, match="no such model directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"config.json: there is no such file"):
        load(tmp_path)
