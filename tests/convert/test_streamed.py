"""The streamed forward is the forward of the loaded model, for every family; memory does not grow with the model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from skymoe.base.errors import ConfigError, FormatError
from skymoe.convert import streamed_layers
from skymoe.convert.streamed import (
    NOT_SCORED,
    next_tokens,
    router_inputs,
    streamed_compare,
    streamed_logits,
    streamed_losses,
)
from skymoe.model.batch import BatchInfo
from skymoe.model.init import initialize
from skymoe.model.load import load
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.ops.fp8 import quantize
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec
from skymoe.spec.quantization import Fp8Scheme

TOKENS = torch.arange(2 * 19).view(2, 19) * 5 % 83
SPEC = ModelSpec(
    architecture=Architecture.SKYMOE,
    vocab_size=301,  # three blocks of rows when a block is 128
    hidden_size=36,
    num_layers=3,
    ffn_size=150,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    max_position=64,
    init_std=0.3,
)
MOE = MoESpec(num_experts=5, top_k=2, ffn_size=131, gate_norm=GateNormSpec(scale=1.5))


def make(path, spec, seed=3):
    """A random model at `path`; router clear, biases and norms random."""
    model = initialize(Transformer(spec), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + ("norm" in name))
    return save_pretrained(model, path, max_shard_bytes=100_000)


def whole_logits(path, tokens_BT=TOKENS):
    with torch.no_grad():
        return load(path, dtype="float32")(tokens_BT)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "dtype": torch.bfloat16}),
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen3", {}),
        ("mixtral", {}),
        ("qwen2_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("olmoe", {}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                   "max_position_embeddings": 8}),
    ],
)  # fmt: skip
def test_every_family_is_the_whole_model(model_type, changes, oracle, tmp_path):
    path = oracle.make(tmp_path / "model", model_type, **changes)
    torch.testing.assert_close(streamed_logits(path, TOKENS), whole_logits(path), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe": MOE},
        {"moe": replace(MOE, shared_ffn_size=24, expert_bias=True), "moe_layers": (0, 2), "mlp_bias": True},
        {"moe": MOE, "sliding_window": 4, "sliding_layers": (1,), "tie_embeddings": True},
        {"qkv_bias": True, "o_bias": True},
    ],
)
def test_what_only_we_can_say_in_blocks_of_rows(changes, tmp_path, monkeypatch):
    path = make(tmp_path / "model", replace(SPEC, **changes))
    expected = whole_logits(path)
    torch.testing.assert_close(streamed_logits(path, TOKENS), expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(streamed_layers, "BLOCK_BYTES", 1)
    torch.testing.assert_close(streamed_logits(path, TOKENS), expected, rtol=0, atol=1e-5)


def test_stacked_experts_on_disk(oracle, tmp_path):
    path = oracle.make(tmp_path / "model", "qwen3_moe")
    tensors, expected = load_file(path / "model.safetensors"), streamed_logits(path, TOKENS)
    for layer in range(3):
        block = f"model.layers.{layer}.mlp.experts"
        parts = [[tensors.pop(f"{block}.{e}.{name}_proj.weight") for e in range(5)] for name in ("gate", "up", "down")]
        gates_ups = [torch.cat(pair) for pair in zip(parts[0], parts[1], strict=True)]
        tensors |= {f"{block}.gate_up_proj": torch.stack(gates_ups), f"{block}.down_proj": torch.stack(parts[2])}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(streamed_logits(path, TOKENS), expected)


def test_fp8_is_decoded_in_blocks_of_rows(tmp_path, monkeypatch):
    """Rows beyond the first block of 128 meet their own scales."""
    spec = replace(SPEC, architecture=Architecture.LLAMA, hidden_size=160, ffn_size=300)
    plain, coded = make(tmp_path / "plain", spec), make(tmp_path / "coded", spec)
    tensors = {}
    for shard in coded.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (coded / "model.safetensors.index.json").unlink()
    decoded = dict(tensors)
    for name in [name for name in tensors if "_proj" in name]:
        code, scale = quantize(tensors[name] * torch.logspace(0, 2, len(tensors[name]))[:, None], Fp8Scheme.BLOCK)
        tensors |= {name: code, name.replace(".weight", ".weight_scale_inv"): scale}
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: code.shape[0], : code.shape[1]]
        decoded[name] = code.float() * wide
    save_file(tensors, coded / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (coded / "config.json").write_text(json.dumps(config))
    for shard in [*plain.glob("*.safetensors"), plain / "model.safetensors.index.json"]:
        shard.unlink()
    save_file(decoded, plain / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(streamed_layers, "BLOCK_BYTES", 1)
    torch.testing.assert_close(streamed_logits(coded, TOKENS), streamed_logits(plain, TOKENS), rtol=0, atol=0)


def test_router_inputs_are_what_the_feed_forward_is_given(tmp_path):
    path = make(tmp_path / "model", replace(SPEC, moe=MOE, moe_layers=(0, 2)))
    model = load(path)
    given: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.layers):
        block.ffn_norm.register_forward_hook(lambda _, __, out, layer=layer: given.update({layer: out.flatten(0, 1)}))
    with torch.no_grad():
        routings = iter(model.hidden(TOKENS, BatchInfo()).routings)
    entered = list(router_inputs(path, TOKENS))
    assert [each.layer for each in entered] == [0, 1, 2]
    for each in entered:
        torch.testing.assert_close(each.x_TD, given[each.layer], rtol=0, atol=1e-5)
        if each.layer == 1:
            assert each.logits_TE is None
        else:
            torch.testing.assert_close(each.logits_TE, next(routings).logits_TE, rtol=0, atol=1e-5)


def test_losses_are_those_of_the_logits(tmp_path, monkeypatch):
    path = make(tmp_path / "model", replace(SPEC, moe=MOE))
    logits_BTV = whole_logits(path).double()
    expected = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none")
    for block_bytes in (1, 2**20):
        monkeypatch.setattr(streamed_layers, "BLOCK_BYTES", block_bytes)
        torch.testing.assert_close(streamed_losses(path, TOKENS).flatten(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_a_comparison_is_that_of_whole_logits(block_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_layers, "BLOCK_BYTES", block_bytes)
    first, second = make(tmp_path / "a", SPEC), make(tmp_path / "b", replace(SPEC, moe=MOE), seed=4)
    p_BTV, q_BTV = whole_logits(first).double(), whole_logits(second).double()
    targets_BT = next_tokens(TOKENS)
    targets_BT[1] = NOT_SCORED
    found = streamed_compare(first, second, TOKENS, targets_BT=targets_BT)
    log_p, log_q = p_BTV.log_softmax(-1), q_BTV.log_softmax(-1)
    near = pytest.approx
    assert found.max_abs_dlogit == near(float((p_BTV - q_BTV).abs().max()), rel=1e-5)
    assert found.max_abs_logit == near(float(p_BTV.abs().max()), rel=1e-5)
    assert found.kl == near(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    assert found.top1_agreement == float((p_BTV.argmax(-1) == q_BTV.argmax(-1)).double().mean())
    for loss, log_probs in ((found.reference_loss, log_p), (found.loss, log_q)):
        assert loss == near(float(F.nll_loss(log_probs[0, :-1], TOKENS[0, 1:])), rel=1e-5)
    assert (found.num_tokens, found.num_targets) == (38, 18)
    chosen = [each.logits_TE.softmax(-1).topk(2).indices.unique().numel() for each in router_inputs(second, TOKENS)]
    assert found.experts_reached == sum(chosen)


def test_a_model_is_itself(tmp_path):
    path = make(tmp_path / "model", replace(SPEC, moe=MOE))
    found = streamed_compare(path, path, TOKENS)
    assert (found.max_abs_dlogit, found.top1_agreement, found.reference_loss) == (0, 1, found.loss)
    assert 0 <= found.kl < 1e-13


def test_not_a_number_is_not_hidden(tmp_path):
    path, damaged = make(tmp_path / "model", SPEC), make(tmp_path / "damaged", SPEC)
    (shard,) = [file for file in damaged.glob("*.safetensors") if "model.norm.weight" in load_file(file)]
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    found = streamed_compare(path, damaged, TOKENS)
    assert not found.max_abs_dlogit <= 1
    assert found.kl != found.kl


def test_refusals(tmp_path):
    small, large = make(tmp_path / "a", SPEC), make(tmp_path / "b", replace(SPEC, vocab_size=302))
    with pytest.raises(ConfigError, match="301 and 302"):
        streamed_compare(small, large, TOKENS)
    next(large.glob("*.safetensors")).unlink()
    with pytest.raises(FormatError, match="missing"):
        streamed_logits(large, TOKENS)


_PEAK = r"""
import re, sys, torch
from pathlib import Path
from skymoe.convert.streamed import streamed_compare
torch.set_num_threads(1)
streamed_compare(Path(sys.argv[1]), Path(sys.argv[1]), torch.arange(64).view(1, 64))
# not ru_maxrss, which begins with the memory of the process that started this one
print(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_does_not_grow_with_layers_and_experts(tmp_path):
    """48 MB of bf16 weights and 1.0 GB of them: the same peak, up to 64 MB."""
    peaks = []
    for name, num_layers, num_experts in (("small", 2, 4), ("large", 10, 16)):
        moe = MoESpec(num_experts=num_experts, top_k=4, ffn_size=2048)
        spec = replace(SPEC, hidden_size=1024, head_dim=64, num_layers=num_layers, moe=moe)
        path = save_pretrained(initialize(Transformer(spec), 0), tmp_path / name, dtype="bfloat16")
        command = [sys.executable, "-c", _PEAK, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
    size = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert size > 1.0e9
    assert peaks[1] - peaks[0] < 64e6, peaks
