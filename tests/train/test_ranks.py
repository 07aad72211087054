"""Training on many ranks as a run: one that changes its layout at every stop is the run of one process."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel.ranks import run_ranks
from train.tiny import MOE, recipe

from skymoe.base.errors import ConfigError
from skymoe.model.export import export_generation
from skymoe.model.load import load
from skymoe.parallel.heartbeat import Heartbeat
from skymoe.parallel.launch import World
from skymoe.train.batches import MicroBatch
from skymoe.train.config import TrainConfig
from skymoe.train.loop import train
from skymoe.train.metrics import read_metrics
from skymoe.train.passes import Pass
from skymoe.train.run import run
from skymoe.train.settings import run_directory
from skymoe.train.signals import StopRequest
from skymoe.train.start import start
from skymoe.weights.generation import Generation, latest_generation

SPEC = {**MOE, "num_heads": 4, "num_kv_heads": 2, "num_layers": 3}


def on_rank(config: TrainConfig) -> dict[str, Any]:
    """`skymoe train` in a world that is there already; what the state says at the end."""
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"), None, True)
    with run_directory(config.run.dir) if world.rank == 0 else nullcontext():
        job = start(config, world, Heartbeat())
        train(job, StopRequest())
        job.metrics.close()
        job.trackers.close()
    return {"resumed": job.resumed_from, "alpha": job.state.alpha.alpha_L, "evaluation": job.state.evaluation}


def settings(tmp_path: Path, name: str, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "model": {"spec": SPEC},
        "run": {"dir": str(tmp_path / name)},
        "batch": {"sequences": 8, "micro_sequences": 2},
        "schedule": {"kind": "constant"},
        "checkpoint": {"every": 0},
        "evaluate": {"every": 2, "windows": 5},
        "optimizer": {"lr": 1e-3, "eps": 1e-5},
        "log": {"every": 2},
    }
    return recipe(tmp_path, **{**base, **changes})


def generation(config: TrainConfig) -> Generation:
    found = latest_generation(config.run.dir / "checkpoints")
    assert found is not None
    return found


def assert_same(ours: Generation, theirs: Generation, tolerance: float) -> None:
    for stem in ("model", "optimizer"):
        left, right = ours.tensors(stem), theirs.tensors(stem)
        assert left.keys() == right.keys()
        for name, tensor in right.items():
            error = float((left[name] - tensor).norm() / tensor.norm().clamp_min(1e-9))
            assert error <= tolerance, f"{name}: {error:.1e}"


def test_a_run_goes_on_under_any_layout(tmp_path: Path) -> None:
    whole = settings(tmp_path, "whole", steps=8)
    run(whole)
    layouts: list[dict[str, Any]] = [
        {"pp": 2, "schedule": "zbv"},
        {"tp": 2, "dp": 2, "expert": "ep", "dispatch": "A"},
        {},
        {"pp": 3, "tp": 2, "dispatch": "R"},
    ]
    for number, parallel in enumerate(layouts, 1):
        part = settings(
            tmp_path, "changing", steps=2 * number, parallel=parallel, checkpoint={"asynchronous": number % 2 == 0}
        )
        size = parallel.get("pp", 1) * parallel.get("tp", 1) * parallel.get("dp", 1)
        if size == 1:
            assert run(part).resumed_from == 2 * number - 2
        else:
            told = run_ranks(size, on_rank, part)
            assert all(one == told[0] for one in told)
            assert told[0]["resumed"] == (2 * number - 2 or None)
    ours, theirs = generation(part), generation(whole)
    assert_same(ours, theirs, 2e-5)
    mine, other = ours.document("state"), theirs.document("state")
    assert mine["counters"]["next_sample"] == other["counters"]["next_sample"] == 64
    assert mine["alpha"]["alpha_L"] == pytest.approx(other["alpha"]["alpha_L"], rel=1e-6)
    for line, reference in zip(figures(part), figures(whole), strict=True):
        assert line == pytest.approx(reference, rel=1e-4)
    timelines = [line for line in read_metrics(part.run.dir / "metrics.jsonl") if line["kind"] == "timeline"]
    assert len(timelines) == 3 and all(line["spans"] and line["planned_spans"] for line in timelines)
    out = export_generation(ours, tmp_path / "exported")
    single = load(whole.run.dir / "model")
    for name, tensor in load(out).state_dict().items():
        torch.testing.assert_close(tensor, single.state_dict()[name], rtol=1e-3, atol=2e-6)


def figures(config: TrainConfig) -> list[dict[str, float]]:
    """What a reader sees of each logged step and evaluation; not the gate's sharpness, which is that of the last
    micro-batch, and replicas have one each.
    """
    layers = ("drop_rate", "alpha", "load_cov", "dead_experts")
    found = []
    for line in read_metrics(config.run.dir / "metrics.jsonl"):
        if line["kind"] == "train":
            numbers = {key: line[key] for key in ("step", "tokens", "loss", "aux_loss", "grad_norm")}
            found.append(numbers | {f"{key}{n}": v for key in layers for n, v in enumerate(line["layers"][key])})
        if line["kind"] == "eval":
            found.append({"eval": line["loss"]["all"], "similarity": sum(line["expert_similarity"])})
    return found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": {"pp": 2}}, "not the number of ranks, 1"),
        ({"parallel": {"dp": 2}}, "not the number of ranks, 1"),
        ({"recompute": [1, 0]}, "2 counts for 1 stages"),
    ],
)
def test_one_process_refuses_a_recipe_of_many(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(settings(tmp_path, "run", steps=2, **changes))
    assert not (tmp_path / "run").exists()


def with_a_bad_step(config: TrainConfig, bad_call: int) -> dict[str, Any]:
    """As `on_rank`, but on the last rank the hidden states of one training pass are not finite."""
    calls = 0
    forward = Pass.forward

    def spoiled(self: Pass, stage: int, x_ND: torch.Tensor | None, micro: MicroBatch) -> torch.Tensor:
        nonlocal calls
        y_ND = forward(self, stage, x_ND, micro)
        if torch.is_grad_enabled() and dist.get_rank() == dist.get_world_size() - 1:
            calls += 1
            if calls == bad_call:
                return y_ND * float("nan")
        return y_ND

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pass, "forward", spoiled)
        told = on_rank(config)
    return told


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_not_finite_on_one_rank_is_refused_by_all(tmp_path: Path, action: str, asynchronous: bool) -> None:
    """The fourth step; the run goes on as one process does that skips or rolls back, and loses no data position."""
    config = settings(
        tmp_path, "run", steps=6, parallel={"pp": 2}, guard={"non_finite": action},
        batch={"sequences": 8, "micro_sequences": 2}, checkpoint={"every": 2, "asynchronous": asynchronous},
    )  # fmt: skip
    told = run_ranks(2, with_a_bad_step, config, 3 * 4 + 2)
    assert told[0] == told[1]
    lines = read_metrics(config.run.dir / "metrics.jsonl")
    events = [line["event"] for line in lines if line["kind"] == "event"]
    assert events.count(action) == 1
    state = generation(config).document("state")
    assert state["counters"]["step"] == 6
    assert state["counters"]["next_sample"] == 8 * (6 if action == "skip" else 8)
    assert state["guard"]["skipped"] == 1
    saved = [line["detail"]["generation"] for line in lines if line.get("event") == "save"]
    assert saved[-1] == "step-00000006"


def test_the_micro_batch_may_change_with_the_layout(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"batch": {"sequences": 8, "micro_sequences": 4}}
    first = settings(tmp_path, "run", steps=2, **changes)
    run(first)
    second = settings(tmp_path, "run", steps=4, parallel={"dp": 4}, batch={"sequences": 8, "micro_sequences": 2})
    assert run_ranks(4, on_rank, second)[0]["resumed"] == 2
    whole = settings(tmp_path, "whole", steps=4, **changes)
    run(whole)
    assert_same(generation(second), generation(whole), 2e-5)
    real = settings(tmp_path, "run", steps=6, balance={"scope": "micro"}, **changes)
    with pytest.raises(ConfigError, match="balance.scope"):
        run(real)
