"""Export end to end: every source in every format that carries it, transformers as the oracle, and refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from export.models import NORMED, TOKENS, random_directory, request, with_moe
from safetensors.torch import load_file

from skymoe.base.config import check_config
from skymoe.base.errors import ConfigError, FormatError
from skymoe.export.config import ExportConfig
from skymoe.export.run import dry_run, run
from skymoe.model.load import load
from skymoe.quantize.config import QuantizeConfig
from skymoe.quantize.run import run as quantize
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import Architecture, QkNorm
from skymoe.upcycle.config import UpcycleConfig
from skymoe.upcycle.run import run as upcycle

EXACT = 1e-4


def ours(path):
    with torch.no_grad():
        return load(path, dtype="float32")(TOKENS)


def check_same(source, out, oracle):
    """Our logits of both and transformers' of the export are one thing."""
    expected = ours(source)
    torch.testing.assert_close(ours(out), expected, rtol=0, atol=EXACT)
    if spec_from_directory(out).architecture not in (Architecture.SKYWORK_MOE, Architecture.SKYWORK):
        options = {"trust_remote_code": True} if (out / "modeling_skymoe.py").exists() else {}
        torch.testing.assert_close(oracle.logits(out, TOKENS, **options), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("model_type", "changes", "format_"),
    [
        ("mixtral", {}, "mixtral"),
        ("mixtral", {"sliding_window": 5}, "skymoe"),
        ("mixtral", {}, "qwen2_moe"),
        ("mixtral", {}, "skywork"),
        ("qwen2_moe", {}, "qwen2_moe"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "skymoe"),
        ("qwen3_moe", {"mlp_only_layers": [0], "attention_bias": True}, "qwen3_moe"),
        ("qwen3_moe", {}, "skymoe"),
        ("olmoe", {}, "olmoe"),
        ("olmoe", {"norm_topk_prob": True, "tie_word_embeddings": True}, "skymoe"),
        ("llama", {"attention_bias": True, "mlp_bias": True}, "skymoe"),
        ("qwen3", {}, "skymoe"),
        ("llama", {"hidden_size": 48, "num_attention_heads": 6}, "skywork"),
    ],
)
def test_what_transformers_made(model_type, changes, format_, oracle, tmp_path):
    source = oracle.make(tmp_path / "source", model_type, **changes)
    report = run(request(source, tmp_path / "out", format_))
    assert (report.exact, report.fold) == (True, None)
    assert report.max_abs_dlogit < EXACT
    assert report.source_architecture == model_type
    check_same(source, tmp_path / "out", oracle)
    torch.testing.assert_close(oracle.logits(source, TOKENS), ours(tmp_path / "out"), rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("model_type", "options", "formats"),
    [
        ("llama", {"experts": 4}, ["mixtral", "qwen2_moe", "skymoe", "skywork"]),
        ("llama", {"experts": 4, "gate_norm": True}, ["skymoe", "skywork"]),
        ("qwen2", {"experts": 5, "top_k": 3}, ["qwen2_moe", "skymoe"]),
        ("qwen3", {"experts": 3}, ["qwen3_moe", "skymoe"]),
    ],
)
def test_an_upcycled_model_goes_wherever_it_is_carried(model_type, options, formats, oracle, tmp_path):
    dense = oracle.make(tmp_path / "dense", model_type)
    moe = tmp_path / "moe"
    upcycle(check_config(UpcycleConfig, {"sources": [str(dense)], "out": str(moe), "receipt_tokens": 0, **options}))
    for format_ in formats:
        report = run(request(moe, tmp_path / format_, format_))
        assert report.exact
        check_same(moe, tmp_path / format_, oracle)
        torch.testing.assert_close(ours(tmp_path / format_), oracle.logits(dense, TOKENS), rtol=0, atol=EXACT)


