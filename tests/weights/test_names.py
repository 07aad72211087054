"""The name tables: reversible over every tensor of every architecture, and equal to the built module."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from skymoe.base.dtype import DType
from skymoe.model.transformer import Transformer
from skymoe.spec.flops import count_parameters
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm
from skymoe.weights.header import TensorInfo
from skymoe.weights.match import match_tensors
from skymoe.weights.names import Layout, detect_layout, file_names, parameter_shapes, tensor_table
from skymoe.weights.scales import pair_scales

BASE = ModelSpec(
    architecture=Architecture.LLAMA,
    vocab_size=37,
    hidden_size=12,
    num_layers=3,
    ffn_size=20,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
)
MOE = MoESpec(num_experts=5, top_k=2, ffn_size=8)
SPECS = {
    "llama": BASE,
    "llama-biases": replace(BASE, qkv_bias=True, o_bias=True, mlp_bias=True),
    "llama-tied": replace(BASE, tie_embeddings=True),
    "mistral": replace(BASE, architecture=Architecture.MISTRAL),
    "skywork": replace(BASE, architecture=Architecture.SKYWORK),
    "qwen2": replace(BASE, architecture=Architecture.QWEN2, qkv_bias=True),
    "qwen3": replace(BASE, architecture=Architecture.QWEN3, qk_norm=QkNorm.HEAD),
    "mixtral": replace(BASE, architecture=Architecture.MIXTRAL, moe=MOE),
    "skywork_moe": replace(BASE, architecture=Architecture.SKYWORK_MOE, moe=replace(MOE, gate_norm=GateNormSpec())),
    "qwen2_moe": replace(
        BASE, architecture=Architecture.QWEN2_MOE, qkv_bias=True, moe=replace(MOE, shared_ffn_size=4), moe_layers=(0, 2)
    ),
    "qwen3_moe": replace(BASE, architecture=Architecture.QWEN3_MOE, qk_norm=QkNorm.HEAD, moe=MOE, moe_layers=(1,)),
    "olmoe": replace(BASE, architecture=Architecture.OLMOE, head_dim=4, qk_norm=QkNorm.FULL, moe=MOE),
    "skymoe, full norm": replace(BASE, architecture=Architecture.SKYMOE, qk_norm=QkNorm.FULL),
    "skymoe": replace(
        BASE,
        architecture=Architecture.SKYMOE,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=QkNorm.HEAD,
        moe=replace(MOE, gate_norm=GateNormSpec(), expert_bias=True, shared_ffn_size=4),
        moe_layers=(1, 2),
    ),
}


def test_every_architecture_is_here():
    assert {spec.architecture for spec in SPECS.values()} == set(Architecture)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("layout", Layout)
def test_the_table_is_reversible_and_covers_the_module_exactly_once(name, layout):
    spec = SPECS[name]
    table = tensor_table(spec, layout)
    assert {file: place for place, file in file_names(spec, layout).items()} == table
    with torch.device("meta"):
        state = Transformer(spec).state_dict()
    assert {place.parameter for place in table.values()} == set(state)
    covered = {key: torch.zeros(tensor.shape, dtype=torch.int64) for key, tensor in state.items()}
    for place in table.values():
        part = covered[place.parameter][place.index]
        assert tuple(part.shape) == place.shape
        part += 1
    assert all((count == 1).all() for count in covered.values())
    assert parameter_shapes(spec) == {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("name", SPECS)
def test_parameter_counts_equal_the_built_module(name):
    with torch.device("meta"):
        model = Transformer(SPECS[name])
    count = count_parameters(SPECS[name])
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    parts = {
        "attention": count.attention, "mlp": count.dense_ffn, "experts": count.experts, "router": count.router,
        "head": count.head, "embed": count.embedding,
    }  # fmt: skip
    for part, expected in parts.items():
        assert expected == sum(p.numel() for key, p in model.named_parameters() if part in key.split("."))
    if SPECS[name].moe:
        idle = count.experts // MOE.num_experts * (MOE.num_experts - MOE.top_k)
        assert count.active == count.total - idle


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("layout", Layout)
def test_a_directory_of_exactly_these_tensors_matches(name, layout):
    spec = SPECS[name]
    table = tensor_table(spec, layout)
    infos = {file: TensorInfo(DType.BFLOAT16, place.shape) for file, place in table.items()}
    match = match_tensors(spec, infos, where="here")
    if spec.moe is None:
        assert match.layout is Layout.HUB
    else:
        assert match.layout is layout is detect_layout(infos)
    assert match.table == tensor_table(spec, match.layout)
    assert match.dtype is DType.BFLOAT16


def test_hub_names():
    assert "model.layers.2.block_sparse_moe.experts.4.w3.weight" in tensor_table(SPECS["mixtral"])
    assert "model.layers.2.block_sparse_moe.gate.weight" in tensor_table(SPECS["skywork_moe"])
    assert "model.layers.1.mlp.experts.4.up_proj.weight" in tensor_table(SPECS["skymoe"])
    assert "model.layers.0.mlp.shared_expert_gate.weight" in tensor_table(SPECS["qwen2_moe"])
    assert tensor_table(SPECS["mixtral"])["model.layers.0.block_sparse_moe.experts.1.w3.weight"].rows == (8, 16)


def test_the_names_of_skywork_moe_in_fp8_fit_once_their_scales_are_paired():
    table = tensor_table(SPECS["skywork_moe"])
    tensors = {}
    for name, place in table.items():
        is_expert = ".experts." in name
        tensors[name] = TensorInfo(DType.FLOAT8_E4M3 if is_expert else DType.BFLOAT16, place.shape)
        if is_expert:
            scale = TensorInfo(DType.FLOAT32, ())
            tensors |= {f"{name}_scale": scale, f"{name.removesuffix('.weight')}.act_scale": scale}
    assert "model.layers.2.block_sparse_moe.experts.4.w2.weight_scale" in tensors
    listing = pair_scales(tensors, None, DType.BFLOAT16, where="here")
    match = match_tensors(SPECS["skywork_moe"], listing.tensors, where="here")
    assert match.table == table
    assert len(listing.activation_scales) == len(listing.scaled) == 3 * 3 * MOE.num_experts
