"""`skymoe merge-check` on real directories: same model in other clothes, upcycled, damaged, unrelated."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from skymoe.base.config import check_config
from skymoe.base.errors import ConfigError, FormatError
from skymoe.compare.config import CompareConfig
from skymoe.compare.result import CompareReport, TensorRow, Verdict
from skymoe.compare.run import run
from skymoe.compare.table import show
from skymoe.export.config import ExportConfig
from skymoe.export.run import run as export
from skymoe.model.init import initialize
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.quantize.config import QuantizeConfig
from skymoe.quantize.run import run as quantize
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec
from skymoe.upcycle.config import UpcycleConfig
from skymoe.upcycle.run import run as upcycle

DENSE = ModelSpec(
    architecture=Architecture.LLAMA, vocab_size=61, hidden_size=30, num_layers=3, ffn_size=44, num_heads=3,
    num_kv_heads=3, head_dim=10, max_position=64,
)  # fmt: skip
MOE = replace(DENSE, architecture=Architecture.MIXTRAL, moe=MoESpec(num_experts=5, top_k=2, ffn_size=44))
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(name: str, spec: ModelSpec, seed: int = 0, **options: Any) -> Path:
        return save_pretrained(initialize(Transformer(spec), seed), tmp_path / name, **options)

    return build


def compare(left: Path, right: Path, **options: Any) -> CompareReport:
    return run(check_config(CompareConfig, {"left": str(left), "right": str(right), **options}))


def text_of(report: CompareReport) -> str:
    console = Console(file=io.StringIO(), width=160)
    show(report, console)
    return console.file.getvalue()


def row_of(report: CompareReport, name: str) -> TensorRow:
    return next(row for row in report.tensors if row.name == name)


def change(directory: Path, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = function(tensors[name])
    save_file(tensors, directory / "model.safetensors")


def test_one_model_in_three_layouts(make: Make) -> None:
    """Mixtral's names, Qwen's names of `skymoe`, and the fused layout of transformers v5 are the same tensors."""
    mixtral = make("mixtral", MOE)
    skymoe = make("skymoe", replace(MOE, architecture=Architecture.SKYMOE), max_shard_bytes=30_000)
    fused = shutil.copytree(mixtral, mixtral.parent / "fused")
    fuse(fused)
    for other in (skymoe, fused):
        report = compare(mixtral, other, block_bytes=1000)
        assert report.equal and report.exit_code == 0
        assert report.counts == {"same": len(report.tensors)} == {"same": 3 + 3 * (6 + 1 + 15)}
        assert {row.cosine for row in report.tensors} == {1.0}
    assert [row.name for row in compare(mixtral, skymoe).fields] == ["architecture"]
    row = row_of(compare(mixtral, fused), "layers.1.moe.experts.3.up")
    assert row.left == "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    assert row.right == "model.layers.1.mlp.experts.gate_up_proj[3:4][44:88]"
    assert (row.left_shape, row.right_shape) == ((44, 30), (44, 30))


def fuse(directory: Path) -> None:
    """Store the experts of a Mixtral directory as transformers v5 holds them in memory."""
    tensors = load_file(directory / "model.safetensors")
    out = {
        name.replace("block_sparse_moe.gate", "mlp.gate"): t for name, t in tensors.items() if ".experts." not in name
    }
    for layer in range(3):
        old, new = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.mlp.experts"
        part = {w: [tensors[f"{old}.{e}.{w}.weight"] for e in range(5)] for w in ("w1", "w2", "w3")}
        out[f"{new}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(part["w1"], part["w3"], strict=True)])
        out[f"{new}.down_proj"] = torch.stack(part["w2"])
    save_file(out, directory / "model.safetensors")


@pytest.mark.parametrize("block_bytes", [64, 1000, 2**24])
def test_a_changed_element_is_found_and_measured(make: Make, block_bytes: int) -> None:
    a = make("a", MOE)
    b = shutil.copytree(a, a.parent / "b")
    name = "model.layers.2.block_sparse_moe.experts.4.w2.weight"
    before = load_file(a / "model.safetensors")[name]

    def nudge(weight: torch.Tensor) -> torch.Tensor:
        weight[29, 43] += 0.125
        return weight

    change(b, name, nudge)
    report = compare(a, b, block_bytes=block_bytes)
    assert report.exit_code == 1
    (row,) = [row for row in report.tensors if row.verdict is not Verdict.SAME]
    assert (row.name, row.verdict, row.num_different) == ("layers.2.moe.experts.4.down", Verdict.DIFFERENT, 1)
    assert row.max_abs == pytest.approx(0.125, rel=1e-6)
    assert row.relative_max == pytest.approx(0.125 / before.abs().max().item(), rel=1e-6)
    assert row.relative_rms == pytest.approx(0.125 / before.norm().item(), rel=1e-5)
    assert row.cosine < 1
    assert compare(a, b, tolerance=row.relative_max * 1.01).exit_code == 0
    assert compare(a, b, tolerance=row.relative_max * 0.99).exit_code == 1


def test_not_a_number_is_infinitely_far_even_with_a_tolerance(make: Make) -> None:
    a = make("a", DENSE)
    b = shutil.copytree(a, a.parent / "b")
    change(b, "model.norm.weight", lambda weight: weight.index_fill(0, torch.tensor([7]), torch.nan))
    report = compare(a, b, tolerance=1e9)
    assert report.exit_code == 1
    assert json.loads(json.dumps(report.as_json()))["tensors"][-2]["max_abs"] == "inf"
    assert compare(b, b).exit_code == 0


def test_number_formats(make: Make) -> None:
    """bf16 against the same values in fp32: not the same bits, equal with a tolerance of 0."""
    model = initialize(Transformer(DENSE), 0).bfloat16()
    root = make("x", DENSE).parent
    narrow, wide = save_pretrained(model, root / "narrow"), save_pretrained(model, root / "wide", dtype="float32")
    report = compare(narrow, wide)
    assert report.counts == {"values": len(report.tensors)} and report.exit_code == 1
    assert compare(narrow, wide, tolerance=0).exit_code == 0
    assert "the same values, bfloat16 / float32" in text_of(report)
    rounded = compare(root / "x", narrow, tolerance=2**-8)
    assert rounded.exit_code == 0 and rounded.counts["different"] > 10


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_fp8_against_its_source(make: Make, scheme: str) -> None:
    """The documented tolerance: half a step of e4m3 at its largest number, since scales map the largest to 448."""
    dense = make("dense", replace(DENSE, hidden_size=128, ffn_size=256, num_heads=2, num_kv_heads=2, head_dim=64))
    fp8 = dense.parent / "fp8"
    options = {"source": str(dense), "out": str(fp8), "scheme": scheme, "receipt_tokens": 0}
    quantize(check_config(QuantizeConfig, options))
    tolerance = 0.05 if scheme == "tensor" else 0.036  # one scale for q, k and v: their maxima differ
    report = compare(dense, fp8, tolerance=tolerance)
    assert report.exit_code == 0, text_of(report)
    assert report.counts == {"different": 21, "same": 9} and not [row for row in report.fields if not row.equal]
    row = row_of(report, "layers.1.mlp.up.weight")
    assert row.right == "model.layers.1.mlp.up_proj.weight" and 0.005 < row.relative_rms < 0.04 and row.cosine > 0.999
    assert compare(dense, fp8, tolerance=0.001).exit_code == 1
    assert compare(fp8, fp8).exit_code == compare(fp8, fp8, raw=True).exit_code == 0


def test_negative_zero_has_other_bits_and_the_same_value(make: Make) -> None:
    a = make("a", DENSE)
    change(a, "model.norm.weight", torch.zeros_like)
    b = shutil.copytree(a, a.parent / "b")
    change(b, "model.norm.weight", torch.neg)
    assert row_of(compare(a, b), "norm.weight").verdict is Verdict.VALUES
    assert (compare(a, b).exit_code, compare(a, b, tolerance=0).exit_code) == (1, 0)


def test_experts_against_the_dense_parent(make: Make) -> None:
    dense = make("dense", DENSE)
    moe = dense.parent / "moe"
    upcycle(check_config(UpcycleConfig, {"sources": [str(dense)], "out": str(moe), "experts": 4, "receipt_tokens": 0}))
    plain = compare(dense, moe)
    assert plain.exit_code == 1
    assert plain.counts == {"same": 3 + 3 * 6, "only A": 9, "only B": 3 * (1 + 12)}
    whole = compare(dense, moe, experts=True)
    assert whole.exit_code == 0, text_of(whole)
    assert [(row.layer, row.expert, row.same) for row in whole.experts] == [
        (layer, expert, True) for layer in range(3) for expert in range(4)
    ]
    change(moe, "model.layers.1.block_sparse_moe.experts.2.w1.weight", lambda weight: weight * 2)
    drifted = compare(dense, moe, experts=True)
    assert drifted.exit_code == 1
    (row,) = [row for row in drifted.experts if not row.same]
    norms = {w: load_file(dense / "model.safetensors")[f"model.layers.1.mlp.{w}_proj.weight"].norm() for w in WORDS}
    expected = norms["gate"] / torch.stack(list(norms.values())).norm()
    assert (row.layer, row.expert, row.relative_rms) == (1, 2, pytest.approx(expected.item(), rel=1e-5))
    assert "experts of B against the dense feed-forward of A" in text_of(drifted)


WORDS = ("gate", "up", "down")


def test_experts_of_another_width_do_not_correspond(make: Make) -> None:
    narrow = replace(DENSE, architecture=Architecture.SKYMOE, moe=MoESpec(num_experts=3, top_k=2, ffn_size=11))
    report = compare(make("dense", DENSE), make("moe", narrow), experts=True)
    assert report.counts["shape"] == 27 and report.experts == () and report.exit_code == 1
    assert "of another shape [44, 30] / [11, 30]" in text_of(report)


def test_mixed_layers(make: Make) -> None:
    """Where both are dense the layers are compared, where only B has experts these meet A's feed-forward."""
    mixed = replace(DENSE, architecture=Architecture.SKYMOE, moe=MoESpec(num_experts=2, top_k=1, ffn_size=44),
                    moe_layers=(1,))  # fmt: skip
    report = compare(make("dense", DENSE), make("mixed", mixed), experts=True)
    assert {row.layer for row in report.experts} == {1}
    assert row_of(report, "layers.0.mlp.up.weight").verdict is Verdict.SAME
    assert row_of(report, "layers.1.moe.router.weight").equal


