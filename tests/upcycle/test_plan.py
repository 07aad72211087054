"""The plan as data: every dense tensor once, every output tensor once, no torch."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from skymoe.base.config import check_config
from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError
from skymoe.convert.plan import Source
from skymoe.spec.flops import parameter_bytes
from skymoe.spec.model import Architecture
from skymoe.spec.presets import PRESETS
from skymoe.upcycle.config import UpcycleConfig
from skymoe.upcycle.plan import plan_conversion
from skymoe.weights.header import TensorInfo
from skymoe.weights.names import tensor_table


def make_plan(name, count=1, dtypes=(), **options):
    """The plan of a preset's conversion; its sources are bf16, or of `dtypes`, one of each type."""
    base = PRESETS[name]
    count = len(dtypes) or count
    config = check_config(UpcycleConfig, {"sources": [f"s{i}" for i in range(count)], "out": "o", **options})
    sources = [
        {place: Source(i, file, TensorInfo(dtype, place.shape)) for file, place in tensor_table(base).items()}
        for i, dtype in enumerate(dtypes or [DType.BFLOAT16] * count)
    ]
    return plan_conversion(config, [base] * count, sources)


def test_the_papers_conversion_on_paper():
    made = make_plan("skywork-13b", preset="skywork", format="skywork", gate_eps=0.0)
    assert made.target.architecture is Architecture.SKYWORK_MOE
    assert made.plan.bytes_written == parameter_bytes(PRESETS["skywork-moe"], DType.BFLOAT16)
    assert made.plan.bytes_read == parameter_bytes(PRESETS["skywork-13b"], DType.BFLOAT16)
    read = Counter(source.name for step in made.plan.steps for source in step.operation.sources)
    assert set(read) == set(tensor_table(PRESETS["skywork-13b"]))
    assert set(read.values()) == {1}
    assert [target.name for target in made.plan.tensors] == list(tensor_table(made.target))
    fan_out = {step.operation.sources[0].name: len(step.targets) for step in made.plan.steps if step.operation.sources}
    assert fan_out["model.layers.51.mlp.down_proj.weight"] == 16
    assert fan_out["model.layers.51.self_attn.q_proj.weight"] == 1
    assert made.plan.peak_bytes == 2 * (2 * 65536 * 4608)  # the embedding: read, and handed on


@pytest.mark.parametrize(
    ("method", "count"),
    [("drop", 1), ("noise", 1), ("virtual_group", 1), ("partition", 1), ("specialists", 3)],
)
def test_memory_stays_at_a_few_of_the_largest_tensors(method, count):
    made = make_plan("llama-3-8b", count, method=method, rest="average" if count > 1 else "base")
    largest = max(target.num_bytes for target in made.plan.tensors)
    assert made.plan.peak_bytes <= (count + 5) * largest
    assert made.plan.bytes_written == parameter_bytes(made.target, DType.BFLOAT16)


@pytest.mark.parametrize("rest", ["base", "average"])
@pytest.mark.parametrize(
    ("first", "second", "rounds"),
    [
        (DType.FLOAT32, DType.BFLOAT16, False),
        (DType.BFLOAT16, DType.FLOAT32, True),
        (DType.BFLOAT16, DType.FLOAT16, True),
    ],
)
def test_specialists_of_several_types_become_one_of_the_first(first, second, rounds, rest):
    made = make_plan("llama-3-8b", dtypes=(first, second), method="specialists", rest=rest)
    assert {target.dtype for target in made.plan.tensors} == {made.main_dtype} == {first}
    assert made.rounds == rounds
    assert f"sources are of {second}, the first one is of {first}" in made.remarks[0]
    told = make_plan("llama-3-8b", dtypes=(first, second), method="specialists", dtype="float16")
    assert {target.dtype for target in told.plan.tensors} == {DType.FLOAT16}
    assert told.remarks == ()


def test_an_absurd_number_of_tensors_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"65536 experts in each of 32 layers are 6,291,456 tensors[\s\S]*2,000,000"):
        make_plan("llama-3-8b", experts=65536)
    assert len(make_plan("llama-3-8b", experts=4096, layers=[3]).plan.tensors) > 3 * 4096


def test_a_dry_run_names_every_tensor():
    made = make_plan("qwen2.5-7b", method="drop", ratio=0.25)
    lines = list(made.plan.lines())
    assert len(lines) == len(made.plan.tensors)
    assert any(
        "model.layers.3.mlp.down_proj.weight -> draw 4736 of 18944 neurons anew -> "
        "model.layers.3.mlp.experts.7.down_proj.weight [3584x18944 bfloat16]" in line
        for line in lines
    )
    assert any("- -> normal std 0.02 -> model.layers.3.mlp.gate.weight [8x3584 bfloat16]" in line for line in lines)
    assert any("- -> zeros -> model.layers.3.mlp.shared_expert.down_proj.weight" in line for line in lines)
    data = made.plan.as_json()
    assert data["bytes_written"] == sum(entry["bytes"] for entry in data["tensors"])
    assert [entry["target"] for entry in data["tensors"]] != []


