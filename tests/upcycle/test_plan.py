"""The plan as data: every dense tensor once, every output tensor once, no torch."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from skymoe.base.config import check_config
from skymoe.base.dtype import DType
from skymoe.spec.flops import parameter_bytes
from skymoe.spec.model import Architecture, GateNormSpec, MoESpec
from skymoe.spec.presets import PRESETS
from skymoe.upcycle.config import Method, UpcycleConfig
from skymoe.upcycle.plan import Operation, plan_copy
from skymoe.upcycle.target import exactness, target_spec
from skymoe.weights.header import TensorInfo
from skymoe.weights.names import tensor_table


def make_plan(name, **options):
    dense = PRESETS[name]
    config = check_config(UpcycleConfig, {"source": "s", "out": "o", "experts": 16, **options})
    target, remarks = target_spec(dense, config)
    infos = {file: TensorInfo(DType.BFLOAT16, place.shape) for file, place in tensor_table(dense).items()}
    return plan_copy(dense, target, infos, config.dtype), remarks


def test_the_papers_conversion_on_paper():
    plan, _ = make_plan("skywork-13b", format="skywork", gate_norm=True, gate_eps=0.0)
    assert plan.target.architecture is Architecture.SKYWORK_MOE
    moe = PRESETS["skywork-moe"]
    assert plan.bytes_written == parameter_bytes(moe, DType.BFLOAT16)
    assert plan.bytes_read == parameter_bytes(PRESETS["skywork-13b"], DType.BFLOAT16)
    read = Counter(step.source for step in plan.steps if step.source)
    assert set(read) == set(tensor_table(PRESETS["skywork-13b"]))
    assert set(read.values()) == {1}
    written = Counter(target for step in plan.steps for target in step.targets)
    assert set(written) == set(tensor_table(plan.target)) == {name for name, _, _ in plan.tensors}
    assert set(written.values()) == {1}
    assert [name for name, _, _ in plan.tensors] == list(tensor_table(plan.target))
    fan_out = {step.source: len(step.targets) for step in plan.steps}
    assert fan_out["model.layers.51.mlp.down_proj.weight"] == 16
    assert fan_out["model.layers.51.self_attn.q_proj.weight"] == 1
    assert max(step.num_bytes for step in plan.steps) == 2 * 65536 * 4608


def test_a_plan_can_be_read():
    plan, _ = make_plan("qwen2.5-7b")
    text = str(plan)
    assert "copy   model.layers.0.mlp.gate_proj.weight" in text
    assert "and 15 more experts" in text
    assert "layers.1." not in text
    assert "and so on for 28 layers" in text
    zeros = {step.parameter for step in plan.steps if step.operation is Operation.ZEROS}
    assert "layers.0.moe.shared.down.weight" in zeros
    assert "layers.0.moe.shared_gate.weight" in zeros
    assert all(step.operation is not Operation.ZEROS for step in plan.steps if "router" in step.parameter)


@pytest.mark.parametrize(
    ("name", "options", "architecture"),
    [
        ("llama-3-8b", {}, "mixtral"),
        ("mistral-7b", {}, "mixtral"),
        ("skywork-13b", {}, "mixtral"),
        ("qwen2.5-7b", {}, "qwen2_moe"),
        ("qwen3-8b", {}, "qwen3_moe"),
        ("llama-3-8b", {"layers": [1, 3]}, "qwen2_moe"),
        ("mistral-7b", {"layers": [1, 3]}, "qwen2_moe"),
        ("qwen3-8b", {"layers": [35]}, "qwen3_moe"),
        ("llama-3-8b", {"gate_norm": True}, "skymoe"),
        ("qwen3-8b", {"gate_norm": True}, "skymoe"),
        ("qwen3-8b", {"format": "skymoe"}, "skymoe"),
        ("llama-3-8b", {"format": "skywork"}, "skywork_moe"),
    ],
)
def test_the_native_architecture_is_chosen_where_there_is_one(name, options, architecture):
    plan, _ = make_plan(name, **options)
    assert plan.target.architecture == architecture


def test_remarks():
    assert "power of two" in make_plan("llama-3-8b", experts=6)[1][0]
    assert "no gradient" in make_plan("llama-3-8b", top_k=1)[1][0]
    assert make_plan("llama-3-8b")[1] == ()


def test_the_table_of_what_is_exact():
    moe = MoESpec(num_experts=4, top_k=2, ffn_size=8)
    assert exactness(moe, Method.COPY).exact
    assert exactness(replace(moe, gate_norm=GateNormSpec()), Method.COPY).exact
    assert exactness(replace(moe, top_k=1), Method.COPY).exact
    assert exactness(replace(moe, top_k=4, norm_topk=False), Method.COPY).exact
    assert not exactness(replace(moe, norm_topk=False), Method.COPY).exact


def test_planning_imports_no_torch():
    code = "import sys, skymoe.upcycle.plan, skymoe.upcycle.target, skymoe.upcycle.config, skymoe.spec.hf\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0
