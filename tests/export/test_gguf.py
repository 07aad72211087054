"""Exports have the names and fields that llama.cpp's converter wants (`llama_cpp.py`), and we know what it misreads."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from export.llama_cpp import ARCHITECTURES, FIELDS, LAYER, MERGED, MORE_FIELDS, OPTIONAL, WHOLE
from export.models import NORMED, random_directory, request, with_moe
from safetensors.torch import load_file

from skymoe.convert.gguf import gguf_misreads
from skymoe.export.run import run
from skymoe.spec.model import Architecture, QkNorm, RopeScaling, RopeSpec

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "changes", "format_"),
    [
        ("mixtral", {}, "mixtral"),
        ("mixtral", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}, "mixtral"),
        ("mixtral", {}, "qwen2_moe"),
        ("qwen2_moe", {}, "qwen2_moe"),
        ("qwen3_moe", {}, "qwen3_moe"),
        ("olmoe", {}, "olmoe"),
    ],
)
def test_the_directory_is_what_the_converter_reads(model_type, changes, format_, oracle, tmp_path):
    source = oracle.make(tmp_path / "source", model_type, **changes)
    run(request(source, tmp_path / "out", format_))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (kind,) = config["architectures"]
    for field in (*FIELDS, *MORE_FIELDS[kind]):
        assert config[field] is not None, field
    if "rope_parameters" in changes:  # the converter looks in rope_parameters, or in rope_scaling
        assert config["rope_parameters"] == config["rope_scaling"] | {"rope_theta": 5e5} == LLAMA3
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    experts = config.get("num_local_experts", config.get("num_experts"))
    required = {f"model.layers.{layer}.{name.format(expert)}"
                for layer in range(config["num_hidden_layers"]) for name in LAYER[kind] if name not in OPTIONAL
                for expert in range(experts)}  # fmt: skip
    assert required <= names
    known = [r"model\.layers\.\d+\." + re.escape(name).replace(r"\{\}", r"\d+") for name in LAYER[kind]]
    for name in names - required:
        assert name in WHOLE or any(re.fullmatch(pattern, name) for pattern in known), name
    assert ("lm_head.weight" in names) != config["tie_word_embeddings"]


def test_the_list_agrees_with_the_package_gguf():
    gguf = pytest.importorskip("gguf")
    for kind, layer in LAYER.items():
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[kind]], 3)
        for name, expected in WHOLE.items():
            assert table.get_name(name, try_suffixes=(".weight", ".bias")) == expected
        for name, expected in layer.items():
            asked = MERGED.get(name, f"model.layers.{{}}.{name}").format(2)
            assert table.get_name(asked, try_suffixes=(".weight", ".bias")) == f"blk.2.{expected}", (kind, name)
        dense = table.get_name("model.layers.2.mlp.gate_proj.weight", try_suffixes=(".weight",))
        assert (dense is None) == (kind != "MixtralForCausalLM")  # gguf_misreads: no dense layers in between


MIXTRAL = replace(with_moe(NORMED, gate_norm=None), architecture=Architecture.MIXTRAL)
QWEN2 = replace(
    with_moe(MIXTRAL, norm_topk=False, shared_ffn_size=8), architecture=Architecture.QWEN2_MOE, qkv_bias=True
)
QWEN3 = replace(MIXTRAL, architecture=Architecture.QWEN3_MOE, qk_norm=QkNorm.HEAD, head_dim=10)
OLMOE = replace(with_moe(MIXTRAL, norm_topk=False), architecture=Architecture.OLMOE, qk_norm=QkNorm.FULL,
                num_kv_heads=6, norm_eps=1e-5)  # fmt: skip


@pytest.mark.parametrize("spec", [MIXTRAL, QWEN2, QWEN3, OLMOE, replace(MIXTRAL, tie_embeddings=True, head_dim=8)])
def test_what_llama_cpp_computes_as_it_is(spec):
    assert gguf_misreads(spec) == ()


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (with_moe(QWEN2, norm_topk=True), "never renormalizes qwen2_moe"),
        (with_moe(OLMOE, norm_topk=True), "never renormalizes olmoe"),
        (with_moe(QWEN3, norm_topk=False), "always renormalizes qwen3_moe"),
        (replace(QWEN3, moe_layers=(1,)), "no dense layers in qwen3_moe"),
        (replace(MIXTRAL, sliding_window=7), "no sliding window in mixtral"),
        (replace(QWEN2, tie_embeddings=True), "a head of its own"),
        (replace(QWEN2, head_dim=8), "no head_dim in qwen2_moe"),
        (replace(QWEN3, qkv_bias=True, o_bias=True), "no output-projection bias"),
        (replace(OLMOE, num_kv_heads=3), "no grouped queries"),
        (replace(OLMOE, norm_eps=1e-6), "1e-05 for olmoe"),
        (replace(MIXTRAL, rope=RopeSpec(scaling=RopeScaling.DYNAMIC, factor=2)), "no dynamic"),
        (replace(MIXTRAL, rope=RopeSpec(scaling=RopeScaling.LLAMA3, factor=2, original_max_position=32)), "takes 8192"),
        (replace(QWEN3, rope=RopeSpec(scaling=RopeScaling.LLAMA3, factor=2, original_max_position=8192)), "drops"),
        (replace(QWEN3, rope=RopeSpec(scaling=RopeScaling.YARN, factor=2, truncate=False)), "variant of yarn"),
        (NORMED, "does not know skymoe"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(spec, told):
    (reason,) = gguf_misreads(spec)
    assert told in reason


def test_where_all_experts_are_used_renormalizing_is_the_same():
    assert gguf_misreads(with_moe(QWEN2, norm_topk=True, top_k=6)) == ()


def test_an_export_that_llama_cpp_would_misread_says_so(tmp_path):
    source = random_directory(tmp_path / "source", with_moe(NORMED, gate_norm=None))
    plain = run(request(source, tmp_path / "mixtral", "mixtral"))
    assert not any("GGUF" in remark for remark in plain.remarks)
    qwen = run(request(source, tmp_path / "qwen", "qwen2_moe"))
    assert "no GGUF of it computes the same: llama.cpp never renormalizes qwen2_moe" in qwen.remarks