def test_the_fingerprint_is_that_of_the_request():
    first = make_plan("llama-3-8b", method="drop").plan.fingerprint()
    assert first == make_plan("llama-3-8b", method="drop").plan.fingerprint()
    for options in ({"seed": 1}, {"ratio": 0.4}, {"experts": 4}, {"drop_indices": "per_matrix"}, {"router_std": 0.01}):
        assert make_plan("llama-3-8b", method="drop", **options).plan.fingerprint() != first


@pytest.mark.parametrize(
    ("name", "options", "architecture"),
    [
        ("llama-3-8b", {}, "mixtral"),
        ("mistral-7b", {}, "mixtral"),
        ("skywork-13b", {}, "mixtral"),
        ("qwen2.5-7b", {}, "qwen2_moe"),
        ("qwen3-8b", {}, "qwen3_moe"),
        ("llama-3-8b", {"layers": [1, 3]}, "qwen2_moe"),
        ("mistral-7b", {"last_layers": 4}, "qwen2_moe"),
        ("llama-3-8b", {"norm_topk": False}, "qwen2_moe"),
        ("llama-3-8b", {"shared": "zero_routed"}, "qwen2_moe"),
        ("qwen3-8b", {"layers": [35]}, "qwen3_moe"),
        ("qwen3-8b", {"shared": "zero_routed"}, "skymoe"),
        ("llama-3-8b", {"gate_norm": True}, "skymoe"),
        ("qwen3-8b", {"gate_norm": True}, "skymoe"),
        ("qwen3-8b", {"format": "skymoe"}, "skymoe"),
        ("llama-3-8b", {"format": "skywork"}, "skywork_moe"),
        ("llama-3-8b", {"format": "qwen2_moe"}, "qwen2_moe"),
        ("mixtral-8x7b", {"method": "duplicate"}, "mixtral"),
        ("skywork-moe", {"method": "duplicate"}, "skywork_moe"),
        ("skywork-moe", {"method": "duplicate", "format": "skymoe"}, "skymoe"),
    ],
)
def test_the_native_architecture_is_chosen_where_there_is_one(name, options, architecture):
    assert make_plan(name, **options).target.architecture == architecture


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("llama-3-8b", {"format": "mixtral", "gate_norm": True}, "no gate normalization"),
        ("llama-3-8b", {"format": "mixtral", "layers": [1]}, "experts in every layer"),
        ("llama-3-8b", {"format": "mixtral", "norm_topk": False}, "always renormalizes"),
        ("llama-3-8b", {"format": "qwen3_moe"}, "q/k norm"),
        ("qwen2.5-7b", {"format": "mixtral"}, "no q/k/v biases"),
        ("qwen2.5-7b", {"format": "skywork"}, "Llama-shaped"),
        ("qwen3-8b", {"format": "qwen3_moe", "shared": "zero_routed"}, "no shared expert"),
    ],
)
def test_a_format_that_cannot_carry_the_model_is_refused(name, options, told):
    with pytest.raises(ConfigError, match=rf"{told}[\s\S]*format=skymoe"):
        make_plan(name, **options)


def test_remarks():
    assert "power of two" in make_plan("llama-3-8b", experts=6).remarks[0]
    assert "no gradient" in make_plan("llama-3-8b", top_k=1).remarks[0]
    assert "stay equal" in make_plan("mixtral-8x7b", method="duplicate").remarks[0]
    assert "long training" in make_plan("llama-3-8b", method="partition").remarks[0]
    assert "trust_remote_code" in make_plan("llama-3-8b", gate_norm=True).remarks[0]
    groups = {"method": "virtual_group", "granularity": 4, "expansion": 2, "top_k": 2}
    assert "--top-k 4 takes whole ones" in make_plan("llama-3-8b", **groups).remarks[0]
    narrow = {"method": "partition", "experts": 1024}
    assert "experts of width 14 (16 would do)" in make_plan("llama-3-8b", **narrow).remarks[-1]
    assert "(16 would do)" in make_plan("llama-3-8b", dtype="float32", **narrow).remarks[-1]
    assert not any("would do" in remark for remark in make_plan("llama-3-8b", format="skymoe", **narrow).remarks)
    assert make_plan("llama-3-8b").remarks == ()


def test_planning_imports_no_torch():
    modules = ("blueprint", "config", "exactness", "layers", "methods", "operations", "parents", "plan", "result",
               "target", "words")  # fmt: skip
    code = f"import sys, {', '.join(f'skymoe.upcycle.{name}' for name in modules)}\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0
