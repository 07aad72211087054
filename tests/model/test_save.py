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
NATIVE = replace(MOE, gate_norm=None)


def random_model(spec: ModelSpec) -> Transformer:
    model = initialize(Transformer(spec), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + ("norm" in name))
    return model


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
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


@pytest.mark.parametrize(
    "spec",
    [
        replace(PLAIN, rope=RopeSpec(theta=500.0, scaling=RopeScaling.YARN, factor=4.0, original_max_position=8)),
        replace(PLAIN, architecture=Architecture.QWEN2, qkv_bias=True, sliding_window=4, sliding_layers=(0, 2)),
        replace(PLAIN, architecture=Architecture.MIXTRAL, moe=NATIVE, sliding_window=6),
        replace(
            PLAIN,
            architecture=Architecture.QWEN2_MOE,
            moe=replace(NATIVE, shared_ffn_size=7, norm_topk=False),
            moe_layers=(1, 2),
            sliding_window=4,
            sliding_layers=(1,),
        ),
        replace(PLAIN, architecture=Architecture.QWEN3_MOE, qk_norm=QkNorm.HEAD, moe=NATIVE, moe_layers=(0,)),
        replace(PLAIN, architecture=Architecture.OLMOE, head_dim=6, qk_norm=QkNorm.FULL, moe=NATIVE),
    ],
    ids=lambda spec: spec.architecture.value,
)
def test_native_files_of_odd_shapes_load_in_transformers(spec, oracle, tmp_path):
    model = random_model(spec)
    out = save_pretrained(model, tmp_path / "out")
    theirs = oracle.logits(out, TOKENS)
    assert theirs.abs().max() > 0.5
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs, rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("out", [".", ".."])
def test_the_working_directory_is_refused(out, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = random_model(PLAIN)
    with pytest.raises(ConfigError, match="working directory"):
        save_pretrained(model, out, overwrite=True)
    save_pretrained(model, "there/.")
    assert load(tmp_path / "here" / "there").spec == PLAIN


def test_a_tokenizer_link_that_leads_out_is_refused_and_nothing_is_left(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="leads out"):
        save_pretrained(random_model(PLAIN), tmp_path / "out", tokenizer_from=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "source"]
