from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import skymoe
from skymoe.base.errors import ConfigError, FormatError
from skymoe.inspect.config import InspectConfig
from skymoe.inspect.run import run as inspect
from skymoe.model.init import initialize
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.quantize.config import QuantizeConfig
from skymoe.quantize.result import QuantizeReport
from skymoe.quantize.run import dry_run, run
from skymoe.spec.hf import read_config, spec_from_directory
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm
from skymoe.spec.quantization import FIELD, Fp8Scheme
from skymoe.weights.buffers import info_of
from skymoe.weights.decoded import DecodedReader
from skymoe.weights.reader import WeightsReader
from skymoe.weights.writer import ShardedWriter

# Every side a multiple of 128, so that all matrices can be FP8 by block.
WHOLE = dict(
    hidden_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=128, num_hidden_layers=2,
    intermediate_size=256, dtype=torch.bfloat16,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=3),
    "qwen3_moe": dict(moe_intermediate_size=128, num_experts=4),
    "qwen2_moe": dict(
        moe_intermediate_size=128, shared_expert_intermediate_size=128, num_experts=4, norm_topk_prob=True
    ),
    "llama": {},
}
SKYMOE = ModelSpec(
    architecture=Architecture.SKYMOE, vocab_size=97, hidden_size=256, num_layers=2, ffn_size=384, num_heads=2,
    num_kv_heads=1, head_dim=128, max_position=64, init_std=0.1, qkv_bias=True, qk_norm=QkNorm.HEAD,
    tie_embeddings=True, moe_layers=(1,),
    moe=MoESpec(num_experts=3, top_k=2, ffn_size=128, shared_ffn_size=128, gate_norm=GateNormSpec()),
)  # fmt: skip


def make(oracle: Any, path: Path, family: str, **changes: Any) -> Path:
    return oracle.make(path, family, **(WHOLE | FAMILIES[family] | changes))


def quantized(source: Path, out: Path, scheme: Fp8Scheme = Fp8Scheme.BLOCK, **options: Any) -> QuantizeReport:
    return run(QuantizeConfig(**({"source": str(source), "out": out, "scheme": scheme, "receipt_tokens": 9} | options)))


def tensors_of(path: Path) -> dict[str, Tensor]:
    with WeightsReader(path) as reader:
        return {name: reader.tensor(name) for name in reader.names()}


