"""The paper's split: 36 heads of 128 and 16 experts of 12288 columns, FP8 in blocks of 128, on eight real ranks, and
behind the server.

One layer of random weights (2.8 GB on disk); the widths are those of the preset.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from engine.ranks import difference

from skymoe.base.dtype import DType
from skymoe.data.tokenizer import train_tokenizer
from skymoe.engine.config import EngineConfig
from skymoe.engine.group import open_group
from skymoe.engine.step import Chunk, StepPlan
from skymoe.model.save import write_config_files
from skymoe.quantize.plan import plan_quantize, sources_of
from skymoe.spec.presets import preset
from skymoe.spec.quantization import FIELD, Fp8Scheme, write_quantization
from skymoe.weights.writer import ShardedWriter

STEP = StepPlan((Chunk((1, 500, 77, 12, 1023), 0, (3,), 2), Chunk((9,), 0, (1,), 1)))


def write_layer(path: Path) -> Path:
    """A skywork-moe of one layer with random FP8 weights, one tensor at a time."""
    path.mkdir()
    spec = replace(preset("skywork-moe"), num_layers=1, vocab_size=1024)
    plan = plan_quantize(spec, sources_of(spec, DType.BFLOAT16), Fp8Scheme.BLOCK)
    targets = plan.conversion.tensors
    generator = torch.Generator().manual_seed(0)
    tile = torch.randint(0, 256, (1 << 20,), generator=generator, dtype=torch.uint8) & 0xBF  # up to 1.875, both signs
    with ShardedWriter(path, [(t.name, t.dtype, t.shape) for t in targets]) as writer:
        for target in targets:
            shape = torch.Size(target.shape)
            if target.dtype is DType.FLOAT8_E4M3:
                flat = tile.repeat(-(-shape.numel() // len(tile)))[: shape.numel()]
                writer.add(target.name, flat.view(torch.float8_e4m3fn).view(shape))
            elif target.dtype is DType.FLOAT32:
                writer.add(target.name, 0.02 + 0.02 * torch.rand(shape, generator=generator))
            else:
                mean = 1.0 if "norm" in target.name else 0.0
                writer.add(target.name, torch.randn(shape, generator=generator).mul(0.1).add(mean).bfloat16())
    extra = {FIELD: write_quantization(plan.quantization)}
    write_config_files(path, spec, DType.BFLOAT16, extra_config=extra)
    return path


@pytest.mark.slow
def test_skywork_moe_on_eight_ranks(tmp_path: Path) -> None:
    path = write_layer(tmp_path / "m")
    found = {}
    for tp in (1, 8):
        config = EngineConfig(
            model=path, tp=tp, dtype=DType.FLOAT32, max_batch=2, max_model_len=64, threads=1, timeout_s=300
        )
        with open_group(config) as ranks:
            assert ranks.weights == "fp8"
            if tp == 8:
                assert ranks.plan.split.heads == (5, 5, 5, 5, 4, 4, 4, 4)
                assert ranks.plan.split.columns == (1536,) * 8
            found[tp] = ranks.run(STEP)
    assert difference(found[8], found[1]) < 1e-5
    assert answer_over_http(path, STEP.chunks[0].tokens) == int(found[1][1].argmax())


def answer_over_http(path: Path, prompt: tuple[int, ...]) -> int:
    """The most likely token after `prompt`, of `skymoe serve --tp 8`."""
    train_tokenizer(["the quick brown fox jumps over the lazy dog"], 300).save(path)
    command = [sys.executable, "-m", "skymoe", "serve", str(path), "--tp", "8", "--port", "0", "--dtype", "float32"]
    options = [
        "--max-model-len",
        "64",
        "--max-batch",
        "2",
        "--set",
        "engine.threads=1",
        "--set",
        "engine.timeout_s=300",
    ]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().removeprefix("ready ").strip()
            body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "return_token_ids": True}
            with httpx.Client(base_url=url, trust_env=False, timeout=300) as client:
                said = client.post("/v1/completions", json={"model": client.get("/stats").json()["model"], **body})
                assert said.status_code == 200, said.text
                assert client.get("/stats").json()["split"]["heads"] == [5, 5, 5, 5, 4, 4, 4, 4]
                return int(said.json()["choices"][0]["token_ids"][0])
        finally:
            process.send_signal(signal.SIGTERM)
