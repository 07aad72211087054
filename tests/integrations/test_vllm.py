"""The vLLM plugin, against a stand-in that records, and the guard that keeps the normalization in served routers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skymoe.integrations import vllm as plugin
from skymoe.model.init import initialize
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec

pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent.parent
PLAIN_ROUTER_STATE = {"weight", "e_score_correction_bias"}  # what vLLM 0.33's fuser takes for a plain softmax router
SPEC = ModelSpec(
    architecture=Architecture.SKYMOE, vocab_size=31, hidden_size=24, num_layers=2, ffn_size=20, num_heads=3,
    num_kv_heads=3, head_dim=8, moe=MoESpec(num_experts=5, top_k=2, ffn_size=12, gate_norm=GateNormSpec()),
)  # fmt: skip

STAND_IN = """
import json, os

class ModelRegistry:
    calls = []

    @classmethod
    def register_model(cls, architecture, model):
        cls.calls.append((architecture, model))
        with open(os.environ["CALLS"], "w") as file:
            json.dump(cls.calls, file)
"""


def entry_point() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    value: str = project["entry-points"]["vllm.general_plugins"]["skymoe"]
    return value


def test_the_plugin_registers_with_both_as_often_as_it_is_called(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(STAND_IN)
    module, _, function = entry_point().partition(":")
    code = f"""
from importlib import import_module
plugin = getattr(import_module({module!r}), {function!r})
plugin()
plugin()
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("skymoe", vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                              intermediate_size=8)
assert type(AutoModelForCausalLM.from_config(config)).__module__ == "skymoe.hf_model.modeling_skymoe"
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "CALLS": str(tmp_path / "calls.json")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    expected = ["SkyMoeForCausalLM", "vllm.model_executor.models.transformers:TransformersMoEForCausalLM"]
    assert json.loads((tmp_path / "calls.json").read_text()) == [expected, expected]


def test_the_registered_architecture_is_the_one_that_exports_name(tmp_path):
    out = save_pretrained(initialize(Transformer(SPEC), 0), tmp_path / "m")
    assert json.loads((out / "config.json").read_text())["architectures"] == [plugin.ARCHITECTURE]


@pytest.mark.parametrize("expert_bias", [False, True])
def test_no_engine_can_take_a_normalized_router_for_a_plain_one(expert_bias, tmp_path):
    """Its state holds a name that a linear layer with a softmax has not, built fresh and after from_pretrained."""
    from transformers import AutoModelForCausalLM

    assert SPEC.moe is not None
    spec = replace(SPEC, moe=replace(SPEC.moe, expert_bias=expert_bias))
    out = save_pretrained(initialize(Transformer(spec), 0), tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    with torch.device("meta"):  # as engines build it
        fresh = AutoModelForCausalLM.from_config(loaded.config)
    for model in (loaded, fresh):
        for layer in model.model.layers:
            router = layer.mlp.gate
            state = {name for name, _ in (*router.named_parameters(), *router.named_buffers())}
            assert state - PLAIN_ROUTER_STATE
            assert "weight" in state


def test_vllm_itself_does_not_fuse_it(tmp_path):
    fuser = pytest.importorskip("vllm.model_executor.models.transformers.fusers.moe")
    from transformers import AutoModelForCausalLM

    out = save_pretrained(initialize(Transformer(SPEC), 0), tmp_path / "m")
    block = AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp
    assert fuser.MoEBlockFuser.match(block, "experts") is None
