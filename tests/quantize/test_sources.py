"""An FP8 directory is a model like any other: what the other commands make of it is what it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import skymoe
from skymoe.convert.text import TEXT
from skymoe.data.tokenizer import train_tokenizer
from skymoe.export.config import ExportConfig, Format
from skymoe.export.run import run as export
from skymoe.quantize.config import QuantizeConfig
from skymoe.quantize.run import run as quantize
from skymoe.spec.hf import read_config
from skymoe.spec.quantization import FIELD, Fp8Scheme
from skymoe.upcycle.config import UpcycleConfig
from skymoe.upcycle.run import run as upcycle
from skymoe.weights.reader import WeightsReader

TOKENS = torch.arange(24).view(2, 12)


def fp8(oracle: Any, path: Path, family: str, scheme: Fp8Scheme) -> Path:
    options = dict(hidden_size=128, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    oracle.make(path / "plain", family, **options, dtype=torch.bfloat16)
    quantize(QuantizeConfig(source=str(path / "plain"), out=path / "fp8", scheme=scheme, receipt_tokens=0))
    return path / "fp8"


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_export_from_fp8(oracle: Any, tmp_path: Path, scheme: Fp8Scheme, dtype: str) -> None:
    source, out = fp8(oracle, tmp_path, "mixtral", scheme), tmp_path / "out"
    data = {"source": str(source), "out": str(out), "format": "skymoe", "receipt_tokens": 8, "dtype": dtype}
    report = export(ExportConfig.model_validate_json(json.dumps(data)))
    assert FIELD not in read_config(out)
    same = torch.equal(skymoe.load(out, dtype)(TOKENS), skymoe.load(source, dtype)(TOKENS))
    assert same and (report.exact or dtype == "bfloat16")
    assert report.exact or "rounded to a narrower format" in report.reason


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_upcycle_from_fp8(oracle: Any, tmp_path: Path, scheme: Fp8Scheme) -> None:
    source, out = fp8(oracle, tmp_path, "llama", scheme), tmp_path / "out"
    upcycle(UpcycleConfig(sources=(source,), out=out, experts=3, receipt_tokens=0))
    with WeightsReader(out) as reader:
        assert {str(info.dtype) for name, info in reader.names().items() if ".gate." not in name} == {"bfloat16"}
    difference = skymoe.load(out).float()(TOKENS) - skymoe.load(source).float()(TOKENS)
    assert difference.abs().max() < 1e-4


def test_quantize_after_the_gate_norm_was_folded(oracle: Any, tmp_path: Path) -> None:
    """Folded routers are fp32 in a bf16 model; transformers computes the FP8 form of it all the same."""
    from transformers import AutoModelForCausalLM

    pytest.importorskip("accelerate")
    pytest.importorskip("tokenizers")
    dense, moe, folded, out = (tmp_path / name for name in ("dense", "moe", "folded", "fp8"))
    options = dict(hidden_size=128, intermediate_size=128, num_attention_heads=1, num_key_value_heads=1, head_dim=128)
    oracle.make(dense, "llama", **options, vocab_size=300, dtype=torch.bfloat16)
    train_tokenizer([TEXT], 280).save(dense)
    upcycle(UpcycleConfig(sources=(dense,), out=moe, experts=4, gate_norm=True, receipt_tokens=0))
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    fold = dict(fold_gate_norm=True, text=text, max_kl=1.0, receipt_tokens=0)
    export(ExportConfig(source=moe, out=folded, format=Format.MIXTRAL, **fold))
    report = quantize(QuantizeConfig(source=str(folded), out=out, receipt_tokens=8))
    assert report.rounded == tuple(f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(len(report.rounded)))
    assert report.rounded and any("rounded to bfloat16, the type of the embedding" in told for told in report.remarks)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    with torch.no_grad():
        difference = model(TOKENS).logits - skymoe.load(out).float()(TOKENS)
    assert model.dtype == torch.bfloat16 and difference.abs().max() < 0.1