def test_there_and_back_are_the_same_bits(oracle, tmp_path):
    source = oracle.make(tmp_path / "source", "mixtral", dtype=torch.bfloat16)
    run(request(source, tmp_path / "a", "skywork"))
    run(request(tmp_path / "a", tmp_path / "b", "qwen2_moe", max_shard_bytes=50_000))
    run(request(tmp_path / "b", tmp_path / "c", "skymoe"))
    run(request(tmp_path / "c", tmp_path / "d", "mixtral"))
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 3
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "d"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_fused_experts_come_out_one_by_one(oracle, tmp_path):
    from transformers import AutoModelForCausalLM

    source = oracle.make(tmp_path / "source", "qwen3_moe")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in load_file(tmp_path / "fused" / "model.safetensors"))
    assert run(request(tmp_path / "fused", tmp_path / "out", "qwen3_moe")).exact
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_fp8_is_multiplied_out(scheme, oracle, tmp_path):
    sizes, fp8 = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8}, tmp_path / "fp8"
    source = oracle.make(tmp_path / "source", "mixtral", **sizes)
    quantize(check_config(QuantizeConfig, {"source": str(source), "out": str(fp8), "scheme": scheme}))
    assert torch.float8_e4m3fn in {tensor.dtype for tensor in load_file(fp8 / "model.safetensors").values()}
    wide = run(request(fp8, tmp_path / "wide", "qwen2_moe", dtype="float32"))
    assert wide.exact
    check_same(fp8, tmp_path / "wide", oracle)
    kept = run(request(fp8, tmp_path / "kept", "mixtral"))
    assert (kept.exact, "rounded" in kept.reason) == (False, True)  # code times scale has more digits than bfloat16
    types = {name: tensor.dtype for name, tensor in load_file(tmp_path / "kept" / "model.safetensors").items()}
    assert types["model.layers.0.block_sparse_moe.experts.3.w2.weight"] == torch.bfloat16
    assert types["model.layers.0.block_sparse_moe.gate.weight"] == torch.float32  # never quantized


# ---- adapters


def test_a_zero_shared_expert_comes_and_goes(oracle, tmp_path):
    source = oracle.make(tmp_path / "source", "mixtral")
    there = run(request(source, tmp_path / "qwen", "qwen2_moe"))
    assert there.adapters == ("a shared expert of width 128 that adds exactly 0",)
    tensors = load_file(tmp_path / "qwen" / "model.safetensors")
    shared = [name for name in tensors if "shared_expert" in name]
    assert len(shared) == 3 * 4
    assert not any(tensors[name].count_nonzero() for name in shared)
    back = run(request(tmp_path / "qwen", tmp_path / "back", "mixtral"))
    assert back.exact
    assert "checked on its values" in back.adapters[0]
    check_same(source, tmp_path / "back", oracle)


@pytest.mark.parametrize("matrix", ["down", "gate", "up"])
def test_one_zero_matrix_closes_a_shared_expert_in_every_layer_or_not_at_all(matrix, oracle, tmp_path):
    spec = replace(with_moe(NORMED, gate_norm=None, shared_ffn_size=10), architecture=Architecture.QWEN2_MOE)
    closed = random_directory(tmp_path / "closed", spec, a=f".moe.shared.{matrix}.weight")
    assert run(request(closed, tmp_path / "out", "mixtral")).exact
    check_same(closed, tmp_path / "out", oracle)
    half = random_directory(tmp_path / "half", spec, a=f"layers.1.moe.shared.{matrix}.weight")
    with pytest.raises(ConfigError, match="mixtral has no shared expert"):
        run(request(half, tmp_path / "no", "mixtral"))
    gate = random_directory(tmp_path / "gate", spec, a=".shared_gate.weight")  # sigmoid(0) is 1/2, not 0
    with pytest.raises(ConfigError, match="mixtral has no shared expert"):
        run(request(gate, tmp_path / "no", "mixtral"))


def test_zero_biases_are_left_out_and_put_in(oracle, tmp_path):
    biased = replace(with_moe(NORMED, gate_norm=None), qkv_bias=True, qk_norm=QkNorm.HEAD)
    source = random_directory(tmp_path / "source", biased)
    report = run(request(source, tmp_path / "qwen3", "qwen3_moe"))  # which has all attention biases or none
    assert report.adapters == ("attention biases of 0 where there were none",)
    check_same(source, tmp_path / "qwen3", oracle)
    plain = random_directory(tmp_path / "plain", replace(biased, qk_norm=None), q="q.bias", k="k.bias", v="v.bias")
    assert run(request(plain, tmp_path / "mixtral", "mixtral")).exact
    check_same(plain, tmp_path / "mixtral", oracle)
    some = random_directory(tmp_path / "some", replace(biased, qk_norm=None), q="q.bias", k="k.bias")
    with pytest.raises(ConfigError, match="q/k/v biases"):
        run(request(some, tmp_path / "no", "mixtral"))


