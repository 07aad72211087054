"""`skymoe plan train --profile`: the plan is priced by what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skymoe.base.errors import FormatError
from skymoe.plan.train.config import PlanTrainConfig
from skymoe.plan.train.run import run
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.presets import preset

SPEC = preset("demo-dense")


def piece(seconds: float, **more: float) -> dict[str, float]:
    return {"forward_s": seconds, "backward_s": 2 * seconds, "spread": 0.0, **more}


def profile(layer_s: float, head_s: float) -> dict[str, Any]:
    half = piece(layer_s / 2, again_forward_s=layer_s / 2, again_backward_s=1.5 * layer_s, kept=1e6, kept_again=1e5)
    whole = piece(layer_s, again_forward_s=layer_s, again_backward_s=3 * layer_s, kept=2e6, kept_again=1e5)
    return {
        "format": "skymoe-profile", "version": 1,
        "machine": {"device": "cpu", "title": "a test", "memory": 4e9, "ranks": 2, "threads": 1, "torch": "2",
                    "load": 0, "clock": "thread"},
        "gemm": {"fp32": []},
        "law": {"fp32": {"rate": 8e10, "bandwidth": 1e10, "launch_s": 5e-6, "error": 0.1}},
        "stream": 2e10, "links": {}, "update_s": 2e-9,
        "times": {
            "model": {"name": "demo-dense", "hidden_size": SPEC.hidden_size, "vocab_size": SPEC.vocab_size,
                      "num_heads": SPEC.num_heads, "num_kv_heads": SPEC.num_kv_heads, "head_dim": SPEC.head_dim,
                      "ffn_size": SPEC.ffn_size, "num_experts": 0, "top_k": 0, "expert_size": 0, "shared_size": 0,
                      "weights": "random"},
            "sequence_length": 128, "micro_batch": 1, "precision": "fp32",
            "kinds": [{"is_moe": False, "attention": half, "feed_forward": half, "layer": whole}],
            "embedding": piece(0.0), "head": piece(head_s),
        },
    }  # fmt: skip


def planned(path: Path | None) -> Any:
    return run(
        PlanTrainConfig(
            model="demo-dense", gpus=2, gpu="cpu", profile=path, pp=2, tp=1, dp=1, seq=128, micro_batch=1,
            global_batch_tokens=128 * 8, schedule=ScheduleKind.ONE_F_ONE_B, whole_layers=True,
        )
    )  # fmt: skip


def test_the_split_follows_the_measured_head(tmp_path: Path) -> None:
    """A head that costs two layers takes their place; the step is that of the measured seconds."""
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile(layer_s=0.01, head_s=0.02)))
    plan = planned(path).as_json()
    assert SPEC.num_layers == 4
    assert list(plan["split"]) == [3, 1]
    assert plan["step_time_s"] == pytest.approx(9 * 3 * 0.03, rel=0.05)  # m + P - 1 periods of three layers
    assert plan["step_time_s"] > 2 * planned(None).as_json()["step_time_s"]


def test_no_profile_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        planned(tmp_path / "none.json")