def rewrite(path: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    """Other tensors, and other fields, for the model in `path`."""
    for file in path.glob("*.safetensors*"):
        file.unlink()
    with ShardedWriter(path, [(name, info_of(name, t).dtype, t.shape) for name, t in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    fields = {name: value for name, value in (read_config(path) | config).items() if value is not None}
    (path / "config.json").write_text(json.dumps(fields))


def tokens() -> Tensor:
    return torch.randint(80, (2, 11), generator=torch.Generator().manual_seed(1))


def check_like_transformers(path: Path, **options: Any) -> None:
    """transformers decodes to bfloat16 too; with the same weights in fp32 the logits are equal up to rounding."""
    from transformers import AutoModelForCausalLM

    pytest.importorskip("accelerate")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager", **options
    )
    assert not {kind: keys for kind, keys in info.items() if keys}
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        ours_BTV = skymoe.load(path).float()(tokens())
        theirs_BTV = theirs.float().eval()(tokens()).logits
    assert (ours_BTV - theirs_BTV).abs().max() < 1e-4


@pytest.mark.parametrize("family", list(FAMILIES))
def test_block_fp8_is_what_transformers_reads(oracle: Any, tmp_path: Path, family: str) -> None:
    source, out = make(oracle, tmp_path / "plain", family), tmp_path / "fp8"
    report = quantized(source, out)
    assert report.unfit == () and 0.02 < report.mean_rms < 0.03 and report.max_rms < 0.04
    config = read_config(out)
    assert config[FIELD]["weight_block_size"] == [128, 128] and "lm_head" in config[FIELD]["modules_to_not_convert"]
    check_like_transformers(out)


def transformers_logits(path: Path, **options: Any) -> Tensor:
    from transformers import AutoModelForCausalLM

    pytest.importorskip("accelerate")
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, **options).eval()(tokens()).logits


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_auto_works_in_transformers(oracle: Any, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """What docs/quantization.md says of `dtype`: the source's type, which is "auto" and the default, and no other."""
    out = tmp_path / "fp8"
    quantized(make(oracle, tmp_path / "plain", family, dtype=dtype), out)
    with torch.no_grad():
        ours = skymoe.load(out, dtype="float32")(tokens())
    for options in ({"dtype": "auto"}, {}, {"dtype": dtype}):
        found = transformers_logits(out, **options)
        tolerance = 1e-4 if dtype is torch.float32 else 0.05 * float(ours.abs().max())
        assert found.dtype is dtype and (found - ours).abs().max() < tolerance
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    with pytest.raises(RuntimeError, match="same dtype"):
        transformers_logits(out, dtype=other)


@pytest.mark.parametrize("mixed", ["router.weight fp32", "embedding fp32", "head and norms fp32"])
def test_tensors_of_several_types_become_one(oracle: Any, tmp_path: Path, mixed: str) -> None:
    """Each of these loads in transformers and stops in its forward if every tensor keeps the type it had."""
    source, out = make(oracle, tmp_path / "plain", "mixtral"), tmp_path / "fp8"
    wide = {"router.weight fp32": (".gate.",), "embedding fp32": ("embed_tokens",)}.get(mixed, ("lm_head", "norm"))
    generator = torch.Generator().manual_seed(2)
    files = {
        name: tensor + 1e-4 * torch.randn(tensor.shape, generator=generator) if any(p in name for p in wide) else tensor
        for name, tensor in tensors_of(source).items()
    }
    rewrite(source, files)
    report = quantized(source, out)
    main = torch.float32 if mixed == "embedding fp32" else torch.bfloat16
    stored = {name: t for name, t in tensors_of(out).items() if name in files and t.dtype != torch.float8_e4m3fn}
    assert {tensor.dtype for tensor in stored.values()} == {main}
    assert all(torch.equal(tensor, files[name].to(main)) for name, tensor in stored.items())
    assert set(report.rounded) == {name for name in stored if files[name].dtype != main and main != torch.float32}
    assert any("rounded to bfloat16" in remark for remark in report.remarks) is bool(report.rounded)
    assert ("tensors that were rounded to bfloat16" in (out / "README.md").read_text()) is bool(report.rounded)
    found = transformers_logits(out, dtype="auto")
    if main is torch.bfloat16:
        assert found.dtype is main and found.isfinite().all()
        check_like_transformers(out)
    else:
        assert (found - skymoe.load(out, dtype="float32")(tokens()).detach()).abs().max() < 1e-4


def test_a_kept_tensor_that_its_new_type_cannot_hold_is_an_error(oracle: Any, tmp_path: Path) -> None:
    source = make(oracle, tmp_path / "plain", "llama", dtype=torch.float16)
    files = tensors_of(source)
    files["model.norm.weight"] = files["model.norm.weight"].float().index_fill(0, torch.tensor([5]), 1e5)
    rewrite(source, files)
    with pytest.raises(FormatError, match=r"model\.norm\.weight holds .* too large for float16"):
        quantized(source, tmp_path / "fp8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_gate_normalized_fp8_is_what_transformers_reads(oracle: Any, tmp_path: Path) -> None:
    source = save_pretrained(initialize(Transformer(SKYMOE), 5), tmp_path / "plain", dtype="bfloat16")
    quantized(source, tmp_path / "fp8")
    assert spec_from_directory(tmp_path / "fp8") == SKYMOE
    check_like_transformers(tmp_path / "fp8", trust_remote_code=True)


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "llama"])
def test_every_scheme_loads_here(oracle: Any, tmp_path: Path, family: str, scheme: Fp8Scheme) -> None:
    """Odd shapes: by block some of these matrices stay as they are."""
    odd = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=50)
    odd |= dict(moe_intermediate_size=72, shared_expert_intermediate_size=256) if family == "qwen2_moe" else {}
    source = oracle.make(tmp_path / "plain", family, **odd, dtype=torch.bfloat16)
    report = quantized(source, tmp_path / "fp8", scheme)
    plain, fp8 = tensors_of(source), skymoe.load(tmp_path / "fp8")
    assert fp8.embed.weight.dtype == torch.bfloat16
    assert bool(report.unfit) is (scheme is Fp8Scheme.BLOCK)
    files = tensors_of(tmp_path / "fp8")
    assert sum(tensor.nbytes for tensor in files.values()) == report.weight_bytes
    with DecodedReader(tmp_path / "fp8") as reader:
        assert set(reader.names()) == set(plain) and len(reader.scaled) == report.tensors_quantized
        for name, tensor in plain.items():
            if name in reader.scaled:
                error = (reader.tensor(name).float() - tensor.float()).norm() / tensor.float().norm()
                assert 0.01 < error < 0.05
            else:
                assert torch.equal(reader.tensor(name), tensor)
    difference = (fp8.float()(tokens()) - skymoe.load(source).float()(tokens())).abs().max()
    assert report.max_abs_dlogit and 0 < difference < 20 * report.max_abs_dlogit  # other tokens, same size
    assert inspect(InspectConfig(model=str(tmp_path / "fp8"))).bytes.by_dtype["float8_e4m3fn"] > 0
    if scheme is Fp8Scheme.BLOCK:
        check_like_transformers(tmp_path / "fp8")