def test_experts_need_a_dense_parent(make: Make) -> None:
    moe = make("moe", MOE)
    with pytest.raises(ConfigError, match="no layer is dense in A"):
        compare(moe, moe, experts=True)
    with pytest.raises(ConfigError, match="choose one"):
        compare(moe, moe, experts=True, raw=True)


def test_a_tied_head_is_the_embedding(make: Make) -> None:
    tied = make("tied", replace(DENSE, tie_embeddings=True))
    untied = make("untied", DENSE)
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    change(untied, "lm_head.weight", lambda _: embedding.clone())
    for pair in ((tied, untied), (untied, tied)):
        report = compare(*pair)
        assert report.equal and row_of(report, "head.weight").verdict is Verdict.SAME
        assert [row.name for row in report.fields] == ["config.json:tie_word_embeddings", "tie_embeddings"][::-1]


def test_fields_that_change_the_computation(make: Make) -> None:
    a = make("a", replace(MOE, architecture=Architecture.SKYMOE))
    norm = replace(MOE.moe, gate_norm=GateNormSpec(scale=2.0))
    b = make("b", replace(MOE, architecture=Architecture.SKYMOE, moe=norm, eos_ids=(3,)))
    report = compare(a, b)
    assert set(report.counts) == {"same"} and report.exit_code == 1
    found = {row.name: row.equal for row in report.fields}
    assert found["moe.gate_norm"] is False and found["eos_ids"] is True and found["config.json:eos_token_id"] is True
    again = compare(b, make("c", replace(MOE, architecture=Architecture.SKYMOE, moe=norm, eos_ids=(3, 4))))
    assert again.exit_code == 0 and {row.name for row in again.fields} >= {"eos_ids"}


