"""A full disk: the previous generation stays whole, training goes on with a warning, and the record catches up."""

from __future__ import annotations

import resource
import shutil
import signal

import pytest
from faults.faulty import Child, at_forward
from train.tiny import assert_same_state, recipe

from skymoe.ckpt.config import VerifyConfig
from skymoe.ckpt.run import run_verify
from skymoe.train.metrics import read_metrics
from skymoe.train.run import run
from skymoe.weights.generation import latest_generation

STEPS = {
    "steps": 12,
    "batch": {"micro_sequences": None},
    "evaluate": {"every": 0, "at_start": False},
    "log": {"every": 1},
}


def limit_file_size(num_bytes: int) -> None:
    """Writes beyond this size fail, as on a full disk, in this process only."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def fill_disk(*ignored) -> None:
    limit_file_size(20_000)


def free_disk(*ignored) -> None:
    limit_file_size(resource.RLIM_INFINITY)


def failed_saves(directory) -> list[int]:
    lines = read_metrics(directory / "metrics.jsonl")
    return [line["step"] for line in lines if line.get("event") == "save_failed"]


def test_a_failed_save_is_a_warning_and_the_run_ends_as_if_nothing_happened(tmp_path):
    config = recipe(tmp_path, **STEPS)

    def train() -> int:
        with at_forward(6, fill_disk), at_forward(10, free_disk):
            return run(config).exit_code

    assert Child(train).wait() == 0
    assert failed_saves(config.run.dir) == [8]
    names = sorted(path.name for path in (config.run.dir / "checkpoints").iterdir())
    assert names == ["LATEST", "step-00000004", "step-00000012"]
    assert run_verify(VerifyConfig(path=config.run.dir)).problems == ()
    steps = [line["step"] for line in read_metrics(config.run.dir / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 13))
    run(recipe(tmp_path, **STEPS, run={"dir": str(tmp_path / "straight")}))
    assert_same_state(config.run.dir, tmp_path / "straight")


def test_abort_stops_and_leaves_the_previous_generation_whole(tmp_path):
    config = recipe(tmp_path, **STEPS, checkpoint={"every": 4, "on_save_error": "abort"})

    def train() -> int:
        with at_forward(6, fill_disk):
            return run(config).exit_code

    assert Child(train).wait() == 3
    generation = latest_generation(config.run.dir / "checkpoints")
    assert (generation.step, generation.skipped) == (4, ())
    assert run(config).resumed_from == 4


def test_a_full_disk_at_the_end_loses_nothing_that_was_saved(tmp_path):
    config = recipe(tmp_path, **STEPS)

    def train() -> int:
        with at_forward(10, fill_disk):
            return run(config).exit_code

    assert Child(train).wait() == 3
    assert not (config.run.dir / "model").exists()
    assert run(config).resumed_from == 8
    run(recipe(tmp_path, **STEPS, run={"dir": str(tmp_path / "straight")}))
    assert_same_state(config.run.dir, tmp_path / "straight")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_generation_is_passed_over_and_the_run_ends_the_same(tmp_path, damage):
    config = recipe(tmp_path, **STEPS)
    run(config)
    shutil.copytree(config.run.dir, tmp_path / "reference")
    victim = config.run.dir / "checkpoints/step-00000012/model.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 16
    match damage:
        case "flip":
            victim.write_bytes(data)
        case "truncate":
            victim.write_bytes(data[:-100])
        case "remove":
            victim.unlink()
    report = run(config)
    assert report.resumed_from == 8
    fallback = [line for line in read_metrics(config.run.dir / "metrics.jsonl") if line.get("event") == "fallback"]
    assert "step-00000012" in fallback[0]["detail"]["directory"]
    assert_same_state(config.run.dir, tmp_path / "reference")
