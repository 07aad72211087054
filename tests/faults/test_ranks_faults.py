"""Faults of one rank, under our launcher and under torchrun: all others stop in time and name it; nobody is left."""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import pytest
from faults.small_disk import file_system_of
from parallel.launched import TOY, Launched, is_alive, launched, launched_toy, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]
TIMEOUT_S = 6
START_S = 60  # loading torch on a busy machine


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    with file_system_of(tmp_path / "disk", "2m") as path:
        yield path


def assert_all_stop(running: Launched, ranks: dict[int, int], since: float) -> int:
    """Every rank is gone within the time-out + 10 s, and so is the launcher soon after; returns its code."""
    code = running.wait(START_S)
    assert time.monotonic() - since < TIMEOUT_S + 10 + 2, running.said  # 2 s: launcher and interpreter end
    assert not any(map(is_alive, ranks.values())), "orphans"
    assert running.tree() == []
    return code


@pytest.mark.parametrize(
    "kind, words, code",
    [
        ("kill", 'rank 1 was killed by SIGKILL; it was last in "', 3),
        ("stop", "rank 1 gives no sign of life for", 3),
        ("memory", 'rank 1 failed in "compute" of step 40: out of memory', 3),
        ("disk", 'rank 1 failed in "compute" of step 40: the disk is full', 3),
        ("defect", "rank 1 failed in \"compute\" of step 40: KeyError: 'a defect'", 1),
        ("sleep", 'rank 1 hangs in "compute" of step 40', 3),
        ("exit", "rank 1 gives no sign of life for", 7),
    ],
)
def test_a_fault_of_one_rank_ends_all_and_is_named(tmp_path, request, kind, words, code):
    disk = str(request.getfixturevalue("small_disk")) if kind == "disk" else str(tmp_path)
    environment = {"TOY_SLOW": "0.05", "TOY_DISK": disk}
    with launched_toy(3, 10_000, kind, 1, 40, TIMEOUT_S, directory=tmp_path, **environment) as running:
        running.wait_for(lambda: running.said.count("step 39") >= 2, START_S)
        ranks, since = running.ranks(), time.monotonic()
        assert assert_all_stop(running, ranks, since) == code, running.said
        assert f"error: {words}" in running.said
        assert f"rank 2: error: {words}" in running.said  # every rank knows


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_signal_from_outside_at_a_random_moment(tmp_path, number):
    with launched_toy(3, 100_000, "none", -1, -1, TIMEOUT_S, directory=tmp_path, TOY_SLOW="0.01") as running:
        running.wait_for(lambda: "step 5\n" in running.said, START_S)
        ranks = running.ranks()
        time.sleep(random.Random(int(number)).uniform(0, 1))
        victim = random.Random(int(number)).choice(sorted(ranks))
        since = time.monotonic()
        os.kill(ranks[victim], number)
        assert assert_all_stop(running, ranks, since) == 3
        assert f"rank {victim} " in running.said.partition("error: ")[2]


@pytest.mark.parametrize("kind", ["kill", "memory"])
def test_under_torchrun_a_fault_is_named_too(tmp_path, kind):
    with launched(
        torchrun("--nproc-per-node", 3, TOY, 10_000, kind, 1, 40, TIMEOUT_S), tmp_path, TOY_SLOW="0.05"
    ) as running:
        running.wait_for(lambda: running.said.count("step 39") >= 2, START_S)
        ranks = running.ranks()
        assert running.wait() == 1  # torchrun's
        assert not any(map(is_alive, ranks.values()))
        assert "error: rank 1 gives no sign of life" in running.said or "error: rank 1 failed in" in running.said


def test_a_rank_that_never_comes_is_named(tmp_path):
    """Rank 1 dies before it has met the others, who wait for it: there is no heart to listen to yet."""
    script = tmp_path / "late.py"
    script.write_text(
        f"""import os, runpy
if os.environ["RANK"] == "1":
    os._exit(9)
runpy.run_path({str(TOY)!r}, run_name="__main__")
"""
    )
    with launched_toy(2, 5, directory=tmp_path, script=script) as running:
        assert running.wait(START_S) == 9
        assert "rank 1 ended with exit code 9" in running.said
        assert running.tree() == []
