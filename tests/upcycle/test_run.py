"""Upcycling end to end: the receipt, transformers as the oracle, failures that leave nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from skymoe.base.config import check_config
from skymoe.base.errors import ConfigError, FormatError, MachineError
from skymoe.model.load import load
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import Architecture
from skymoe.upcycle.config import UpcycleConfig
from skymoe.upcycle.run import run

TOKENS = torch.arange(2 * 19).view(2, 19) * 5 % 83


def config(source, out, **options) -> UpcycleConfig:
    return check_config(UpcycleConfig, {"source": str(source), "out": str(out), "experts": 4, **options})


@pytest.mark.parametrize(
    ("model_type", "changes", "native"),
    [
        ("llama", {}, "mixtral"),
        ("llama", {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 2}, "mixtral"),
        ("mistral", {"sliding_window": 6}, "mixtral"),
        ("qwen2", {}, "qwen2_moe"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, "qwen2_moe"),
        ("qwen3", {"attention_bias": True}, "qwen3_moe"),
    ],
)
def test_a_copy_is_the_dense_model_and_transformers_agrees(model_type, changes, native, oracle, tmp_path):
    dense = oracle.make(tmp_path / "dense", model_type, **changes)
    report = run(config(dense, tmp_path / "moe"))
    assert (report.architecture, report.exact) == (native, True)
    assert report.max_abs_dlogit < 1e-4
    assert 0 <= report.kl + 1e-12 < 1e-9
    with torch.no_grad():
        ours = load(tmp_path / "moe")(TOKENS)
    torch.testing.assert_close(ours, oracle.logits(dense, TOKENS), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours, oracle.logits(tmp_path / "moe", TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_gate_norm_is_exact_too_and_written_as_skymoe(model_type, oracle, tmp_path):
    dense = oracle.make(tmp_path / "dense", model_type)
    report = run(config(dense, tmp_path / "moe", gate_norm=True, experts=5, top_k=3, gate_scale=2.0))
    assert (report.architecture, report.exact) == ("skymoe", True)
    assert report.max_abs_dlogit < 1e-4
    norm = spec_from_directory(tmp_path / "moe").moe.gate_norm
    assert (norm.scale, norm.ddof, norm.eps) == (2.0, 1, 1e-6)


def test_the_receipt_is_in_the_directory(oracle, tmp_path):
    dense = oracle.make(tmp_path / "dense", "llama")
    report = run(config(dense, tmp_path / "moe", receipt_tokens=11, seed=3))
    receipt = json.loads((tmp_path / "moe" / "receipt.json").read_text())
    assert (receipt["max_abs_dlogit"], receipt["kl"]) == (report.max_abs_dlogit, report.kl)
    assert (receipt["exact"], receipt["reason"], receipt["num_tokens"], receipt["seed"]) == (True, report.reason, 22, 3)
    assert "sum to 1" in report.reason
    assert "fp32" in receipt["computed"]
    provenance = json.loads((tmp_path / "moe" / "skymoe.json").read_text())
    assert provenance["options"]["experts"] == 4
    assert provenance["parent"]["architecture"] == "llama"
    assert run(config(dense, tmp_path / "b", receipt_tokens=0)).max_abs_dlogit is None


def test_experts_are_copies_and_routers_are_random_and_seeded(oracle, tmp_path):
    dense = load_file(oracle.make(tmp_path / "dense", "llama") / "model.safetensors")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(config(tmp_path / "dense", tmp_path / name, seed=seed, receipt_tokens=0))
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    routers = [name for name in a if name.endswith("block_sparse_moe.gate.weight")]
    assert len(routers) == 3
    assert not any(torch.equal(a[name], c[name]) for name in routers)
    assert not torch.equal(a[routers[0]], a[routers[1]])
    assert torch.cat([a[name] for name in routers]).std() == pytest.approx(0.02, rel=0.1)
    for expert in range(4):
        block = f"model.layers.1.block_sparse_moe.experts.{expert}"
        for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            assert torch.equal(a[f"{block}.{ours}.weight"], dense[f"model.layers.1.mlp.{theirs}_proj.weight"])
    rest = [name for name in dense if ".mlp." not in name]
    assert all(torch.equal(a[name], dense[name]) for name in rest)
    assert len(a) == len(rest) + 3 * (1 + 4 * 3)


def test_mixed_layers_shards_and_dtype(oracle, tmp_path):
    dense = oracle.make(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    report = run(config(dense, tmp_path / "moe", layers=[0, 2], max_shard_bytes=100_000))
    assert report.architecture == "qwen2_moe"
    assert report.exact
    assert len(list((tmp_path / "moe").glob("model-*.safetensors"))) > 2
    assert spec_from_directory(tmp_path / "moe").moe_layers == (0, 2)
    assert {p.dtype for p in load(tmp_path / "moe").parameters()} == {torch.bfloat16}
    ours = load(tmp_path / "moe", dtype="float32")(TOKENS)
    torch.testing.assert_close(ours, oracle.logits(tmp_path / "moe", TOKENS), rtol=0, atol=1e-4)
    narrow = run(config(oracle.make(tmp_path / "fp32", "llama"), tmp_path / "narrow", dtype="bfloat16"))
    assert not narrow.exact and "rounded to a narrower format" in narrow.reason
    run(config(dense, tmp_path / "wide", dtype="float32", receipt_tokens=0))
    assert {p.dtype for p in load(tmp_path / "wide").parameters()} == {torch.float32}


def test_what_no_native_format_carries_becomes_skymoe_or_is_refused(oracle, tmp_path):
    biased = oracle.make(tmp_path / "biased", "llama", attention_bias=True)
    report = run(config(biased, tmp_path / "moe"))
    assert report.architecture == "skymoe"
    assert report.exact
    assert "q/k/v biases" in report.remarks[0]
    mlp = oracle.make(tmp_path / "mlp", "llama", mlp_bias=True)
    with pytest.raises(ConfigError, match="mlp_bias"):
        run(config(mlp, tmp_path / "no"))
    with pytest.raises(ConfigError, match="Llama-shaped"):
        run(config(oracle.make(tmp_path / "q", "qwen2"), tmp_path / "no", format="skywork"))
    assert not (tmp_path / "no").exists()


def test_the_skywork_format(oracle, tmp_path):
    dense = oracle.make(tmp_path / "dense", "llama")
    report = run(config(dense, tmp_path / "moe", format="skywork", gate_norm=True))
    assert (report.architecture, report.exact) == ("skywork_moe", True)
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (written["num_experts"], written["moe_use_logits_norm"]) == ([4], True)
    assert spec_from_directory(tmp_path / "moe").architecture is Architecture.SKYWORK_MOE
    assert "model.layers.0.block_sparse_moe.gate.weight" in load_file(tmp_path / "moe" / "model.safetensors")


def test_a_damaged_copy_does_not_get_an_exact_receipt(oracle, tmp_path):
    from skymoe.convert.receipt import measure
    from skymoe.upcycle.config import Method
    from skymoe.upcycle.target import exactness

    dense = oracle.make(tmp_path / "dense", "llama")
    run(config(dense, tmp_path / "moe"))
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"][0] += 0.5
    save_file(tensors, tmp_path / "moe" / "model.safetensors", metadata={"format": "pt"})
    promise = exactness(spec_from_directory(tmp_path / "moe").moe, Method.COPY)
    receipt = measure(dense, tmp_path / "moe", promise, num_tokens=64, seed=0)
    assert not receipt.exact
    assert "please report" in receipt.reason


# ---- refusals


def test_an_existing_output_is_refused_without_overwrite(oracle, tmp_path):
    dense = oracle.make(tmp_path / "dense", "llama")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "keep.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        run(config(dense, tmp_path / "moe"))
    assert [path.name for path in (tmp_path / "moe").iterdir()] == ["keep.txt"]
    run(config(dense, tmp_path / "moe", overwrite=True))
    assert (tmp_path / "moe" / "receipt.json").exists()
    assert not (tmp_path / "moe" / "keep.txt").exists()
    with pytest.raises(ConfigError, match="the output is the source"):
        run(config(dense, dense, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_a_mixture_of_experts_is_refused(oracle, tmp_path):
    with pytest.raises(ConfigError, match=r"already a mixture of experts[\s\S]*dense parent"):
        run(config(oracle.make(tmp_path / "m", "mixtral"), tmp_path / "moe"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"top_k": 5}, "top_k is 5"),
        ({"experts": 1}, "experts"),
        ({"router_std": 0}, "router_std"),
        ({"layers": [2, 1]}, "ascending"),
        ({"layers": [0, 3]}, "layer 3, the model has 3"),
        ({"method": "magic"}, "copy"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_impossible_requests(options, told, oracle, tmp_path):
    dense = oracle.make(tmp_path / "dense", "llama")
    with pytest.raises(ConfigError, match=told):
        run(config(dense, tmp_path / "moe", **options))
    assert not (tmp_path / "moe").exists()


def test_a_broken_source_leaves_nothing(oracle, tmp_path):
    dense = oracle.make(tmp_path / "dense", "llama")
    weights = (dense / "model.safetensors").read_bytes()
    (dense / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(FormatError):
        run(config(dense, tmp_path / "moe"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_full_disk_leaves_nothing(oracle, tmp_path, monkeypatch):
    dense = oracle.make(tmp_path / "dense", "llama")
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match="not enough space"):
        run(config(dense, tmp_path / "moe"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_killed_run_leaves_nothing_at_the_output(oracle, tmp_path):
    dense = oracle.make(tmp_path / "dense", "llama", num_hidden_layers=8)
    code = """
