from __future__ import annotations

from dataclasses import replace

import pytest

from skymoe.base.dtype import DType
from skymoe.quantize.plan import QuantizePlan, ToFp8, plan_quantize, sources_of
from skymoe.quantize.policy import choose
from skymoe.spec.flops import count_parameters
from skymoe.spec.model import Architecture, ModelSpec, MoESpec
from skymoe.spec.presets import PRESETS
from skymoe.spec.quantization import Fp8Scheme
from skymoe.weights.names import tensor_table

QWEN2_MOE = ModelSpec(
    architecture=Architecture.QWEN2_MOE, vocab_size=100, hidden_size=256, num_layers=2, ffn_size=384, num_heads=4,
    num_kv_heads=2, head_dim=64, qkv_bias=True, moe_layers=(1,),
    moe=MoESpec(num_experts=3, top_k=2, ffn_size=128, shared_ffn_size=128),
)  # fmt: skip


def plan(spec: ModelSpec, scheme: Fp8Scheme = Fp8Scheme.BLOCK) -> QuantizePlan:
    return plan_quantize(spec, sources_of(spec, DType.BFLOAT16), scheme)


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_the_matrices_of_matmuls_become_fp8_and_nothing_else(scheme: Fp8Scheme) -> None:
    targets = {target.name: target for target in plan(QWEN2_MOE, scheme).conversion.tensors}
    layers = [f"model.layers.{i}" for i in range(2)]
    expected = {f"{layer}.self_attn.{name}_proj.weight" for layer in layers for name in "qkvo"}
    for block in (
        f"{layers[0]}.mlp",
        *(f"{layers[1]}.mlp.{name}" for name in ("shared_expert", *map("experts.{}".format, range(3)))),
    ):
        expected |= {f"{block}.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert {name for name, target in targets.items() if target.dtype is DType.FLOAT8_E4M3} == expected
    suffix = "_scale_inv" if scheme is Fp8Scheme.BLOCK else "_scale"
    assert {name for name, target in targets.items() if target.dtype is DType.FLOAT32} == {n + suffix for n in expected}
    assert set(targets) - {n + suffix for n in expected} == set(tensor_table(QWEN2_MOE))


def test_what_stays_is_listed_by_module() -> None:
    kept = plan(QWEN2_MOE).quantization.not_converted
    assert kept == (
        "lm_head", "model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.1.mlp.shared_expert_gate",
    )  # fmt: skip
    assert plan(replace(QWEN2_MOE, tie_embeddings=True)).quantization.not_converted == kept


def test_block_keeps_what_transformers_and_engines_cannot_scale() -> None:
    narrow_kv = plan(replace(QWEN2_MOE, num_kv_heads=1))  # k and v have 64 rows: q, fused with them, stays too
    assert [name.split(".")[-2] for name in narrow_kv.unfit] == ["q_proj", "k_proj", "v_proj"] * 2
    assert "model.layers.0.self_attn.q_proj" in narrow_kv.quantization.not_converted
    assert "model.layers.0.self_attn.o_proj" not in narrow_kv.quantization.not_converted
    assert QWEN2_MOE.moe is not None
    experts = plan(replace(QWEN2_MOE, moe=replace(QWEN2_MOE.moe, ffn_size=96)))
    assert len(experts.unfit) == 9 and all(".experts." in name for name in experts.unfit)
    assert "model.layers.1.mlp.experts" in experts.quantization.not_converted  # one entry, not nine
    assert not any("experts.0" in name for name in experts.quantization.not_converted)
    for scheme in (Fp8Scheme.CHANNEL, Fp8Scheme.TENSOR):
        assert plan(replace(QWEN2_MOE, num_kv_heads=1), scheme).unfit == ()


def test_fused_matrices_share_a_scale_by_tensor() -> None:
    groups = choose(tensor_table(QWEN2_MOE), Fp8Scheme.TENSOR).groups
    names = {place: name for name, place in tensor_table(QWEN2_MOE).items()}
    found = {tuple(names[place].split(".", 3)[-1].removesuffix(".weight") for place in group) for group in groups}
    assert found == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), ("mlp.shared_expert.down_proj",),
        *((f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj") for e in range(3)),
        *((f"mlp.experts.{e}.down_proj",) for e in range(3)),
    }  # fmt: skip
    assert all(len(group) == 1 for group in choose(tensor_table(QWEN2_MOE), Fp8Scheme.CHANNEL).groups)


@pytest.mark.parametrize("name", ["skywork-moe", "qwen2.5-7b", "demo-dense"])
@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_the_bytes_add_up_for_presets(name: str, scheme: Fp8Scheme) -> None:
    spec = PRESETS[name]
    planned = plan(spec, scheme)
    assert planned.weight_bytes == planned.conversion.bytes_written
    kinds = planned.bytes_by_kind
    assert kinds["fp8"] + kinds["kept"] // 2 == count_parameters(spec).total
    assert planned.tensors_quantized + planned.tensors_kept == len(tensor_table(spec))
    assert planned.conversion.bytes_read == 2 * count_parameters(spec).total  # each tensor once


def test_skywork_moe_is_146_gb() -> None:
    """The released FP8 model; within 1 %, which the embedding and the head in bfloat16 take most of."""
    for scheme in Fp8Scheme:
        assert plan(PRESETS["skywork-moe"], scheme).weight_bytes == pytest.approx(146e9, rel=0.01)


def types(planned: QuantizePlan) -> dict[str, DType]:
    return {target.name: target.dtype for target in planned.conversion.tensors}


def test_what_was_fp8_and_stays_has_the_type_of_the_embedding() -> None:
    spec = replace(QWEN2_MOE, num_kv_heads=1)
    sources = sources_of(spec, DType.FLOAT32)
    decoded = ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]
    planned = plan_quantize(spec, sources, Fp8Scheme.BLOCK, decoded=decoded)
    assert {types(planned)[name] for name in decoded} == {DType.FLOAT32} and not planned.rounded
    planned = plan_quantize(spec, sources, Fp8Scheme.BLOCK, decoded=["model.embed_tokens.weight"])
    assert planned.main_dtype is types(planned)["lm_head.weight"] is DType.BFLOAT16
    assert len(planned.rounded) == planned.tensors_kept


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
@pytest.mark.parametrize("embedding", [DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32])
@pytest.mark.parametrize("other", [DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32])
def test_all_that_is_not_fp8_has_one_type(scheme: Fp8Scheme, embedding: DType, other: DType) -> None:
    """Rounding is named, widening is exact; the scales and the bias of the experts' choice are fp32."""
    assert QWEN2_MOE.moe is not None
    spec = replace(QWEN2_MOE, architecture=Architecture.SKYMOE, moe=replace(QWEN2_MOE.moe, expert_bias=True))
    sources = sources_of(spec, embedding)
    routers = {place for place in sources if ".router." in place.parameter}
    sources |= {place: sources_of(spec, other)[place] for place in routers}
    planned = plan_quantize(spec, sources, scheme)
    kept = {target: dtype for target, dtype in types(planned).items() if dtype is not DType.FLOAT8_E4M3}
    kept = {name: dtype for name, dtype in kept.items() if not name.endswith(planned.quantization.scale_suffix)}
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert kept.pop(bias) is DType.FLOAT32
    assert set(kept.values()) == {embedding} == {planned.main_dtype}
    loses = embedding is not other and embedding is not DType.FLOAT32
    assert planned.rounded == (("model.layers.1.mlp.gate.weight",) if loses else ())


def test_the_plan_says_what_it_does() -> None:
    lines = list(plan(QWEN2_MOE).conversion.lines())
    name = "model.layers.0.mlp.up_proj.weight"
    assert f"{name} -> fp8 by block -> {name} [384x256 float8_e4m3fn] 98304" in lines
    assert f"{name} -> fp8 by block -> {name}_scale_inv [3x2 float32] 24" in lines
    operations = [step.operation for step in plan(QWEN2_MOE).conversion.steps]
    assert sum(isinstance(operation, ToFp8) for operation in operations) == 8 + 3 + 4 * 3
