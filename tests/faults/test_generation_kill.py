"""Kill the writer of a generation anywhere: a verified generation, the one before or the new one, is always there.

Two ways: `os._exit` at every single system call of a save (and half-way through every write), and SIGKILL
at random moments of a process that saves all the time.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.generations import assert_whole, in_child, interposed, save

from skymoe.weights.generation import latest_generation, verify_generation
from skymoe.weights.publish import leftovers

KILLED = 9


def die_at(number: int, *, half_way: bool) -> None:
    """From now on this process ends before its `number`-th system call that changes the disk.

    With `half_way` only writes count, and half of the data of the last one reaches the file. (To die after a call is to
    die before the next one: nothing on the disk changes in between.)
    """
    count = 0

    def before(name: str, args: tuple) -> None:
        nonlocal count
        count += name == "write" or not half_way
        if count == number:
            if half_way:
                os.pwrite(args[0], args[1][: len(args[1]) // 2], os.lseek(args[0], 0, os.SEEK_CUR))
            os._exit(KILLED)

    for name, call in interposed(before).items():  # in a child: it is never undone
        setattr(os, name, call)


def first_save(root: Path) -> None:
    """Nothing is there yet."""


def one_before(root: Path) -> None:
    save(root, 10)


def full(root: Path) -> None:
    for step in (5, 10):
        save(root, step, keep=2)


def rolled_back(root: Path) -> None:
    """Step 20 is there already, and a step after it."""
    for step in (10, 20, 30):
        save(root, step)


# prepare, `keep` of the save of step 20 that is killed, and the steps a resume may then find
SCENARIOS: dict[str, tuple[Callable[[Path], None], int, set[int | None]]] = {
    "first save": (first_save, 3, {None, 20}),
    "one before": (one_before, 3, {10, 20}),
    "keep one": (one_before, 1, {10, 20}),
    "retire one": (full, 2, {10, 20}),
    "save again after rollback": (rolled_back, 3, {30, 20}),
    "save again, keep one": (rolled_back, 1, {30, 20}),
}


@pytest.mark.parametrize("half_way", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kill_at_every_system_call(scenario: str, half_way: bool, tmp_path: Path) -> None:
    prepare, keep, allowed = SCENARIOS[scenario]
    template = tmp_path / "template"
    template.mkdir()
    prepare(template)
    found: list[int | None] = []
    for number in range(1, 500):
        root = tmp_path / "root"
        shutil.copytree(template, root)

        def work(root: Path = root, number: int = number) -> None:
            die_at(number, half_way=half_way)
            save(root, 20, keep=keep)

        code = in_child(work)
        assert code in (0, KILLED)
        for path in root.glob("step-????????"):  # removing begins with a rename: what has the name is whole
            assert verify_generation(path) == []
        generation = latest_generation(root)
        found.append(generation.step if generation else None)
        if generation:
            assert_whole(generation)
            assert not generation.skipped, "a kill must not look like damage"
        if number % 5 == 0 or code == 0:  # life goes on, and clears what the kill left
            save(root, 40, keep=keep)
            newest = latest_generation(root)
            assert newest and newest.step == 40
            assert_whole(newest)
            assert not [name for name in leftovers(root) if ".stale-" not in name]
        shutil.rmtree(root)
        if code == 0:
            break
    assert len(found) > 8 and found[-1] == 20, "the last run was not killed"
    assert set(found) == (allowed if not half_way else set(found) & allowed)
    first_new = found.index(20)
    assert all(step == 20 for step in found[first_new:]), "once published it stays"


def kill_at_random(root: Path, kills: int, seed: int) -> None:
    """SIGKILL a process that saves steps 1, 2, 3, ... and, now and then, an old step again."""
    rng = random.Random(seed)
    last = 0
    for _ in range(kills):
        read, write = os.pipe()
        start = last

        def work(start: int = start, read: int = read, write: int = write) -> None:
            os.close(read)
            step = start
            while True:
                step = step - 1 if step > 3 and step % 5 == 0 and step == start else step + 1
                save(root, step, keep=2)
                os.write(write, step.to_bytes(4, "little"))

        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(1)
        os.close(write)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(read, "rb") as pipe:
            told = pipe.read()
        acknowledged = int.from_bytes(told[-4:], "little") if told else None
        generation = latest_generation(root)
        if generation is None:
            assert last == 0 and acknowledged is None
            continue
        assert_whole(generation)
        assert not generation.skipped
        if acknowledged is not None:  # what was reported as saved is there, or the one right after it
            assert abs(generation.step - acknowledged) <= 1
        else:
            assert generation.step in (start, start + 1, start - 1)
        last = generation.step
    assert last > 0


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    kill_at_random(tmp_path / "root", kills=40, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_sigkill_at_random_moments_long(tmp_path: Path, seed: int) -> None:
    kill_at_random(tmp_path / "root", kills=200, seed=seed)