def test_fused_matrices_have_one_scale_by_tensor(oracle: Any, tmp_path: Path) -> None:
    quantized(make(oracle, tmp_path / "plain", "mixtral"), tmp_path / "fp8", Fp8Scheme.TENSOR)
    files = tensors_of(tmp_path / "fp8")
    for layer in ("model.layers.0", "model.layers.1"):
        w1, w2, w3 = (files[f"{layer}.block_sparse_moe.experts.2.w{i}.weight_scale"] for i in (1, 2, 3))
        q, k, v = (files[f"{layer}.self_attn.{name}_proj.weight_scale"] for name in "qkv")
        assert w1 == w3 != w2 and q == k == v and w1.shape == ()


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_fp8_of_fp8(oracle: Any, tmp_path: Path, scheme: Fp8Scheme) -> None:
    """The same scheme again changes next to nothing; another one starts from the decoded weights."""
    source = make(oracle, tmp_path / "plain", "qwen3_moe")
    quantized(source, tmp_path / "once", scheme)
    again = quantized(tmp_path / "once", tmp_path / "twice", scheme)
    assert again.mean_rms < 1e-6
    other = next(kind for kind in Fp8Scheme if kind is not scheme)
    report = quantized(tmp_path / "once", tmp_path / "other", other)
    assert 0.005 < report.mean_rms < 0.03
    assert read_config(tmp_path / "other")[FIELD]["quant_method"]
    skymoe.load(tmp_path / "other")


def test_skyworks_names_are_read(oracle: Any, tmp_path: Path) -> None:
    """Skywork-MoE-Base-FP8 as its vLLM fork reads it: per-tensor scales, scales of activations, no config of them."""
    path = tmp_path / "skywork"
    quantized(make(oracle, tmp_path / "plain", "mixtral"), path, Fp8Scheme.TENSOR)
    expected = skymoe.load(path, dtype="float32")(tokens())
    files = tensors_of(path)
    scales = {name.replace("weight_scale", "act_scale"): torch.tensor(0.1) for name in files if "weight_scale" in name}
    fields = dict(
        model_type="skywork", architectures=["SkyworkForCausalLM"], num_experts=[3], num_local_experts=None,
        moe_use_logits_norm=False, quantization_config=None,
    )  # fmt: skip
    rewrite(path, files | scales, **fields)
    assert spec_from_directory(path).architecture is Architecture.SKYWORK_MOE
    assert torch.equal(skymoe.load(path, dtype="float32")(tokens()), expected)
    report = quantized(path, tmp_path / "block", Fp8Scheme.BLOCK)  # the official model, made readable for others
    assert report.tensors_quantized == 2 * (4 + 9)