def test_a_zero_expert_bias_is_left_out(oracle, tmp_path):
    spec = with_moe(NORMED, gate_norm=None, expert_bias=True)
    source = random_directory(tmp_path / "zero", spec, a=".expert_bias")
    assert run(request(source, tmp_path / "out", "mixtral")).exact
    check_same(source, tmp_path / "out", oracle)
    with pytest.raises(ConfigError, match="mixtral has no expert bias"):
        run(request(random_directory(tmp_path / "not", spec), tmp_path / "no", "mixtral"))


def test_gates_that_are_the_same_by_arithmetic(oracle, tmp_path):
    every = with_moe(NORMED, gate_norm=None, norm_topk=False, top_k=6)
    one = with_moe(NORMED, top_k=1)
    for name, spec, told in (("every", every, "all experts"), ("one", one, "always 1")):
        source = random_directory(tmp_path / name, spec)
        report = run(request(source, tmp_path / f"{name}-out", "mixtral"))
        assert report.exact
        assert told in report.adapters[0]
        check_same(source, tmp_path / f"{name}-out", oracle)
    norm = replace(NORMED.moe.gate_norm, ddof=0, eps=0.01)
    source = random_directory(tmp_path / "population", with_moe(NORMED, gate_norm=norm))
    report = run(request(source, tmp_path / "skywork", "skywork"))
    assert "unbiased" in report.adapters[0]
    assert any("drops gate normalization" in remark for remark in report.remarks)
    check_same(source, tmp_path / "skywork", oracle)
    assert run(request(tmp_path / "skywork", tmp_path / "skymoe", "skymoe")).exact
    check_same(source, tmp_path / "skymoe", oracle)


def test_sizes_that_transformers_runs_only_when_told_how(tmp_path):
    source = random_directory(tmp_path / "source", with_moe(NORMED, gate_norm=None, ffn_size=21))
    planned = dry_run(request(source, tmp_path / "out", "mixtral"))
    report = run(request(source, tmp_path / "out", "mixtral"))
    assert "experts of width 21 (24 would do): transformers wants multiples of 4 in float32" in report.remarks[-1]
    assert planned.remarks == report.remarks
    assert '="eager"' in (tmp_path / "out" / "README.md").read_text()  # the card escapes what Markdown reads
    narrow = dry_run(request(source, tmp_path / "other", "mixtral", dtype="bfloat16"))
    assert "and hidden size 36 (40 would do): transformers wants multiples of 8 in bfloat16" in narrow.remarks[-1]
    assert "would do" not in "".join(dry_run(request(source, tmp_path / "other", "skymoe")).remarks)


# ---- formats, documents, refusals


