"""Upcycling end to end: what lies in the directory, dry runs, refusals, failures that leave nothing behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from skymoe.base.config import check_config
from skymoe.base.errors import ConfigError, FormatError, MachineError
from skymoe.cli import app
from skymoe.convert.receipt import measure
from skymoe.model.load import load
from skymoe.quantize.config import QuantizeConfig
from skymoe.quantize.run import run as quantize
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import Architecture
from skymoe.upcycle.blueprint import draw_blueprint
from skymoe.upcycle.exactness import promise
from skymoe.upcycle.run import dry_run, run
from tests.upcycle.conftest import TOKENS, config_of, edit_config


def config(source, out, **options):
    return config_of(source, out, **{"experts": 4, **options})


def test_what_lies_in_the_directory(parents, tmp_path):
    report = run(config(parents("llama"), tmp_path / "moe", receipt_tokens=11, seed=3))
    receipt = json.loads((tmp_path / "moe" / "receipt.json").read_text())
    assert (receipt["max_abs_dlogit"], receipt["kl"]) == (report.max_abs_dlogit, report.kl)
    assert (receipt["exact"], receipt["reason"], receipt["seed"]) == (True, report.reason, 3)
    assert "sum to 1" in report.reason
    record = json.loads((tmp_path / "moe" / "skymoe.json").read_text())
    assert (record["made_by"], record["method"], record["seed"]) == ("upcycle", "copy", 3)
    assert (record["options"]["experts"], record["options"]["top_k"]) == (4, 2)
    assert record["parents"][0]["architecture"] == "llama"
    assert len(record["parents"][0]["sha256"]["model.safetensors"]) == 64
    assert "became 4 experts" in (tmp_path / "moe" / "README.md").read_text()
    found = {path.name: path.stat().st_size for path in (tmp_path / "moe").iterdir()}
    assert set(report.files) == set(found)
    assert report.bytes_written == sum(found.values())
    assert run(config(parents("llama"), tmp_path / "b", receipt_tokens=0)).max_abs_dlogit is None


def test_the_record_is_enough_to_repeat_the_conversion(parents, tmp_path):
    run(config(parents("qwen3"), tmp_path / "a", method="drop", ratio=0.3, seed=9, layers=[0, 2], receipt_tokens=0))
    told = json.loads((tmp_path / "a" / "skymoe.json").read_text())["options"]
    run(config_of(parents("qwen3"), tmp_path / "b", **told))
    names = [path.name for path in (tmp_path / "a").iterdir()]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_experts_are_copies_and_everything_else_is_kept(parents, tmp_path):
    run(config(parents("llama"), tmp_path / "moe", receipt_tokens=0))
    dense, moe = (load_file(path / "model.safetensors") for path in (parents("llama"), tmp_path / "moe"))
    for number in range(4):
        block = f"model.layers.1.block_sparse_moe.experts.{number}"
        for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            assert torch.equal(moe[f"{block}.{ours}.weight"], dense[f"model.layers.1.mlp.{theirs}_proj.weight"])
    rest = [name for name in dense if ".mlp." not in name]
    assert all(torch.equal(moe[name], dense[name]) for name in rest)
    assert len(moe) == len(rest) + 3 * (1 + 4 * 3)


def test_mixed_layers_shards_and_dtype(oracle, parents, tmp_path):
    dense = oracle.make(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    report = run(config(dense, tmp_path / "moe", layers=[0, 2], max_shard_bytes=100_000))
    assert (report.architecture, report.exact) == ("qwen2_moe", True)
    assert len(list((tmp_path / "moe").glob("model-*.safetensors"))) > 2
    assert spec_from_directory(tmp_path / "moe").moe_layers == (0, 2)
    assert {p.dtype for p in load(tmp_path / "moe").parameters()} == {torch.bfloat16}
    ours = load(tmp_path / "moe", dtype="float32")(TOKENS)
    torch.testing.assert_close(ours, oracle.logits(tmp_path / "moe", TOKENS), rtol=0, atol=1e-4)
    narrow = run(config(parents("llama"), tmp_path / "narrow", dtype="bfloat16"))
    assert not narrow.exact and "rounded to a narrower format" in narrow.reason
    run(config(dense, tmp_path / "wide", dtype="float32", receipt_tokens=0))
    assert {p.dtype for p in load(tmp_path / "wide").parameters()} == {torch.float32}


def test_specialists_of_several_types_are_written_in_one(parents, oracle, tmp_path):
    other = oracle.make(tmp_path / "other", "llama", dtype=torch.bfloat16, initializer_range=0.2)
    for sources, dtype in (([parents("llama"), other], torch.float32), ([other, parents("llama")], torch.bfloat16)):
        report = run(config(sources, tmp_path / str(dtype), method="specialists"))
        weights = load_file(tmp_path / str(dtype) / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {dtype}
        assert json.loads((tmp_path / str(dtype) / "config.json").read_text())["dtype"] == str(dtype)[6:]
        assert "the output is as the first one" in report.remarks[0]


def test_what_no_native_format_carries_becomes_skymoe(oracle, tmp_path):
    biased = oracle.make(tmp_path / "biased", "llama", attention_bias=True)
    report = run(config(biased, tmp_path / "moe"))
    assert (report.architecture, report.exact) == ("skymoe", True)
    assert "q/k/v biases" in report.remarks[0]


def test_the_skywork_format(parents, tmp_path):
    report = run(config(parents("llama"), tmp_path / "moe", format="skywork", preset="skywork"))
    assert (report.architecture, report.exact) == ("skywork_moe", True)
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (written["num_experts"], written["moe_use_logits_norm"]) == ([4], True)
    assert spec_from_directory(tmp_path / "moe").architecture is Architecture.SKYWORK_MOE
    assert "model.layers.0.block_sparse_moe.gate.weight" in load_file(tmp_path / "moe" / "model.safetensors")


def test_fused_files_and_fp8_files_are_parents_too(parents, oracle, tmp_path):
    options = {"source": str(parents("mistral")), "out": str(tmp_path / "fp8"), "scheme": "channel"}
    quantize(check_config(QuantizeConfig, options))
    wide = run(config(tmp_path / "fp8", tmp_path / "wide", dtype="float32"))
    assert wide.exact and wide.max_abs_dlogit < 1e-4
    narrow = run(config(tmp_path / "fp8", tmp_path / "narrow"))
    assert not narrow.exact and "rounded" in narrow.reason
    groups = {"method": "virtual_group", "granularity": 4, "expansion": 2, "shared": "split", "experts": None}
    split = run(config(tmp_path / "fp8", tmp_path / "split", dtype="float32", **groups))
    assert split.exact and split.max_abs_dlogit < 1e-4
    drop = run(config(tmp_path / "fp8", tmp_path / "drop", method="drop", receipt_tokens=0))
    assert not drop.exact
    shutil.copytree(parents("mixtral"), tmp_path / "fused")
    tensors = load_file(tmp_path / "fused" / "model.safetensors")
    for layer in range(3):
        block = f"model.layers.{layer}.block_sparse_moe"
        w1, w3, w2 = ([tensors.pop(f"{block}.experts.{e}.{w}.weight") for e in range(5)] for w in ("w1", "w3", "w2"))
        gate_up = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = gate_up
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(w2)
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = tensors.pop(f"{block}.gate.weight")
    save_file(tensors, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    clones = run(config_of(tmp_path / "fused", tmp_path / "clones", method="duplicate"))
    assert clones.exact and clones.max_abs_dlogit < 1e-4


def test_a_damaged_copy_does_not_get_an_exact_receipt(parents, tmp_path):
    asked = config(parents("llama"), tmp_path / "moe")
    run(asked)
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"][0] += 0.5
    save_file(tensors, tmp_path / "moe" / "model.safetensors", metadata={"format": "pt"})
    promised = promise(draw_blueprint(asked, [spec_from_directory(parents("llama"))]))
    receipt = measure(parents("llama"), tmp_path / "moe", promised, num_tokens=64, seed=0)
    assert not receipt.exact
    assert "please report" in receipt.reason


# ---- dry runs and the command line


def test_a_dry_run_writes_nothing_and_tells_what_the_run_does(parents, tmp_path):
    planned = dry_run(config(parents("qwen2"), tmp_path / "moe", method="drop"))
    assert list(tmp_path.iterdir()) == []
    report = run(config(parents("qwen2"), tmp_path / "moe", method="drop"))
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in weights.items()} == {
        entry["target"]: entry["shape"] for entry in planned.as_json()["tensors"]
    }
    assert planned.disk_bytes == sum(tensor.nbytes for tensor in weights.values())
    assert (planned.exact, planned.reason, planned.parameters) == (report.exact, report.reason, report.parameters)
    assert planned.spec == spec_from_directory(tmp_path / "moe")


def test_the_command_line(parents, oracle, tmp_path):
    other = oracle.make(tmp_path / "other", "llama", initializer_range=0.2)
    out, quick = str(tmp_path / "moe"), ["--set", "receipt_tokens=9"]
    sources = [str(parents("llama")), str(other)]
    command = ["upcycle", *sources, out, "--method", "specialists", "--experts", "4", "--top-k", "3", *quick]
    shown = CliRunner().invoke(app, [*command, "--dry-run"])
    assert shown.exit_code == 0
    assert (
        "#1:model.layers.2.mlp.up_proj.weight -> copy -> model.layers.2.block_sparse_moe.experts.3.w3.weight"
        in shown.stdout
    )
    assert "MB of tensors in memory" in shown.stdout
    planned = json.loads(CliRunner().invoke(app, [*command, "--dry-run", "--json"]).stdout)
    assert planned["spec"]["moe"]["top_k"] == 3
    assert planned["bytes_written"] == sum(entry["bytes"] for entry in planned["tensors"])
    assert not (tmp_path / "moe").exists()
    written = json.loads(CliRunner().invoke(app, [*command, "--json", "--seed", "5"]).stdout)
    assert (written["out"], written["exact"], written["experts"]) == (out, False, 4)
    assert written["bytes_written"] > planned["bytes_written"]
    assert "model.safetensors" in written["files"]
    assert written["seconds"] > 0
    again = CliRunner().invoke(app, [*command, "--overwrite", "--gate-norm", "--preset", "portable"])
    assert again.exit_code == 0
    assert "-> skymoe, method specialists" in again.stdout
    missing = CliRunner().invoke(app, ["upcycle", out])
    assert missing.exit_code != 0


def test_a_dry_run_says_that_the_disk_is_too_small(parents, tmp_path, monkeypatch):
    command = ["upcycle", str(parents("llama")), str(tmp_path / "moe"), "--dry-run"]
    room = CliRunner().invoke(app, command)
    assert (room.exit_code, "not enough space" in room.stdout) == (0, False)
    assert json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["lack_of_space"] == ""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    shown = CliRunner().invoke(app, command)
    assert (shown.exit_code, "not enough space: 0.00 GB needed, 0.00 GB free" in shown.stdout) == (0, True)
    data = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert data["lack_of_space"].startswith("not enough space")
    assert (data["disk_free"], data["disk_bytes"]) == (1000, data["bytes_written"])


# ---- refusals


def test_an_existing_output_is_refused_without_overwrite(parents, tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "keep.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        run(config(parents("llama"), tmp_path / "moe"))
    with pytest.raises(ConfigError, match="exists.*\n.*\n.*--overwrite"):
        dry_run(config(parents("llama"), tmp_path / "moe"))
    assert dry_run(config(parents("llama"), tmp_path / "moe", overwrite=True)).experts == 4
    assert [path.name for path in (tmp_path / "moe").iterdir()] == ["keep.txt"]
    run(config(parents("llama"), tmp_path / "moe", overwrite=True))
    assert (tmp_path / "moe" / "receipt.json").exists()
    assert not (tmp_path / "moe" / "keep.txt").exists()
    with pytest.raises(ConfigError, match="the output is the source"):
        run(config(parents("llama"), parents("llama"), overwrite=True))
    with pytest.raises(ConfigError, match="the source lies in the output"):
        run(config(parents("llama"), parents("llama").parent, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]


@pytest.mark.parametrize("out", [".", "..", "x/.."])
def test_the_working_directory_is_no_output(out, parents, tmp_path, monkeypatch):
    (tmp_path / "here" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for more in ([], ["--dry-run"], ["--overwrite"]):
        shown = CliRunner().invoke(app, ["upcycle", str(parents("llama")), out, *more])
        assert isinstance(shown.exception, ConfigError)
        assert "working directory" in str(shown.exception)
    run(config(parents("llama"), Path("y/."), receipt_tokens=0))
    assert (tmp_path / "here" / "y" / "config.json").exists()


def test_specialists_with_other_tokenizers_are_told(parents, oracle, tmp_path):
    for name in ("a", "b"):
        oracle.make(tmp_path / name, "llama")
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"version": name}))
    sources = [tmp_path / "a", tmp_path / "b"]
    report = run(config_of(sources, tmp_path / "moe", method="specialists", experts=4, receipt_tokens=0))
    assert "another tokenizer.json" in report.remarks[0]
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == json.dumps({"version": "a"})
    edit_config(tmp_path / "b", rms_norm_eps=0.5)
    with pytest.raises(ConfigError, match=r"norm_eps is 0\.5, but"):
        run(config_of(sources, tmp_path / "no", method="specialists", experts=4))


def test_a_broken_source_leaves_nothing(oracle, tmp_path):
    dense = oracle.make(tmp_path / "dense", "llama")
    weights = (dense / "model.safetensors").read_bytes()
    (dense / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(FormatError):
        run(config(dense, tmp_path / "moe"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_full_disk_leaves_nothing(parents, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match="not enough space"):
        run(config(parents("llama"), tmp_path / "moe"))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_nothing_at_the_output_and_the_next_one_goes_on(parents, tmp_path):
    code = """
