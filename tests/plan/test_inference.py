"""Published inference figures, a few of each kind, and rows that are not to be trusted."""

from __future__ import annotations

import pytest

from skymoe.plan.validate.cases import check_cases
from skymoe.plan.validate.inference import inference_groups

LLAMA_8B = {
    "name": "Llama-3.1-8B", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_kv_heads": 8,
    "head_dim": 128, "ffn_hidden_size": 14336, "vocab_size": 128256,
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_8B, "name": "Llama-3.1-70B", "num_layers": 80, "hidden_size": 8192, "num_attention_heads": 64,
    "ffn_hidden_size": 28672,
}  # fmt: skip
MIXTRAL = {
    **LLAMA_8B, "name": "Mixtral-8x7B", "vocab_size": 32000,
    "moe": {"num_experts": 8, "top_k": 2, "moe_ffn_hidden_size": 14336},
}  # fmt: skip


def saturated(name, model, gpu, tp, prompt, output, measured, precision="fp8"):
    return {
        "id": name, "kind": "inference", "group": "trtllm_v0.17", "model": model, "precision": precision,
        "cluster": {"gpu": gpu, "num_gpus": tp}, "parallel": {"tp": tp},
        "batch": {"input_len": prompt, "output_len": output, "load": "infinite rate"},
        "measured": {"output_tokens_per_s": measured},
    }  # fmt: skip


def one_stream(name, model, gpu, pp, precision, decode, prefill):
    return {
        "id": name, "kind": "inference", "group": "llama_cpp", "model": model, "precision": precision,
        "cluster": {"gpu": gpu, "num_gpus": pp}, "parallel": {"pp": pp},
        "batch": {"batch": 1, "prompt_len": 1024, "gen_len": 1024},
        "measured": {"decode_tokens_per_s": decode, "prefill_tokens_per_s": prefill},
    }  # fmt: skip


# docs/source/performance/perf-overview.md of TensorRT-LLM v0.17; GPU-Benchmarks-on-LLM-Inference (May 2024)
ROWS = [
    saturated("a", LLAMA_8B, "H100-SXM-80GB", 1, 128, 128, 28836.77),
    saturated("b", LLAMA_70B, "H100-SXM-80GB", 8, 20000, 2000, 1512.6),
    saturated("c", LLAMA_70B, "A100-SXM-80GB", 8, 1000, 1000, 3320.41, "fp16"),
    saturated("d", MIXTRAL, "H200-141GB", 4, 128, 4096, 39513.73),
    saturated("e", MIXTRAL, "L40S-48GB", 8, 2048, 128, 811.96),
    one_stream("f", LLAMA_8B, "RTX 4090 24GB", 1, "fp16", 54.34, 9056.26),
    one_stream("g", LLAMA_70B, "RTX 4090 24GB", 8, "fp16", 6.45, 1890.48),
]


def groups(rows):
    return inference_groups(check_cases(rows)[0])


def test_public_figures_are_met():
    found = {(group.group, group.quantity): group for group in groups(ROWS)}
    assert set(found) == {("llama_cpp", "decode"), ("llama_cpp", "prefill"), ("trtllm_v0.17", "throughput")}
    assert found["trtllm_v0.17", "throughput"].mape < 0.15
    assert found["llama_cpp", "decode"].mape < 0.10
    assert len(found["trtllm_v0.17", "throughput"].comparisons) == 5


def test_a_last_batch_that_is_not_full_counts():
    """3000 requests of which 1638 have room: 128/2048 on four H100s gives less than an endless stream would."""
    (group,) = groups([saturated("x", MIXTRAL, "H100-SXM-80GB", 4, 128, 2048, 41164.73)])
    assert abs(group.comparisons[0].error) < 0.15


def test_skyworks_own_figure_is_judged_with_what_was_assumed():
    row = {
        "id": "s", "kind": "inference", "group": "skywork", "precision": "fp8", "parallel": {"tp": 8},
        "model": {
            "name": "Skywork-MoE-146B", "num_layers": 52, "hidden_size": 4608, "num_attention_heads": 36,
            "num_kv_heads": 36, "head_dim": 128, "ffn_hidden_size": 12288, "vocab_size": 65536,
            "moe": {"num_experts": 16, "top_k": 2, "moe_ffn_hidden_size": 12288},
        },
        "cluster": {"gpu": "RTX 4090 24GB", "num_gpus": 8}, "measured": {"total_tokens_per_s": 2200},
    }  # fmt: skip
    (group,) = groups([row])
    (comparison,) = group.comparisons
    assert abs(comparison.error) < 0.15
    assert comparison.assumed
    assert not comparison.known


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp3"},
        {"precision": None},
        {"cluster": {"gpu": "a toaster"}},
        {"cluster": None},
        {"model": {"name": "mystery"}},
        {"parallel": {"tp": -1}},
        {"parallel": {"tp": "many"}},
        {"batch": {"input_len": 0, "output_len": 10}},
        {"measured": {"output_tokens_per_s": 0}},
        {"measured": None},
        {"group": "nobody_knows"},
        {"model": {**MIXTRAL, "num_kv_heads": 0}},
        {"model": {**MIXTRAL, "num_attention_heads": 7, "num_kv_heads": 3}},
    ],
)
def test_rows_that_cannot_be_judged_are_set_aside(change):
    found = groups([{**ROWS[3], **change}])
    assert [len(group.comparisons) for group in found] == [0]
    assert found[0].not_judged[0].case == "d"
