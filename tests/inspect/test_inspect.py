from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError
from skymoe.inspect.config import InspectConfig
from skymoe.inspect.result import InspectReport, Spread
from skymoe.inspect.run import run
from skymoe.inspect.table import show
from skymoe.model.init import initialize
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec
from skymoe.spec.presets import PRESETS

SPEC = ModelSpec(
    architecture=Architecture.SKYWORK_MOE, vocab_size=61, hidden_size=30, num_layers=3, ffn_size=44, num_heads=3,
    num_kv_heads=3, head_dim=10, max_position=64,
    moe=MoESpec(num_experts=5, top_k=2, ffn_size=21, gate_norm=GateNormSpec()),
)  # fmt: skip


def look(model: object, **options: Any) -> InspectReport:
    return run(InspectConfig(model=str(model), **options))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Transformer]:
    model = initialize(Transformer(SPEC), seed=2)
    with torch.no_grad():  # experts that are alike, differently in each layer
        for layer, block in enumerate(model.layers):
            experts = block.moe.experts
            for weight in (experts.gate_up, experts.down):
                weight.copy_(weight[:1] + weight * (layer + 0.3))
    path = tmp_path_factory.mktemp("inspect") / "moe"
    save_pretrained(model, path)
    return path, model


def test_the_skywork_preset_counts_what_the_paper_says() -> None:
    report = look("skywork-moe")
    assert (round(report.parameters / 1e9, 2), round(report.active_parameters / 1e9, 2)) == (146.36, 22.69)
    assert sum(report.parameters_by_part.values()) == report.parameters
    assert report.bytes.on_disk is None and report.experts == () and report.expert_similarity is None
    assert report.shape["moe"]["gate_norm"]["ddof"] == 1


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_printed_and_is_plain_json(name: str) -> None:
    report = look(name)
    json.dumps(report.as_json(), allow_nan=False)
    console = Console(width=100, record=True, file=io.StringIO())
    show(report, console)
    text = console.export_text()
    assert name in text and f"{report.parameters:,}" in text and "training step" in text


def test_presets_need_no_torch() -> None:
    code = (
        "import sys; from skymoe.inspect.run import run; from skymoe.inspect.table import show\n"
        "from skymoe.inspect.config import InspectConfig\n"
        "show(run(InspectConfig(model='skywork-moe'))); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_the_flops_follow_the_sequence_length() -> None:
    short, long = (look("skywork-13b", sequence_length=length).flops_per_token for length in (1, 4096))
    assert short.forward_causal == short.forward_full < long.forward_causal < long.forward_full
    assert long.training_causal == pytest.approx(3 * long.forward_causal)
    assert sum(long.parts.values()) == pytest.approx(long.forward_causal)


def test_a_directory_has_the_parameters_and_bytes_of_its_module(saved: tuple[Path, Transformer]) -> None:
    path, model = saved
    report = look(path)
    assert report.source == "directory" and report.architecture == "skywork_moe"
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.bytes.by_dtype == {"float32": 4 * report.parameters}
    assert report.bytes.on_disk == sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert report.bytes.weights["bfloat16"] == 2 * report.parameters


def reference(weights_EX: list[torch.Tensor]) -> Spread:
    flat = torch.cat([part.detach().flatten(1) for part in weights_EX], 1).double()
    pairs = [float(torch.cosine_similarity(flat[i], flat[j], dim=0)) for i in range(len(flat)) for j in range(i)]
    return Spread(sum(pairs) / len(pairs), min(pairs), max(pairs))


def assert_close(found: Spread, expected: Spread) -> None:
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), abs=1e-6)


@pytest.mark.parametrize("chunk_bytes", [1024, 5000, 2**28])
def test_similarity_of_every_layer_and_matrix(saved: tuple[Path, Transformer], chunk_bytes: int) -> None:
    path, model = saved
    report = look(path, chunk_bytes=chunk_bytes)
    size = SPEC.moe.ffn_size if SPEC.moe else 0
    for layer, figures, router in zip(model.layers, report.experts, report.routers, strict=True):
        gate_up, down = layer.moe.experts.gate_up, layer.moe.experts.down
        assert_close(figures.gate, reference([gate_up[:, :size]]))
        assert_close(figures.up, reference([gate_up[:, size:]]))
        assert_close(figures.down, reference([down]))
        assert_close(figures.all, reference([gate_up, down]))
        norms = layer.moe.router.weight.detach().norm(dim=1)
        assert_close(router.row_norm, Spread(float(norms.mean()), float(norms.min()), float(norms.max())))
        assert_close(router.row_cosine, reference([layer.moe.router.weight]))
    means = [figures.all.mean for figures in report.experts]
    assert report.expert_similarity == pytest.approx(sum(means) / len(means))
    assert means[0] > means[1] > means[2]


def test_the_tables_name_every_layer(saved: tuple[Path, Transformer]) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    report = look(saved[0])
    show(report, console)
    text = console.export_text()
    assert "gate normalization" in text and "expert similarity" in text and f"{report.expert_similarity:.4f}" in text


def test_experts_stacked_in_one_tensor_are_read_too(oracle: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = oracle.make(tmp_path / "q", "qwen3_moe")
    separate = look(path)
    weights = load_file(path / "model.safetensors")
    fused: dict[str, torch.Tensor] = {}
    for name in list(weights):
        if ".experts." in name:
            prefix, rest = name.split(".experts.")
            fused.setdefault(prefix, torch.empty(0))
    for prefix in fused:

        def stack(kind: str, prefix: str = prefix) -> torch.Tensor:
            return torch.stack([weights.pop(f"{prefix}.experts.{e}.{kind}_proj.weight") for e in range(5)])

        gate, up, down = stack("gate"), stack("up"), stack("down")
        weights[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up], 1).contiguous()
        weights[f"{prefix}.experts.down_proj"] = down.contiguous()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    stacked = look(path)
    for one, other in zip(separate.experts, stacked.experts, strict=True):
        assert_close(one.all, other.all)
        assert_close(one.up, other.up)


def test_a_dense_directory_and_headers_only(oracle: Any, tmp_path: Path, saved: tuple[Path, Transformer]) -> None:
    dense = look(oracle.make(tmp_path / "d", "qwen2"))
    assert dense.experts == () and "experts" not in dense.parameters_by_part
    headers = look(saved[0], weights=False)
    assert headers.experts == () and headers.parameters == look(saved[0]).parameters


def test_bfloat16_files(tmp_path: Path) -> None:
    save_pretrained(initialize(Transformer(SPEC), seed=1), tmp_path / "b", dtype=DType.BFLOAT16)
    report = look(tmp_path / "b")
    assert report.bytes.by_dtype["bfloat16"] == 2 * report.parameters
    assert abs(report.experts[0].all.mean) < 0.1  # random experts have nothing in common


def test_nan_weights_show_as_nan(saved: tuple[Path, Transformer], tmp_path: Path) -> None:
    model = initialize(Transformer(SPEC), seed=2)
    with torch.no_grad():
        model.layers[1].moe.experts.down[3, 0, 0] = math.nan
    save_pretrained(model, tmp_path / "nan")
    report = look(tmp_path / "nan")
    assert math.isnan(report.experts[1].all.mean) and math.isfinite(report.experts[0].all.mean)
    assert math.isnan(report.experts[1].down.max)


def test_what_is_no_model_is_refused(saved: tuple[Path, Transformer], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such model directory or preset"):
        look(tmp_path / "nothing")
    broken = tmp_path / "broken"
    shutil.copytree(saved[0], broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(FormatError, match="missing"):
        look(broken)
