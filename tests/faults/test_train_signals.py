"""SIGTERM and SIGINT: one stops after the step and saves, two stop at once; nothing is lost that was saved."""

from __future__ import annotations

import random
import signal
import time

import pytest
from faults.faulty import INTERRUPTED, Child, at_forward, wait_for
from train.tiny import assert_same_state, recipe

from skymoe.train.config import TrainConfig
from skymoe.train.metrics import read_metrics
from skymoe.train.run import run
from skymoe.weights.generation import latest_generation

CONSTANT = {"schedule": {"kind": "constant"}, "checkpoint": {"every": 0}, "evaluate": {"every": 0}, "log": {"every": 1}}


def endless(root) -> TrainConfig:
    return recipe(root, steps=100_000, **CONSTANT)


def has_steps(config: TrainConfig, number: int):
    return lambda: sum(line["kind"] == "train" for line in read_metrics(config.run.dir / "metrics.jsonl")) >= number


def assert_resumes_bit_equal(root, step: int) -> None:
    """Three steps on from `step`, against a run that was never interrupted."""
    assert run(recipe(root, steps=step + 3, **CONSTANT)).resumed_from == step
    run(recipe(root, steps=step + 3, **CONSTANT, run={"dir": str(root / "straight")}))
    assert_same_state(root / "run", root / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_saves_and_says_how_to_go_on(tmp_path, number):
    config = endless(tmp_path)
    child = Child(lambda: run(config).exit_code)
    wait_for(has_steps(config, 3))
    child.kill(number)
    assert child.wait() == 75
    lines = read_metrics(config.run.dir / "metrics.jsonl")
    last = max(line["step"] for line in lines if line["kind"] == "train")
    generation = latest_generation(config.run.dir / "checkpoints")
    assert generation.step == last, "not a step is lost"
    assert lines[-1]["event"] == "stop" and lines[-1]["detail"] == {"signal": number.name}
    assert not (config.run.dir / "model").exists()
    assert_resumes_bit_equal(tmp_path, last)


@pytest.mark.parametrize("number, expected", [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, -signal.SIGTERM)])
def test_the_second_signal_acts_at_once(tmp_path, number, expected):
    config = endless(tmp_path)

    def hang(*ignored) -> None:
        (tmp_path / "hangs").touch()
        time.sleep(300)

    def train() -> int:
        with at_forward(20, hang):
            return run(config).exit_code

    child = Child(train)
    wait_for((tmp_path / "hangs").exists)
    child.kill(number)
    time.sleep(0.2)
    child.kill(number)
    assert child.wait() == expected


def test_signals_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run(recipe(tmp_path, steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_sigterm_at_random_times_loses_no_step(tmp_path, seed):
    config = endless(tmp_path)
    child = Child(lambda: run(config).exit_code)
    wait_for(has_steps(config, 1))
    time.sleep(random.Random(seed).uniform(0, 0.5))
    child.kill(signal.SIGTERM)
    assert child.wait() == 75
    assert_resumes_bit_equal(tmp_path, latest_generation(config.run.dir / "checkpoints").step)
