"""A tiny model on a synthetic token file: what every training test is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from skymoe.base.config import check_config
from skymoe.ckpt.config import DiffConfig
from skymoe.ckpt.run import run_diff
from skymoe.data.indexed import IndexedWriter
from skymoe.train.config import TrainConfig
from skymoe.train.metrics import read_metrics

VOCAB = 257
DENSE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 40,
    "max_position": 64,
}  # fmt: skip
MOE: dict[str, Any] = {**DENSE, "moe": {"num_experts": 5, "top_k": 2, "ffn_size": 24}}


def write_tokens(prefix: Path, *, seed: int = 0, documents: int = 40) -> Path:
    """Documents of a first-order pattern with noise: learnable, of odd lengths."""
    rng = np.random.default_rng(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            length = int(rng.integers(20, 90))
            noise = rng.integers(0, 7, length)
            writer.add_document((np.cumsum(noise) * 3 % VOCAB).astype(np.uint16))
        writer.finish()
    return prefix


def recipe(root: Path, *, spec: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """A recipe over data in `root/data`, which is written when it is missing; `changes` replace or extend sections."""
    for name, seed in (("train", 0), ("valid", 1)):
        if not (root / "data" / f"{name}.idx").exists():
            write_tokens(root / "data" / name, seed=seed)
    base: dict[str, Any] = {
        "run": {"dir": str(root / "run")},
        "model": {"spec": spec or MOE},
        "data": {
            "train": [{"path": str(root / "data" / "train")}],
            "valid": [{"path": str(root / "data" / "valid")}],
            "sequence_length": 19,
        },
        "steps": 12,
        "batch": {"sequences": 5, "micro_sequences": 2},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "precision": {"compute": "float32", "peak_flops": 1e11},
        "checkpoint": {"every": 4, "keep": 3},
        "evaluate": {"every": 6, "windows": 5},
        "log": {"every": 3},
        "threads": 1,
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return check_config(TrainConfig, base)


def assert_same_state(left: Path, right: Path) -> None:
    """The newest generations of two runs are equal bit for bit: tensors, alpha, counters, guard, last evaluation."""
    report = run_diff(DiffConfig(left=left, right=right))
    assert report.exit_code == 0, report.differences
    assert report.num_tensors > 10


def untimed_lines(directory: Path) -> list[dict[str, Any]]:
    """The train and eval lines of a run without what the clock decides."""
    timed = {"seconds", "tokens_per_s", "tokens_per_s_per_device", "mfu_causal", "mfu_full", "hfu"}
    lines = read_metrics(directory / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["kind"] in ("train", "eval")]
