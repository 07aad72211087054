"""SIGKILL anywhere: the same command again ends with the very bits of an uninterrupted run."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from faults.faulty import Child, Killer
from train.tiny import assert_same_state, recipe, untimed_lines

from skymoe.ckpt.config import DiffConfig
from skymoe.ckpt.run import run_diff
from skymoe.train.config import TrainConfig
from skymoe.train.run import run

KILLED = -signal.SIGKILL
STEPS = {"steps": 9, "checkpoint": {"every": 2, "keep": 2}, "evaluate": {"every": 4, "windows": 3}}


def train(config: TrainConfig) -> int:
    return run(config).exit_code


def count_events(config: TrainConfig, path: Path, within: str) -> int:
    """How many events an uninterrupted run has; a child counts, because the profile slows everything down."""

    def counted() -> int:
        with Killer(None, within) as counter:
            train(config)
        path.write_text(str(counter.count))
        return 0

    assert Child(counted).wait() == 0
    return int(path.read_text())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Root with data, the uninterrupted run, and the number of events in all and inside saves."""
    root = tmp_path_factory.mktemp("kill")
    config = recipe(root, **STEPS)
    assert Child(lambda: train(config)).wait() == 0
    counts = {}
    for within in ("", "save_state"):
        other = recipe(root, **STEPS, run={"dir": str(root / f"count{within}")})
        counts[within] = count_events(other, root / "events", within)
    return root, counts


def assert_same_as_reference(root: Path, directory: Path) -> None:
    """Tensors, alpha, counters, guard and the exported model bit for bit; and no line of metrics missing or double."""
    assert_same_state(root / "run", directory)
    assert run_diff(DiffConfig(left=root / "run/model", right=directory / "model")).exit_code == 0
    assert untimed_lines(root / "run") == untimed_lines(directory)


def kill_and_resume(root: Path, directory: Path, within: str, points: list[int]) -> None:
    """Die at each of `points` in turn, resume after each, and compare the end."""
    config = recipe(root, **STEPS, run={"dir": str(directory)})

    def dying(point: int) -> int:
        with Killer(point, within):
            return train(config)

    for point in points:
        assert Child(lambda point=point: dying(point)).wait() in (KILLED, 0)
    assert Child(lambda: train(config)).wait() == 0
    assert_same_as_reference(root, directory)


@pytest.mark.parametrize("within, share", [("", 0.2), ("", 0.7), ("save_state", 0.3), ("save_state", 0.9)])
def test_killed_once(reference, tmp_path, within, share):
    root, counts = reference
    kill_and_resume(root, tmp_path / "run", within, [int(counts[within] * share)])


def test_killed_again_and_again(reference, tmp_path):
    root, counts = reference
    kill_and_resume(root, tmp_path / "run", "save_state", [counts["save_state"] // 4] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_killed_at_random(reference, tmp_path, seed):
    """Half of the points anywhere, half inside saves."""
    root, counts = reference
    within = ("", "save_state")[seed % 2]
    kill_and_resume(root, tmp_path / "run", within, [random.Random(seed).randint(1, counts[within])])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_by_the_clock(reference, tmp_path, seed):
    """From outside and at any machine instruction, threads that write included."""
    root, _ = reference
    config = recipe(root, **STEPS, run={"dir": str(tmp_path / "run")})
    delays = random.Random(seed)
    for _ in range(3):
        child = Child(lambda: train(config))
        time.sleep(delays.uniform(0.0, 0.6))
        child.kill()
        assert child.wait() in (KILLED, 0)
    assert Child(lambda: train(config)).wait() == 0
    assert_same_as_reference(root, tmp_path / "run")
