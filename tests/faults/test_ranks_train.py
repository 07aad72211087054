"""Training on many ranks and what can happen to one of them, by the command line, as a user has it.

SKYMOE_KILLS is the number of random moments at which a rank is killed, over all layouts: one each by default, 200 for
the record.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults.small_disk import file_system_of
from parallel.launched import Launched, is_alive, launched
from train.tiny import MOE, assert_same_state, recipe, untimed_lines

from skymoe.base.config import dump_config
from skymoe.ckpt.config import DiffConfig
from skymoe.ckpt.run import run_diff

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]
LAYOUTS = {
    "one": (1, []),
    "pp2": (2, ["parallel.pp=2"]),
    "edp2": (2, ["parallel.tp=2"]),
    "dp2": (2, ["parallel.dp=2"]),
    "pp2_edp2": (4, ["parallel.pp=2", "parallel.tp=2"]),
}
KILLS = int(os.environ.get("SKYMOE_KILLS", str(len(LAYOUTS))))
TIMEOUT_S = 8
START_S = 300  # four processes that load torch on a busy machine
SPEC = {**MOE, "num_heads": 4, "num_kv_heads": 2}
STEPS = {
    "steps": 12,
    "batch": {"sequences": 4, "micro_sequences": 1},
    "checkpoint": {"every": 2, "keep": 2},
    "evaluate": {"every": 4, "windows": 4},
    "log": {"every": 3},
}


@contextmanager
def training(
    root: Path, directory: Path, layout: str, *changes: str, restarts: int = 0, timeout_s: float = TIMEOUT_S
) -> Iterator[Launched]:
    """`skymoe train` on the recipe of `root`."""
    num_ranks, parallel = LAYOUTS[layout]
    options = ["--nproc", str(num_ranks), "--max-restarts", str(restarts)] if num_ranks > 1 or restarts else []
    words = [f"run.dir={directory}", f"parallel.timeout_s={timeout_s}", *parallel, *changes]
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "skymoe", "train", str(root / "recipe.yaml"), *options, *words]
    with launched(command, directory.parent) as running:
        yield running


def begun(running: Launched, directory: Path) -> dict[int, int]:
    """Wait for the first line of metrics; the ranks by number (a run of one process is its own rank 0)."""
    running.wait_for((directory / "metrics.jsonl").exists, START_S)
    return running.ranks() or {0: running.process.pid}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    (path / "recipe.yaml").write_text(dump_config(recipe(path, spec=SPEC, **STEPS)))
    return path


@pytest.fixture(scope="module")
def references(root) -> dict[str, float]:
    """The uninterrupted runs that were needed so far: seconds from the first line of metrics to the end."""
    return {}


def reference(root: Path, references: dict[str, float], layout: str) -> Path:
    directory = root / layout / "run"
    if layout not in references:
        with training(root, directory, layout, timeout_s=600) as running:
            begun(running, directory)
            since = time.monotonic()
            assert running.wait(START_S) == 0, running.said
            references[layout] = time.monotonic() - since
    return directory


@pytest.mark.parametrize("layout, seed", [(list(LAYOUTS)[n % len(LAYOUTS)], n // len(LAYOUTS)) for n in range(KILLS)])
def test_a_rank_killed_at_a_random_moment_costs_nothing_but_time(root, references, tmp_path, layout, seed):
    """Half are started again by the launcher, half by the user; half of each save while training goes on."""
    straight, directory = reference(root, references, layout), tmp_path / "run"
    chance = random.Random(f"{layout} {seed}")
    restarts, saving = seed % 2, f"checkpoint.asynchronous={bool(seed // 2 % 2)}"
    with training(root, directory, layout, saving, restarts=restarts, timeout_s=600) as running:
        ranks = begun(running, directory)
        time.sleep(chance.uniform(0, references[layout]))
        victim = chance.choice(sorted(ranks))
        if is_alive(ranks[victim]):
            os.kill(ranks[victim], signal.SIGKILL)
        code = running.wait(START_S)
        assert not any(map(is_alive, ranks.values())), "orphans"
        assert code in ((0,) if restarts else (0, 3, -signal.SIGKILL)), running.said
        if code == 3:
            assert f"rank {victim}" in running.said
    if code:
        with training(root, directory, layout, saving, timeout_s=600) as running:
            assert running.wait(START_S) == 0, running.said
    assert_same_state(straight, directory)
    assert run_diff(DiffConfig(left=straight / "model", right=directory / "model")).exit_code == 0
    assert untimed_lines(straight) == untimed_lines(directory)


@pytest.mark.parametrize("layout, victim", [("pp2", 0), ("edp2", 1), ("pp2_edp2", 3)])
def test_a_stopped_rank_ends_all_within_the_timeout_and_is_named(root, tmp_path, layout, victim):
    directory = tmp_path / "run"
    with training(root, directory, layout, "steps=100000") as running:
        ranks = begun(running, directory)
        running.wait_for(lambda: (directory / "checkpoints" / "LATEST").exists(), START_S)
        since = time.monotonic()
        os.kill(ranks[victim], signal.SIGSTOP)
        assert running.wait(START_S) == 3, running.said
        assert time.monotonic() - since < TIMEOUT_S + 10 + 2
        assert not any(map(is_alive, ranks.values()))
        assert f"error: rank {victim} (pp " in running.said and "gives no sign of life" in running.said


def test_a_rank_without_memory_ends_all_and_is_named(root, tmp_path):
    directory = tmp_path / "run"
    with training(root, directory, "edp2", "steps=100000", "checkpoint.every=1") as running:
        ranks = begun(running, directory)
        size = int(Path(f"/proc/{ranks[1]}/statm").read_text().split()[0]) * resource.getpagesize()
        since = time.monotonic()
        resource.prlimit(ranks[1], resource.RLIMIT_AS, (size // 2, size // 2))
        assert running.wait(START_S) != 0
        assert time.monotonic() - since < TIMEOUT_S + 10 + 2, running.said
        assert not any(map(is_alive, ranks.values()))
        assert "rank 1" in running.said.partition("error")[2]


def test_a_full_disk_ends_all_with_one_answer_and_the_run_goes_on_when_there_is_space(root, tmp_path):
    with file_system_of(tmp_path / "disk", "1100k") as disk:
        directory = disk / "run"
        with training(root, directory, "pp2", "checkpoint.on_save_error=abort") as running:
            assert running.wait(START_S) == 3, running.said
            assert "space" in running.said
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        with training(root, directory, "pp2", "checkpoint.on_save_error=abort") as running:
            assert running.wait(START_S) == 0, running.said


def test_weights_that_run_away_end_all_ranks_with_one_decision(root, tmp_path):
    directory = tmp_path / "run"
    with training(
        root, directory, "dp2", "optimizer.lr=1e30", "guard.non_finite=raise", "guard.spike=ignore"
    ) as running:
        assert running.wait(START_S) == 1, running.said
        assert "training stopped at step" in running.said
        assert running.tree() == []


def test_a_signal_to_the_launcher_saves_and_the_same_command_goes_on(root, references, tmp_path):
    straight, directory = reference(root, references, "pp2"), tmp_path / "run"
    with training(root, directory, "pp2", timeout_s=600) as running:
        begun(running, directory)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(START_S) in (75, 0), running.said
    with training(root, directory, "pp2", timeout_s=600) as running:
        assert running.wait(START_S) == 0, running.said
    assert_same_state(straight, directory)
