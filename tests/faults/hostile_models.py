"""Four hundred malicious model directories, each made from a tiny valid one by a function with a name.

`BASES` are the valid ones, `CASES` what is done to them; the tables are in the files `hostile_*` beside this one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from faults.hostile_beside import BESIDE, tokenizer
from faults.hostile_configs import CONFIGS
from faults.hostile_fp8 import FP8, QUANTIZED, SCALE
from faults.hostile_headers import HEADERS
from faults.hostile_indexes import INDEXES
from faults.hostile_tools import CONFIG, SECRET, VICTIM, WEIGHTS, Case
from safetensors.torch import load_file, save_file

from skymoe.model.init import initialize
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec

DENSE = ModelSpec(
    architecture=Architecture.LLAMA, vocab_size=61, hidden_size=30, num_layers=3, ffn_size=44, num_heads=3,
    num_kv_heads=3, head_dim=10, max_position=64,
)  # fmt: skip
MOE = replace(DENSE, architecture=Architecture.MIXTRAL, moe=MoESpec(num_experts=4, top_k=2, ffn_size=44))
SKYMOE = replace(
    DENSE,
    architecture=Architecture.SKYMOE,
    moe=MoESpec(num_experts=3, top_k=2, ffn_size=11, gate_norm=GateNormSpec()),
    moe_layers=(0, 2),
)

_TABLES = {"header": HEADERS, "config": CONFIGS, "index": INDEXES, "fp8": FP8, "beside": BESIDE}
CASES: dict[str, Case] = {f"{table}: {name}": case for table, cases in _TABLES.items() for name, case in cases.items()}


def save(spec: ModelSpec, path: Path, max_shard_bytes: int = 10**9) -> Path:
    save_pretrained(initialize(Transformer(spec), 0), path, max_shard_bytes=max_shard_bytes)
    tokenizer()(path)
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return path


def save_fp8(path: Path) -> Path:
    """The dense model with one weight in the block format of transformers: codes, and a scale per 128 x 128 block."""
    save(replace(DENSE, ffn_size=150), path)
    tensors = load_file(path / WEIGHTS)
    weight = tensors[QUANTIZED]
    blocks = [math.ceil(size / 128) for size in weight.shape]
    scale = float(weight.abs().max()) / 448
    tensors[SCALE], tensors[QUANTIZED] = torch.full(blocks, scale), (weight / scale).to(torch.float8_e4m3fn)
    save_file(tensors, path / WEIGHTS)
    config = json.loads((path / CONFIG).read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    (path / CONFIG).write_text(json.dumps(config))
    return path


BASES: dict[str, Callable[[Path], Path]] = {
    "dense": lambda path: save(DENSE, path),
    "moe": lambda path: save(MOE, path),
    "skymoe": lambda path: save(SKYMOE, path),
    "sharded": lambda path: save(DENSE, path, max_shard_bytes=20_000),
    "fp8": save_fp8,
}


def place(bases: Mapping[str, Path], name: str, parent: Path) -> Path:
    """A copy of a valid model in `parent`, beside a victim of the same shape in one file; the model's directory."""
    base = bases[name]
    parent.mkdir(parents=True)
    shutil.copytree(bases["dense"] if name == "sharded" else base, parent / VICTIM)
    (parent / VICTIM / "secret").write_bytes(SECRET)
    shutil.copytree(base, parent / "model")
    return parent / "model"