def test_dtype_and_receipt(oracle, tmp_path):
    source = oracle.make(tmp_path / "source", "mixtral")
    narrow = run(request(source, tmp_path / "narrow", "mixtral", dtype="bfloat16"))
    assert not narrow.exact
    assert "rounded" in narrow.reason
    assert {tensor.dtype for tensor in load_file(tmp_path / "narrow" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    wide = run(request(tmp_path / "narrow", tmp_path / "wide", "qwen2_moe", dtype="float32", receipt_tokens=0))
    assert (wide.exact, wide.max_abs_dlogit) == (True, None)
    assert {tensor.dtype for tensor in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}


def test_the_documents_say_what_was_done(oracle, tmp_path):
    source = oracle.make(tmp_path / "source", "mixtral", rope_parameters={
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16})  # fmt: skip
    (source / "tokenizer.json").write_bytes(b'{"a":\r\n1}')
    report = run(request(source, tmp_path / "out", "qwen2_moe"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b'{"a":\r\n1}'
    assert spec_from_directory(tmp_path / "out").rope == spec_from_directory(source).rope
    record = json.loads((tmp_path / "out" / "skymoe.json").read_text())
    assert (record["made_by"], record["method"]) == ("export", "mixtral to qwen2_moe")
    assert record["parents"][0]["architecture"] == "mixtral"
    assert "shared expert" in (tmp_path / "out" / "README.md").read_text()
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert (receipt["exact"], receipt["reason"]) == (True, report.reason)
    assert set(report.files) == {path.name for path in (tmp_path / "out").iterdir()}
    assert report.bytes_written == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_a_dry_run_tells_everything_and_writes_nothing(oracle, tmp_path):
    source = oracle.make(tmp_path / "source", "mixtral")
    planned = dry_run(request(source, tmp_path / "out", "qwen2_moe", dry_run=True))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    run(request(source, tmp_path / "out", "qwen2_moe"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    data = planned.as_json()
    assert {entry["target"]: tuple(entry["shape"]) for entry in data["tensors"]} == {
        name: tuple(tensor.shape) for name, tensor in written.items()
    }
    assert data["bytes_written"] == sum(tensor.numel() * tensor.element_size() for tensor in written.values())
    assert data["exact"]
    assert "copy" in next(iter(planned.plan.lines()))


@pytest.mark.parametrize(
    ("model_type", "changes", "format_", "told"),
    [
        ("qwen2_moe", {}, "mixtral", "q/k/v biases; mixtral always renormalizes .*; mixtral has no shared expert"),
        ("qwen2_moe", {}, "qwen3_moe", "always has q/k norm"),
        ("qwen3_moe", {}, "qwen2_moe", r"no q/k norm[\s\S]*--format qwen3_moe or --format skymoe carries it exactly"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "olmoe", "olmoe has experts in every layer"),
        ("olmoe", {}, "qwen3_moe", "form head"),
        ("llama", {}, "mixtral", r"mixtral needs experts[\s\S]*skymoe upcycle"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_the_way_out(model_type, changes, format_, told, oracle, tmp_path):
    source = oracle.make(tmp_path / "source", model_type, **changes)
    with pytest.raises(ConfigError, match=told):
        run(request(source, tmp_path / "out", format_))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_gate_normalization_is_carried_or_refused(tmp_path):
    source = random_directory(tmp_path / "source", NORMED)
    way_out = "--format skymoe or --format skywork carries it exactly; or, approximately: --fold-gate-norm --text FILE"
    with pytest.raises(ConfigError, match=rf"mixtral has no gate normalization[\s\S]*{way_out}"):
        run(request(source, tmp_path / "out", "mixtral"))
    with pytest.raises(ConfigError, match="the output is the source"):
        run(request(source, source, "skymoe", overwrite=True))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ConfigError, match="exists"):
        run(request(source, tmp_path / "out", "skymoe"))
    run(request(source, tmp_path / "out", "skymoe", overwrite=True))
    assert not (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"format": "gguf"}, "mixtral"),
        ({"dtype": "int8"}, "dtype"),
        ({"fold_gate_norm": True}, "--text FILE"),
        ({"text": "x"}, "fold_gate_norm only"),
        ({"max_kl": 0}, "max_kl"),
    ],
)
def test_impossible_requests(options, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        check_config(ExportConfig, {"source": "a", "out": "b", "format": "mixtral", **options})


def test_a_killed_export_leaves_nothing_at_the_output_and_goes_on(tmp_path):
    source = random_directory(tmp_path / "source", NORMED)
    code = """
import sys, time
import skymoe.export.run as module
from skymoe.base.config import check_config
from skymoe.export.config import ExportConfig

def wait(*arguments, **options):
    print("measuring", flush=True)
    time.sleep(60)

module.measure = wait
options = {"source": sys.argv[1], "out": sys.argv[2], "format": "skywork", "max_shard_bytes": 40_000}
module.run(check_config(ExportConfig, options))
"""
    child = subprocess.Popen([sys.executable, "-c", code, source, tmp_path / "out"], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"measuring\n"  # all weights are written, nothing is published
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    child.stdout.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "source"]
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").rglob("*.safetensors")}
    options = {"max_shard_bytes": 40_000}
    assert run(request(source, tmp_path / "out", "skywork", **options)).exact
    assert shards == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    run(request(source, tmp_path / "fresh", "skywork", **options))
    for path in (tmp_path / "fresh").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out", "source"]


def test_a_source_that_is_no_model(tmp_path):
    with pytest.raises(FormatError):
        run(request(tmp_path / "none", tmp_path / "out", "mixtral"))
