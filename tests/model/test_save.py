"""Saving: round trips, transformers reads what we write, nothing half-written, tokenizer files byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from skymoe.base.errors import ConfigError, FormatError
from skymoe.model.init import initialize
from skymoe.model.load import load
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm, RopeScaling, RopeSpec

TOKENS = torch.arange(2 * 23).view(2, 23) * 7 % 83
PLAIN = ModelSpec(
    architecture=Architecture.LLAMA,
    vocab_size=97,
    hidden_size=36,
    num_layers=3,
    ffn_size=50,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    max_position=64,
    init_std=0.2,
    eos_ids=(0,),
)
MOE = MoESpec(num_experts=5, top_k=2, ffn_size=28, gate_norm=GateNormSpec())
SKYMOE = replace(PLAIN, architecture=Architecture.SKYMOE, moe=MOE)
VARIANTS = {
    "gate-norm": SKYMOE,
    "paper-2": replace(SKYMOE, moe=replace(MOE, top_k=3, gate_norm=GateNormSpec(scale=2.0, ddof=0, eps=0.0))),
    "released": replace(SKYMOE, moe=replace(MOE, gate_norm=GateNormSpec(subtract_mean=False))),
    "everything": replace(
        SKYMOE,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=QkNorm.HEAD,
        tie_embeddings=True,
        sliding_window=5,
        sliding_layers=(1, 2),
        rope=RopeSpec(theta=500.0, scaling=RopeScaling.LLAMA3, factor=4.0, original_max_position=16),
        moe=replace(MOE, expert_bias=True, norm_topk=False, shared_ffn_size=12),
        moe_layers=(0, 2),
    ),
    "no-norm": replace(SKYMOE, moe=replace(MOE, gate_norm=None, expert_bias=True), sliding_window=7),
    "dense": replace(SKYMOE, moe=None, qkv_bias=True),
}


def random_model(spec: ModelSpec) -> Transformer:
    model = initialize(Transformer(spec), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + ("norm" in name))
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_computes_the_same_from_the_files_beside_the_weights(name, oracle, tmp_path):
    model = random_model(VARIANTS[name])
    out = save_pretrained(model, tmp_path / name.replace("-", "_"))
    with torch.no_grad():
        expected = model(TOKENS)
        torch.testing.assert_close(load(out)(TOKENS), expected, rtol=0, atol=0)
    theirs = oracle.logits(out, TOKENS, trust_remote_code=True)
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-4)


def test_transformers_generates_with_its_cache(oracle, tmp_path):
    from transformers import AutoModelForCausalLM

    model = random_model(VARIANTS["everything"])
    out = save_pretrained(model, tmp_path / "m")
    hf = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    tokens = TOKENS[:1, :9]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    generated = hf.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    with torch.no_grad():
        for _ in range(8):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, tokens)


def test_a_serving_engine_cannot_mistake_the_router_for_a_plain_one(oracle, tmp_path):
    """vLLM's fuser takes a router whose state is within {weight, e_score_correction_bias} for linear + softmax."""
    from transformers import AutoModelForCausalLM

    out = save_pretrained(random_model(SKYMOE), tmp_path / "m")
    hf = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    router = hf.model.layers[0].mlp.gate
    state = {name for name, _ in router.named_parameters()} | {name for name, _ in router.named_buffers()}
    assert state - {"weight", "e_score_correction_bias"}
    normalized, weights, _ = router(torch.randn(7, 36))
    assert normalized.std(-1).sub(1).abs().max() < 1e-4  # the balance loss must see the normalized logits
    assert weights.sum(-1).sub(1).abs().max() < 1e-6
    result = hf(TOKENS, labels=TOKENS, output_router_logits=True)
    assert len(result.router_logits) == 3
    assert result.aux_loss > 0


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_native_directories_survive_load_and_save(model_type, oracle, tmp_path):
    path = oracle.make(tmp_path / "m", model_type)
    out = save_pretrained(load(path), tmp_path / "out", max_shard_bytes=30_000)
    before, after = load_file(path / "model.safetensors"), {}
    for shard in out.glob("model-*.safetensors"):
        after |= load_file(shard)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert spec_from_directory(out) == spec_from_directory(path)
    torch.testing.assert_close(oracle.logits(out, TOKENS), oracle.logits(path, TOKENS), rtol=0, atol=0)


def test_dtype_and_documents(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    contents = {"tokenizer.json": b'{"a":\r\n1}', "chat_template.jinja": b"{{ x }}", "tokenizer_config.json": b"{}"}
    for name, content in {**contents, "rng_state.pth": b"x", "evil.py": b"x"}.items():
        (source / name).write_bytes(content)
    model = random_model(SKYMOE)
    out = save_pretrained(
        model,
        tmp_path / "out",
        dtype="bfloat16",
        tokenizer_from=source,
        provenance={"made_by": "a test"},
        extra_files={"note.txt": b"hello"},
    )
    assert {name: (out / name).read_bytes() for name in contents} == contents
    written = sorted(path.name for path in out.iterdir())
    assert "evil.py" not in written
    assert "rng_state.pth" not in written
    assert json.loads((out / "skymoe.json").read_text())["made_by"] == "a test"
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 0}
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert (out / "note.txt").read_bytes() == b"hello"
    assert load(out).embed.weight.dtype == torch.bfloat16


def test_what_an_architecture_cannot_carry_is_saved_as_skymoe(tmp_path):
    spec = replace(SKYMOE, architecture=Architecture.MIXTRAL)
    out = save_pretrained(random_model(spec), tmp_path / "out")
    assert spec_from_directory(out) == SKYMOE


def test_an_existing_directory_is_refused(tmp_path):
    model = random_model(PLAIN)
    out = save_pretrained(model, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists"):
        save_pretrained(model, out)
    save_pretrained(model, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_link_that_leads_out_is_refused_and_nothing_is_left(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="leads out"):
        save_pretrained(random_model(PLAIN), tmp_path / "out", tokenizer_from=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "source"]