import sys, time
import skymoe.upcycle.run as module
from skymoe.base.config import check_config
from skymoe.upcycle.config import UpcycleConfig

def wait(*args, **options):
    print("measuring", flush=True)
    time.sleep(60)

module.measure = wait
options = {"sources": [sys.argv[1]], "out": sys.argv[2], "experts": 4, "method": "drop"}
module.run(check_config(UpcycleConfig, options))
"""
    command = [sys.executable, "-c", code, parents("llama"), tmp_path / "moe"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"measuring\n"  # all weights are written, nothing is published
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "moe").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".moe.partial"]
    run(config(parents("llama"), tmp_path / "moe", method="drop"))
    run(config(parents("llama"), tmp_path / "fresh", method="drop"))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "fresh"))
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "moe"]


@pytest.mark.slow
def test_memory_is_bounded_by_a_tensor_not_by_a_model(oracle, tmp_path):
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8)
    dense = oracle.make(tmp_path / "dense", "llama", num_key_value_heads=8, **sizes)
    code = """
import resource, sys
from skymoe.base.config import check_config
from skymoe.upcycle.config import UpcycleConfig
from skymoe.upcycle.run import run

options = {"sources": [sys.argv[1]], "receipt_tokens": 0, "method": sys.argv[3]}
run(check_config(UpcycleConfig, options | {"out": sys.argv[2] + "-small", "experts": 2}))  # imports and buffers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = run(check_config(UpcycleConfig, options | {"out": sys.argv[2], "experts": 16}))
print(report.bytes_written, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    for method in ("copy", "drop"):
        command = [sys.executable, "-c", code, dense, tmp_path / method, method]
        written, more_memory = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
        assert written > 300_000_000
        assert more_memory < 30_000_000  # the largest tensor is 1 MB