SHARED = replace(
    MOE, architecture=Architecture.SKYMOE, moe=MoESpec(num_experts=5, top_k=2, ffn_size=44, shared_ffn_size=21)
)
LAYERS = [f"model.layers.{layer}.mlp.shared_expert" for layer in range(3)]


def test_an_exact_export_that_adds_a_zero_shared_expert_is_equal(make: Make) -> None:
    a = make("a", MOE)
    b = a.parent / "b"
    export(check_config(ExportConfig, {"source": str(a), "out": str(b), "format": "qwen2_moe", "receipt_tokens": 0}))
    for left, right, side in ((a, b, "B"), (b, a, "A")):
        report = compare(left, right, block_bytes=1000)
        assert report.counts == {"same": 69, "adds nothing": 12} and report.exit_code == 0
        assert {row.name: row.equal for row in report.fields} == {"architecture": True, "moe.shared_ffn_size": True}
        shown = text_of(report)
        assert f"only in {side}, adds nothing" in shown and "12 without a partner, adding nothing" in shown
    row = row_of(compare(a, b), "layers.2.moe.shared.down.weight")
    assert (row.equal, row.left, row.right) == (True, "", f"{LAYERS[2]}.down_proj.weight")
    raw = compare(a, b, raw=True)
    assert raw.exit_code == 1 and "adds nothing" not in raw.counts


