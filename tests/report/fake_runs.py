"""Run directories that look like real ones: for tests of the report and for working on its looks.

`python tests/report/fake_runs.py DIR` writes a whole demo directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

DOMAINS = ("prose", "docs", "code")
RECIPE = """model:
  path: {parent}
run:
  dir: {name}
  seed: 0
steps: {steps}
data:
  sources:
  - prefix: corpus/prose
    weight: 0.5
  - prefix: corpus/docs
    weight: 0.3
  - prefix: corpus/code
    weight: 0.2
  sequence_length: 256
batch:
  sequences: 16
  micro_batches: 2
optimizer:
  lr: {lr}
  weight_decay: 0.1
schedule:
  kind: warmup-stable-decay
  warmup: 20
balance:
  aux_loss: {aux}
"""


def write_run(
    path: Path,
    *,
    moe: bool,
    steps: int = 300,
    layers: int = 6,
    experts: int = 8,
    start: float = 5.2,
    end: float = 3.35,
    evals: bool = True,
    seed: int = 0,
    parent: str | None = "dense",
) -> Path:
    """One run directory in the shape `skymoe train` writes."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    parameters = 4_800_000 * (4 if moe else 1)
    flops_per_token = 31e6 * (1.7 if moe else 1.0)
    lines: list[dict[str, Any]] = [
        {
            "kind": "run", "schema": 1, "architecture": "skywork_moe" if moe else "llama", "parameters": parameters,
            "active_parameters": 7_900_000 if moe else parameters, "flops_per_token": flops_per_token,
            "moe_layers": list(range(layers)) if moe else [], "seed": 0, "parent": parent,
        },
        {"kind": "event", "step": 0, "event": "start", "detail": "fresh"},
    ]  # fmt: skip
    batch_tokens = 16 * 256
    for step in range(steps + 1):
        done = step / steps
        loss = end + (start - end) * np.exp(-5 * done)
        common = {"step": step, "tokens": step * batch_tokens, "flops": step * batch_tokens * flops_per_token}
        if evals and step % max(1, steps // 12) == 0:
            lines.append(_evaluation(common, loss, moe, layers, experts, rng, done))
        if step == steps:
            break
        speed = (9_300 if moe else 17_400) * (1 + 0.03 * rng.standard_normal())
        record = {
            "kind": "train", **common, "step": step + 1, "tokens": (step + 1) * batch_tokens,
            "flops": (step + 1) * batch_tokens * flops_per_token, "loss": loss + 0.05 * rng.standard_normal(),
            "aux_loss": 0.001 if moe else 0.0, "z_loss": 0.0, "lr": 6e-4 * min(1, (step + 1) / 20),
            "grad_norm": 0.8 + 0.1 * rng.random(), "tokens_per_s": speed, "mfu_causal": 0.31 + 0.01 * rng.random(),
            "mfu_full": 0.33 + 0.01 * rng.random(), "seconds": (step + 1) * batch_tokens / speed,
        }  # fmt: skip
        if moe:
            record["layers"] = _layers(done, layers, rng)
        lines.append(record)
    lines.append({"kind": "event", "step": steps, "event": "stop", "detail": "finished"})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    aux = "skywork" if moe else "none"
    recipe = RECIPE.format(parent=parent, name=path.name, steps=steps, lr="6e-4" if moe else "3e-4", aux=aux)
    (path / "recipe.yaml").write_text(recipe)
    environment = {
        "python": "3.11.9", "platform": "Linux-6.1-x86_64", "torch": "2.13.0+cpu", "skymoe": "0.1.0",
        "cpu": "2 cores", "threads": 2, "command": f"skymoe train recipe.yaml run.dir={path.name}",
        "packages": {"numpy": "2.4.6", "safetensors": "0.8.0"},
    }  # fmt: skip
    (path / "environment.json").write_text(json.dumps(environment))
    return path


def write_demo(path: Path, *, steps: int = 300, layers: int = 6, experts: int = 8) -> Path:
    """A demo directory as `skymoe demo --out` leaves it."""
    write_run(path / "dense-pretrain", moe=False, steps=steps, start=9.0, end=5.2, seed=1, parent=None)
    write_run(path / "dense-continue", moe=False, steps=steps, seed=2, end=3.46)
    write_run(path / "moe-train", moe=True, steps=steps, layers=layers, experts=experts, seed=3)
    (path / "moe").mkdir()
    receipt = {
        "method": "copy", "experts": experts, "top_k": 2, "gate_norm": True, "max_abs_dlogit": 4.76837158203125e-07,
        "kl": 1.2e-13, "exact": True, "dtype": "float32", "tokens": 512,
        "reason": "the k chosen weights are renormalized, so k equal experts give the dense output",
    }  # fmt: skip
    (path / "moe" / "receipt.json").write_text(json.dumps(receipt))
    summary = {
        "dense_bits_per_byte": 2.31, "moe_bits_per_byte": 2.24, "receipt": receipt, "seed": 0, "quick": False,
        "seconds": {"corpus": 3.1, "tokenizer": 4.0, "dense": 41.2, "upcycle": 2.2, "moe": 60.3, "total": 131.0},
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    samples = [
        {
            "prompt": "def read_lines(path",
            "dense": "):\n    \"\"\"Return the lines.\"\"\"\n    with open(path) as f:\n        return f.read",
            "moe": ", encoding=None):\n    \"\"\"A list.\"\"\"\n    with open(path) as f:\n        return list(f)",
        },
        {
            "prompt": "The list type is",
            "dense": " a sequence of the object. The object is a sequence of the object, and the result",
            "moe": " a mutable sequence. If the index is out of range, IndexError is raised; otherwise the item",
        },
    ]  # fmt: skip
    (path / "samples.json").write_text(json.dumps(samples))
    return path


def _layers(done: float, layers: int, rng: np.random.Generator) -> dict[str, list[float]]:
    depth = np.linspace(0, 1, layers)
    drop = 0.02 + (0.10 - 0.05 * depth) * np.exp(-6 * done) + 0.008 * rng.standard_normal(layers)
    alpha = np.minimum(0.01, 0.2 * (0.02 + (0.10 - 0.05 * depth) * np.exp(-6 * max(0.0, done - 0.15))))
    return {
        "drop_rate": np.abs(drop).tolist(),
        "alpha": alpha.tolist(),
        "max1_max2": (
            1.25 + (0.5 + 0.5 * depth) * (1 - np.exp(-4 * done)) + 0.03 * rng.standard_normal(layers)
        ).tolist(),
        "max2_max3": (1.15 + 0.35 * depth * (1 - np.exp(-4 * done)) + 0.02 * rng.standard_normal(layers)).tolist(),
        "load_cov": (0.15 + 0.5 * np.exp(-6 * done) + 0.02 * rng.standard_normal(layers)).tolist(),
        "dead_experts": [0.0] * layers,
        "gate_entropy": (2.0 - 0.5 * depth * done + 0.01 * rng.standard_normal(layers)).tolist(),
    }


def _evaluation(
    common: dict[str, Any], loss: float, moe: bool, layers: int, experts: int, rng: np.random.Generator, done: float
) -> dict[str, Any]:
    shift = {"prose": 0.25, "docs": 0.0, "code": -0.35}
    losses = {domain: loss + shift[domain] for domain in DOMAINS}
    record = {
        "kind": "eval", **common, "loss": losses,
        "bits_per_byte": {"all": loss / 1.52, **{d: x / 1.52 for d, x in losses.items()}},
    }  # fmt: skip
    if moe:
        share = {d: rng.dirichlet(np.full(experts, 6.0 + 40 * (1 - done)), size=layers) for d in DOMAINS}
        record["expert_load"] = {d: rows.tolist() for d, rows in share.items()}
        record["expert_similarity"] = (1 - (0.25 + 0.2 * np.linspace(1, 0, layers)) * (1 - np.exp(-3 * done))).tolist()
    return record


if __name__ == "__main__":
    write_demo(Path(sys.argv[1]))