import sys, time
import skymoe.upcycle.run as module
from skymoe.base.config import check_config
from skymoe.upcycle.config import UpcycleConfig

def wait(*args, **options):
    print("measuring", flush=True)
    time.sleep(60)

module.measure = wait
module.run(check_config(UpcycleConfig, {"source": sys.argv[1], "out": sys.argv[2]}))
"""
    child = subprocess.Popen([sys.executable, "-c", code, dense, tmp_path / "moe"], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"measuring\n"  # all weights are written, nothing is published
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    child.stdout.close()
    assert not (tmp_path / "moe").exists()
    assert run(config(dense, tmp_path / "moe")).exact  # and the next run works


@pytest.mark.slow
def test_memory_is_bounded_by_a_tensor_not_by_a_model(oracle, tmp_path):
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8)
    dense = oracle.make(tmp_path / "dense", "llama", num_key_value_heads=8, **sizes)
    code = """
import resource, sys
from skymoe.base.config import check_config
from skymoe.upcycle.config import UpcycleConfig
from skymoe.upcycle.run import run

options = {"source": sys.argv[1], "receipt_tokens": 0}
run(check_config(UpcycleConfig, options | {"out": sys.argv[2] + "-small", "experts": 2}))  # imports and buffers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = run(check_config(UpcycleConfig, options | {"out": sys.argv[2], "experts": 16}))
print(report.bytes_written, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    done = subprocess.run([sys.executable, "-c", code, dense, tmp_path / "moe"], capture_output=True, check=True)
    written, more_memory = map(int, done.stdout.split())
    assert written > 300_000_000
    assert more_memory < 30_000_000  # the largest tensor is 1 MB