@pytest.mark.parametrize("zero", ["down_proj", "gate_proj", "up_proj"])
def test_one_matrix_of_zeros_silences_a_shared_expert(make: Make, zero: str) -> None:
    shared = make("shared", SHARED)
    plain = make("plain", replace(MOE, architecture=Architecture.SKYMOE))
    tensors = load_file(shared / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if ".shared_expert" not in name}
    save_file(rest, plain / "model.safetensors")
    for layer in LAYERS[:2]:
        change(shared, f"{layer}.{zero}.weight", torch.zeros_like)
    report = compare(plain, shared)  # one layer still computes something
    assert (report.counts["only B"], report.counts["adds nothing"], report.exit_code) == (4, 8, 1)
    assert {row.name: row.equal for row in report.fields} == {"moe.shared_ffn_size": False, SIZE_FIELD: True}
    change(shared, f"{LAYERS[2]}_gate.weight", torch.zeros_like)  # sigmoid(0) is 1/2
    assert compare(plain, shared).exit_code == 1
    change(shared, f"{LAYERS[2]}.{zero}.weight", torch.zeros_like)
    assert compare(plain, shared, block_bytes=100).exit_code == 0
    other = "up_proj" if zero == "down_proj" else "down_proj"
    change(shared, f"{LAYERS[0]}.{other}.weight", lambda weight: weight.index_fill(0, torch.tensor([3]), torch.inf))
    assert compare(plain, shared).exit_code == 1  # 0 times infinity is no number


SIZE_FIELD = "config.json:shared_expert_intermediate_size"


def test_biases_of_zero_that_one_model_has(make: Make) -> None:
    spec = replace(MOE, architecture=Architecture.SKYMOE)
    biased = replace(spec, qkv_bias=True, o_bias=True, moe=replace(MOE.moe, expert_bias=True))
    a, b = make("a", spec), make("b", biased)  # biases start at zero
    tensors = load_file(b / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "bias" not in name}, a / "model.safetensors")
    report = compare(a, b)
    assert report.counts["adds nothing"] == 3 * 5 and report.exit_code == 0
    change(b, "model.layers.1.self_attn.k_proj.bias", lambda bias: bias.index_fill(0, torch.tensor([4]), 1e-30))
    report = compare(a, b)
    assert (report.counts["only B"], report.counts["adds nothing"], report.exit_code) == (1, 14, 1)
    fields = {row.name: row.equal for row in report.fields}
    assert (fields["qkv_bias"], fields["o_bias"], fields["moe.expert_bias"]) == (False, True, True)


def test_raw_compares_names_and_stored_numbers(make: Make) -> None:
    a, b = make("a", MOE), make("b", replace(MOE, architecture=Architecture.SKYMOE))
    report = compare(a, b, raw=True)
    assert report.raw and report.counts["only A"] == report.counts["only B"] == 3 * 16
    assert compare(a, a, raw=True).exit_code == 0
    fields = {row.name: row.equal for row in report.fields}
    assert fields["config.json:model_type"] is False and fields["config.json:auto_map"] is True


def test_two_models_that_nobody_knows_are_compared_by_name(make: Make) -> None:
    a = make("a", DENSE)
    for name in ("b", "c"):
        shutil.copytree(a, a.parent / name)
        (a.parent / name / "config.json").write_text('{"model_type": "unheard_of"}')
    report = compare(a.parent / "b", a.parent / "c")
    assert report.raw and report.equal and "unheard_of" in report.notes[0]
    with pytest.raises(FormatError, match=r"unheard_of(?s:.*)known: "):
        compare(a, a.parent / "b")
    (a.parent / "b" / "config.json").unlink()
    with pytest.raises(FormatError, match="--raw"):
        compare(a.parent / "b", a)
    assert compare(a.parent / "b", a, raw=True).counts == {"same": 30}


def test_the_schema_is_the_documented_one(make: Make) -> None:
    a = make("a", DENSE)
    data = compare(a, a).as_json()
    text = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    for name in (*data, *data["tensors"][0], *vars(compare(a, a).tensors[0])):
        assert f"`{name}`" in text, name
    for verdict in Verdict:
        assert f"`{verdict.value}`" in text


def test_memory_does_not_grow_with_the_tensor(make: Make) -> None:
    """No block is larger than asked, whatever the tensor: seen at the reader."""
    from skymoe.weights.reader import WeightsReader

    sizes = []
    read = WeightsReader.slice

    def watched(self: WeightsReader, name: str, *parts: range) -> torch.Tensor:
        block = read(self, name, *parts)
        sizes.append(block.numel())
        return block

    a = make("a", replace(DENSE, vocab_size=997))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsReader, "slice", watched)
        assert compare(a, a, block_bytes=8 * 30 * 7).equal
    assert max(sizes) == 30 * 7
