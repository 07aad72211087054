"""A gate-normalized model split over two processes by transformers, with the plan in our config."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from skymoe.model.save import save_pretrained
from skymoe.spec.model import Architecture, GateNormSpec, MoESpec, QkNorm

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(2 * 11).view(2, 11) * 7 % 37
MOE = MoESpec(num_experts=5, top_k=2, ffn_size=12, gate_norm=GateNormSpec())
# an even vocabulary: transformers 5.16 does not split an odd one
PLAIN = {"vocab_size": 38, "moe": MOE, "moe_layers": (0, 2), "sliding_window": 4, "qkv_bias": True, "o_bias": True}
MODELS = {
    "plain": PLAIN,
    "per_head": {**PLAIN, "qk_norm": QkNorm.HEAD, "tie_embeddings": True},
    "full": {**PLAIN, "qk_norm": QkNorm.FULL},
}
WORKER = """
import sys, torch, torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
for path in sys.argv[1:]:
    split = DistributedConfig(tp_plan="auto", tp_size=2)
    model = AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, dtype=torch.float32, distributed_config=split
    ).eval()
    known = load_file(f"{path}/expected.st")
    with torch.no_grad():
        logits = model(known["tokens"]).logits
    torch.testing.assert_close(logits, known["logits"], rtol=0, atol=1e-4)
    shard = model.model.layers[0].mlp.experts[0].gate_proj.weight.to_local()
    assert shard.shape == (6, 20), shard.shape
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(make, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    paths = []
    for name, changes in MODELS.items():
        model = make(**changes)
        out = save_pretrained(model, tmp_path / name)
        with torch.no_grad():
            save_file({"tokens": TOKENS, "logits": model(TOKENS).contiguous()}, out / "expected.st")
        paths.append(str(out))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py", *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_covers_every_projection_and_is_not_written(name, spec):
    from skymoe.hf_model.configuration_skymoe import SkyMoeConfig
    from skymoe.hf_model.modeling_skymoe import SkyMoeModel
    from skymoe.spec.hf import config_from_spec

    config = SkyMoeConfig.from_dict(config_from_spec(spec(**MODELS[name])))
    with torch.device("meta"):
        model = SkyMoeModel(config)
    linears = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    patterns = [key.replace(".", r"\.").replace("*", r"\d+") for key in config.base_model_tp_plan if "layers" in key]
    assert linears
    assert all(any(re.fullmatch(pattern, path) for pattern in patterns) for path in linears)
    assert all(any(re.fullmatch(pattern, path) for path in linears) for pattern in patterns)
    assert "base_model_tp_plan" not in config.to_dict()


def test_a_model_with_a_shared_expert_has_no_plan(spec):
    from skymoe.hf_model.configuration_skymoe import SkyMoeConfig
    from skymoe.spec.hf import config_from_spec

    shared = spec(architecture=Architecture.SKYMOE, moe=replace(MOE, shared_ffn_size=6))
    assert SkyMoeConfig.from_dict(config_from_spec(shared)).base_model_tp_plan is None
    assert SkyMoeConfig.base_model_tp_plan is not None