def test_experts_in_one_tensor_are_split(oracle: Any, tmp_path: Path) -> None:
    source = make(oracle, tmp_path / "plain", "qwen3_moe")
    files = tensors_of(source)
    quantized(source, tmp_path / "expected")
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        parts = {
            name: [files.pop(f"{block}.{expert}.{name}_proj.weight") for expert in range(4)]
            for name in ("gate", "up", "down")
        }
        pairs = zip(parts["gate"], parts["up"], strict=True)
        files[f"{block}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        files[f"{block}.down_proj"] = torch.stack(parts["down"])
    rewrite(source, files)
    quantized(source, tmp_path / "fp8")
    ours, expected = tensors_of(tmp_path / "fp8"), tensors_of(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    assert all(
        torch.equal(ours[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in ours if ours[name].ndim
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_source_leaves_nothing(oracle: Any, tmp_path: Path, bad: float) -> None:
    source = make(oracle, tmp_path / "plain", "llama")
    files = tensors_of(source)
    files["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    rewrite(source, files)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        quantized(source, tmp_path / "fp8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_what_cannot_be_done_is_said(oracle: Any, tmp_path: Path) -> None:
    source = oracle.make(tmp_path / "plain", "llama")
    with pytest.raises(ConfigError, match="no matrix of this model can be FP8 by block"):
        quantized(source, tmp_path / "fp8")
    with pytest.raises(ConfigError, match="the output is the source"):
        quantized(source, source, Fp8Scheme.CHANNEL)
    with pytest.raises(FormatError, match="no such model directory or preset"):
        quantized(tmp_path / "missing", tmp_path / "fp8")
    with pytest.raises(ConfigError, match="a preset has no weights"):
        quantized(Path("skywork-moe"), tmp_path / "fp8")
    with pytest.raises(ValueError, match="out is missing"):
        QuantizeConfig(source=str(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_a_presets_name_is_the_preset_and_a_path_the_directory(
    oracle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rule for dry runs, real ones and `inspect`, whatever lies in the working directory."""
    make(oracle, tmp_path / "skywork-moe", "llama")
    monkeypatch.chdir(tmp_path)
    assert dry_run(QuantizeConfig(source="skywork-moe", dry_run=True)).weight_bytes > 1e11
    assert inspect(InspectConfig(model="skywork-moe")).source == "preset"
    with pytest.raises(ConfigError, match=r"a preset has no weights(?s:.*)\./skywork-moe names the directory"):
        quantized(Path("skywork-moe"), tmp_path / "fp8")
    planned = dry_run(QuantizeConfig(source="./skywork-moe", dry_run=True))
    assert inspect(InspectConfig(model="./skywork-moe")).source == "directory"
    report = run(QuantizeConfig(source="./skywork-moe", out=tmp_path / "fp8", receipt_tokens=0))
    assert planned.weight_bytes == report.weight_bytes < 1e8


def test_dry_run_is_the_run(oracle: Any, tmp_path: Path) -> None:
    source = make(oracle, tmp_path / "plain", "mixtral")
    planned = dry_run(QuantizeConfig(source=str(source), dry_run=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]
    report = quantized(source, tmp_path / "fp8")
    tensors = ("tensors_quantized", "tensors_kept", "unfit", "rounded")
    for name in ("weight_bytes", "weight_bytes_by_kind", *tensors, "remarks"):
        assert getattr(planned, name) == getattr(report, name)
    data = json.loads(json.dumps(planned.as_json()))
    files = tensors_of(tmp_path / "fp8")
    assert {entry["target"]: entry["bytes"] for entry in data["tensors"]} == {n: t.nbytes for n, t in files.items()}


def test_everything_beside_the_weights_is_carried(oracle: Any, tmp_path: Path) -> None:
    source = make(oracle, tmp_path / "plain", "llama", rope_scaling={"rope_type": "linear", "factor": 2.0})
    (source / "tokenizer.json").write_text("{ }")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"temperature": 0.25}')
    report = quantized(source, tmp_path / "fp8")
    assert spec_from_directory(tmp_path / "fp8") == spec_from_directory(source)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "fp8" / name).read_bytes() == (source / name).read_bytes()
    assert set(report.files) == {path.name for path in (tmp_path / "fp8").iterdir()}
    assert report.bytes_written == sum(path.stat().st_size for path in (tmp_path / "fp8").iterdir())
    audit = json.loads((tmp_path / "fp8" / "audit.json").read_text())
    assert len(audit["tensors"]) == report.tensors_quantized == 14
    assert report.worst[0].rms == report.max_rms == max(error["rms"] for error in audit["tensors"].values())
    receipt = json.loads((tmp_path / "fp8" / "receipt.json").read_text())
    assert receipt["exact"] is False and receipt["max_abs_dlogit"] == report.max_abs_dlogit > 0
    assert report.loss_change == receipt["loss"] - receipt["reference_loss"]
    assert json.loads((tmp_path / "fp8" / "skymoe.json").read_text())["made_by"] == "quantize"
    assert "e4m3" in (tmp_path / "fp8" / "README.md").read_text()


def test_without_a_receipt(oracle: Any, tmp_path: Path) -> None:
    report = quantized(make(oracle, tmp_path / "plain", "llama"), tmp_path / "fp8", receipt_tokens=0)
    assert (report.max_abs_dlogit, report.kl, report.loss_change) == (None, None, None)
    assert report.mean_rms > 0


def test_an_interrupted_run_goes_on(oracle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first run wrote is kept, and audited all the same."""
    source = make(oracle, tmp_path / "plain", "mixtral")
    options = dict(max_shard_bytes=300_000)
    quantized(source, tmp_path / "expected", **options)
    original = skymoe.quantize.run.encode_scaled
    calls = 0

    def interrupted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr("skymoe.quantize.run.encode_scaled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantized(source, tmp_path / "fp8", **options)
    assert not (tmp_path / "fp8").exists()
    first, calls = calls, 100
    quantized(source, tmp_path / "fp8", **options)
    assert calls - 100 < 26 and first == 15  # 26 matrices; finished shards were not made again
    expected, found = tmp_path / "expected", tmp_path / "fp8"
    names = sorted(os.listdir(expected))
    assert sorted(os.listdir(found)) == names and len([name for name in names if "safetensors" in name]) > 4
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_channel_fp8_in_transformers(oracle: Any, tmp_path: Path) -> None:
    """compressed-tensors rounds the activations too, so the logits are near, and the weights equal."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "fp8"
    quantized(make(oracle, tmp_path / "plain", "llama"), out, Fp8Scheme.CHANNEL)
    theirs, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not {kind: keys for kind, keys in info.items() if keys}
    projection = theirs.model.layers[1].mlp.up_proj
    ours = skymoe.load(out, dtype="float32")
    assert torch.equal(projection.weight.float() * projection.weight_scale, ours.layers[1].mlp.up.weight)
    with torch.no_grad():
        expected, found = ours(tokens()), theirs.eval()(tokens()).logits
    assert (found - expected).norm() / expected.norm() < 0.15


def test_on_the_command_line(oracle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from skymoe.cli import main

    source, out = str(make(oracle, tmp_path / "plain", "llama")), str(tmp_path / "fp8")
    capsys.readouterr()

    def call(*arguments: str) -> tuple[int | str | None, str]:
        with pytest.raises(SystemExit) as left:
            main(["quantize", *arguments, "-q"])
        return left.value.code, capsys.readouterr().out

    code, text = call("skywork-moe", "--scheme", "block", "--dry-run", "--json")
    assert code == 0 and json.loads(text)["weight_bytes"] == pytest.approx(146e9, rel=0.01)
    code, text = call(source, out, "--scheme", "channel", "--json")
    data = json.loads(text)
    assert code == 0 and data["scheme"] == "channel" and data["out"] == out
    assert {"weight_bytes", "files", "bytes_written", "seconds", "max_abs_dlogit", "worst"} <= data.keys()
    code, text = call(source, out, "--overwrite", "--set", "receipt_tokens=0")
    assert code == 0 and "14 matrices are FP8" in text
    code, text = call(source, "--dry-run")
    assert code == 0 and "fp8 by block" in text
    assert call(source)[0] == 2
    shutil.rmtree(out)


def test_a_dry_run_asks_for_its_place_where_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "theirs").write_text("")
    with pytest.raises(ConfigError, match="exists.*\n.*\n.*--overwrite"):
        dry_run(QuantizeConfig(source="skywork-moe", out=tmp_path / "there", dry_run=True))
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    asked = QuantizeConfig(source="skywork-moe", out=tmp_path / "there", dry_run=True, overwrite=True)
    assert dry_run(asked).lack_of_space == "not enough space: 147.00 GB needed, 1.00 GB free"
    nowhere = dry_run(QuantizeConfig(source="skywork-moe", dry_run=True))
    assert (nowhere.disk_free, nowhere.lack_of_space) == (None, "")
    assert nowhere.as_json()["disk_bytes"] == nowhere.weight_bytes
